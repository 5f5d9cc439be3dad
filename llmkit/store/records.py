"""Rows of the database as data, and secrets of keys. Standard library only."""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import dataclass
from typing import Literal

__all__ = ["KeyRecord", "Spending", "digest", "is_generated", "new_secret"]

PREFIX, RANDOM_BYTES = "llmkit-", 32
SECRET_CHARACTERS = len(PREFIX) + 43  # 32 bytes in base64 without padding


def new_secret() -> str:
    """A new API key: 256 random bits as text."""
    return PREFIX + secrets.token_urlsafe(RANDOM_BYTES)


def is_generated(secret: str) -> bool:
    """Whether this has the form of a generated key, which nobody guesses."""
    return len(secret) == SECRET_CHARACTERS and secret.startswith(PREFIX)


def digest(secret: str) -> str:
    """What is stored of a key: its SHA-256 in hexadecimal.

    A slow hash would add nothing, since the key has 256 random bits.
    """
    return hashlib.sha256(secret.encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class KeyRecord:
    """A key: whose it is, what it may do and how much. Times are in seconds since the epoch.

    ``sha256`` is the secret's `digest`. None means without a limit, or never.
    """

    name: str
    sha256: str
    scopes: tuple[str, ...] = ("inference",)
    models: tuple[str, ...] = ("*",)
    rate: str | None = None
    concurrent: int | None = None
    tokens_per_day: int | None = None
    tokens_per_month: int | None = None
    weight: float = 1.0
    created_at: float = 0.0
    expires_at: float | None = None
    revoked_at: float | None = None
    last_used_at: float | None = None

    def state(self, now: float) -> Literal["active", "expired", "revoked"]:
        """Whether it opens anything at this time."""
        if self.revoked_at is not None:
            return "revoked"
        return "expired" if self.expires_at is not None and self.expires_at <= now else "active"


@dataclass(slots=True)
class Spending:
    """What one caller used of one model in one day (or less); ``seconds`` is time in requests."""

    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0

    def add(self, other: Spending) -> None:
        self.requests += other.requests
        self.prompt_tokens += other.prompt_tokens
        self.cached_tokens += other.cached_tokens
        self.completion_tokens += other.completion_tokens
        self.seconds += other.seconds

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens
