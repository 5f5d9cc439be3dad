"""Authenticates callers of a gateway that runs without Jupyter. Pure."""

from __future__ import annotations

import hashlib
import ipaddress
import re
from collections.abc import Mapping
from hmac import compare_digest

from llmkit.errors import InvalidRequestError
from llmkit.gateway.access.identity import LOCAL, Identity
from llmkit.gateway.failures import ApiError

__all__ = ["Keys", "is_loopback"]

OPEN_PATHS = (
    "/health",
    "/docs",
    "/swagger-ui",
    "/openapi.json",
)  # reveal only the version and the API
ORIGIN = re.compile(r"https?://(?P<host>\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]+)(:[0-9]{1,5})?")
ALLOWED_HEADERS = (
    "authorization, content-type, x-api-key, x-request-id, anthropic-version, anthropic-beta, "
    "anthropic-dangerous-direct-browser-access, openai-beta"
)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach ``host``."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


class Keys:
    """One key, or none on a loopback address.

    Raises `InvalidRequestError` for a host that others can reach without a key.
    """

    def __init__(self, key: str | None, host: str) -> None:
        if key is not None and (not key or not key.isascii() or not key.isprintable()):
            raise InvalidRequestError(
                "the API key must be printable ASCII and not empty.", "api_key"
            )
        if key is None and not is_loopback(host):
            raise InvalidRequestError(
                f"refusing to serve on {host} without a key: anyone who can reach this machine "
                "could use the model. Give one with --api-key or in $LLMKIT_API_KEY, or stay on "
                "--host 127.0.0.1.",
                "api_key",
            )
        self._key = key

    def identify(self, headers: Mapping[str, str]) -> Identity:
        """The caller of a request that was not refused."""
        if self._key is None or not compare_digest(_given(headers).encode(), self._key.encode()):
            return LOCAL
        return Identity(f"key {hashlib.sha256(self._key.encode()).hexdigest()[:8]}", "key")

    def refusal(self, path: str, headers: Mapping[str, str], host: str) -> ApiError | None:
        """The reason to refuse a request; None to accept it."""
        if self._key is None:
            # A web page may point its own name to 127.0.0.1 (DNS rebinding) or post to it blindly:
            # neither may use the model.
            if not is_loopback(host):
                return ApiError(
                    403,
                    f"The host {host!r:.100} is not this server's. "
                    "Use 127.0.0.1, or start the server with a key.",
                    code="forbidden_host",
                )
            if headers.get("Origin") and self.allowed_origin(headers) is None:
                return ApiError(
                    403,
                    "Requests from other websites are refused; "
                    "start the server with a key to allow them.",
                    code="forbidden_origin",
                )
            return None
        if path in OPEN_PATHS:
            return None
        given = _given(headers)
        if compare_digest(given.encode(), self._key.encode()):
            return None
        message = (
            "Incorrect API key provided."
            if given
            else "No API key provided: send it as `Authorization: Bearer KEY`."
        )
        return ApiError(
            401,
            message,
            "authentication_error",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )

    def allowed_origin(self, headers: Mapping[str, str]) -> str | None:
        """The origin, if its pages may read answers: any with a key, else this machine's only."""
        origin = headers.get("Origin") or ""
        match = ORIGIN.fullmatch(origin)
        if match is None:
            return None
        return origin if self._key is not None or is_loopback(match["host"]) else None

    def cors(self, headers: Mapping[str, str]) -> dict[str, str]:
        """The headers that let an allowed page read an answer."""
        origin = self.allowed_origin(headers)
        if origin is None:
            return {"Vary": "Origin"} if headers.get("Origin") else {}
        exposed = "x-request-id, x-llmkit-ignored, retry-after, x-should-retry"
        return {
            "Access-Control-Allow-Origin": origin,
            "Vary": "Origin",
            "Access-Control-Expose-Headers": exposed,
        }

    def preflight(self, headers: Mapping[str, str], methods: str) -> dict[str, str] | None:
        """The answer to a preflight request, which has no key; None if the page is not allowed."""
        if self.allowed_origin(headers) is None:
            return None
        asked = headers.get("Access-Control-Request-Headers", "")
        names = asked if re.fullmatch(r"[A-Za-z0-9, _-]{1,1000}", asked) else ALLOWED_HEADERS
        return {
            "Access-Control-Allow-Methods": methods,
            "Access-Control-Allow-Headers": names,
            "Access-Control-Max-Age": "600",
        }


def _given(headers: Mapping[str, str]) -> str:
    """The key sent with a request."""
    scheme, _, token = headers.get("Authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
