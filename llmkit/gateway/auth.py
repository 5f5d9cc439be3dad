"""Who may call a gateway that runs without Jupyter."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from hmac import compare_digest
from urllib.parse import urlsplit

from llmkit.errors import InvalidRequestError
from llmkit.gateway.failures import ApiError

__all__ = ["Keys", "is_loopback"]

OPEN_PATHS = ("/health", "/docs", "/swagger-ui", "/openapi.json")  # no more than the version and what it can do


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
            raise InvalidRequestError("the API key must be printable ASCII and not empty.", "api_key")
        if key is None and not is_loopback(host):
            raise InvalidRequestError(
                f"refusing to serve on {host} without a key: everybody who can reach this machine could use the model. "
                "Give one with --api-key or in $LLMKIT_API_KEY, or stay on --host 127.0.0.1.",
                "api_key",
            )
        self._key = key

    def refusal(self, path: str, headers: Mapping[str, str], host: str) -> ApiError | None:
        """Why a request is refused; None lets it in."""
        if self._key is None:
            # A web page may have its name point to 127.0.0.1 (DNS rebinding) or post blindly to it: neither may use the model.
            if not is_loopback(host):
                return ApiError(403, f"The host {host!r:.100} is not this server's. Use 127.0.0.1, or start the server with a key.", code="forbidden_host")
            origin = headers.get("Origin")
            if origin and not is_loopback(urlsplit(origin).hostname or ""):
                return ApiError(403, "Requests from other web sites are refused; start the server with a key to allow them.", code="forbidden_origin")
            return None
        if path in OPEN_PATHS:
            return None
        scheme, _, token = headers.get("Authorization", "").partition(" ")
        given = token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        if compare_digest(given.encode(), self._key.encode()):
            return None
        message = "Incorrect API key provided." if given else "No API key provided: send it as `Authorization: Bearer KEY`."
        return ApiError(401, message, "authentication_error", code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
