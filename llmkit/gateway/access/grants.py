"""Keys from wherever they come, in one form: whose, what for, until when. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from llmkit.errors import InvalidRequestError
from llmkit.gateway.access.identity import SCOPES, Allowance, Identity
from llmkit.settings.allowances import read_expiry
from llmkit.settings.entries import KeyEntry
from llmkit.settings.values import secret_fault
from llmkit.store.records import KeyRecord, digest

__all__ = ["Grant"]


@dataclass(frozen=True, slots=True)
class Grant:
    """What a key opens. ``sha256`` is its secret's; ``ended`` says why it opens nothing."""

    sha256: str
    identity: Identity
    expires_at: float | None = None
    ended: str = ""
    is_stored: bool = False  # in the database, which notes when it was used

    @classmethod
    def of_record(cls, record: KeyRecord) -> Grant:
        """A key of the database."""
        return cls(
            record.sha256,
            _identity(record),
            record.expires_at,
            "was revoked" if record.revoked_at is not None else "",
            is_stored=True,
        )

    @classmethod
    def of_entry(cls, entry: KeyEntry, now: float) -> Grant:
        """A key of the settings file."""
        return cls(
            entry.sha256,
            _identity(entry),
            read_expiry(entry.expires, now),
            "" if entry.enabled else "is switched off",
        )

    @classmethod
    def of_owner(cls, secret: str) -> Grant:
        """The single key of the command line or environment, which may do everything.

        Raises `InvalidRequestError`, which does not show it.
        """
        wanted = secret_fault(secret)
        if wanted:
            raise InvalidRequestError(f"the API key must be {wanted}.", "api_key")
        return cls(digest(secret), Identity("owner", "key", scopes=frozenset(SCOPES)))

    def ending(self, now: float) -> str:
        """Why the key opens nothing now; empty if it does."""
        if self.ended:
            return self.ended
        return "has expired" if self.expires_at is not None and self.expires_at <= now else ""


def _identity(key: KeyRecord | KeyEntry) -> Identity:
    allowance = Allowance(
        key.models,
        key.rate,
        key.concurrent,
        key.tokens_per_day,
        key.tokens_per_month,
        key.weight,
    )
    return Identity(f"key {key.name}", "key", scopes=frozenset(key.scopes), allowance=allowance)
