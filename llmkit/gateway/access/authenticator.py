"""Who is asking: the question that keys, and later a hub, answer. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Protocol

from llmkit.gateway.access.identity import Identity

__all__ = [
    "ANONYMOUS",
    "XSRF",
    "XSRF_HEADER",
    "Authenticator",
    "Facts",
    "given_key",
    "is_open",
]

# How a page of ours proves itself where a cookie vouches for its user; sockets have no headers.
XSRF, XSRF_HEADER = "_xsrf", "X-XSRFToken"

OPEN_PATHS = frozenset(
    {
        "/health",
        "/v1/health",
        "/health/live",
        "/health/ready",
        "/readiness",
        "/docs",
        "/swagger-ui",
        "/openapi.json",
    }
)
ANONYMOUS = Identity("anonymous", scopes=frozenset())  # only for open paths


def is_open(path: str) -> bool:
    """Whether a path reveals only the version, the API, and whether a model is there."""
    return path in OPEN_PATHS or path.startswith("/assets/")


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of a request before its body is read.

    ``host`` is the name it was sent to, without a port; ``address`` is the client's, see `Proxies`.
    """

    method: str
    path: str
    host: str
    address: str
    headers: Mapping[str, str]


def given_key(headers: Mapping[str, str], schemes: Collection[str] = ("bearer",)) -> str:
    """The key or token sent with a request; empty if there is none."""
    scheme, _, key = headers.get("Authorization", "").partition(" ")
    if scheme.lower() in schemes:
        return key.strip()
    return headers.get("x-api-key", "").strip()


class Authenticator(Protocol):
    """Tells callers apart."""

    async def identify(self, facts: Facts) -> Identity:
        """The caller. Raises `ApiError` to refuse the request."""
        ...
