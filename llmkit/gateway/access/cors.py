"""Which web pages may read answers (CORS). Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from llmkit.gateway.access.proxies import is_loopback
from llmkit.settings.gateway import GATEWAY_OPTIONS
from llmkit.settings.values import ORIGIN

__all__ = ["Cors"]

ANY = "*"
ALLOWED_HEADERS = (
    "authorization, content-type, x-api-key, x-request-id, anthropic-version, anthropic-beta, "
    "anthropic-dangerous-direct-browser-access, openai-beta"
)
EXPOSED_HEADERS = (
    "x-request-id, x-llmkit-ignored, x-llmkit-cache, x-llmkit-clamped, retry-after, "
    "x-should-retry, "
    + ", ".join(
        f"x-ratelimit-{what}-{of}"
        for what in ("limit", "remaining", "reset")
        for of in ("requests", "tokens")
    )
)
PREFLIGHT_VARY = "Origin, Access-Control-Request-Method, Access-Control-Request-Headers"


class Cors:
    """The origins whose pages may read answers: none but those named; ``*`` is all of them.

    ``local`` adds the pages of this machine. Raises `InvalidRequestError` for what is no origin.
    """

    def __init__(self, origins: Sequence[str] = (), *, local: bool = False) -> None:
        GATEWAY_OPTIONS["cors_origins"].check(tuple(origins))
        self.is_any = ANY in origins
        self._origins = frozenset(_origin(text) for text in origins if text != ANY)
        self._local = local

    def allows(self, origin: str) -> bool:
        if self.is_any or origin in self._origins:
            return True
        match = ORIGIN.fullmatch(origin) if self._local else None
        return (
            match is not None
            and match["scheme"] in ("http", "https")
            and is_loopback(match["host"])
        )

    def headers(self, given: Mapping[str, str]) -> dict[str, str]:
        """The headers that let an allowed page read an answer, and keep others from it."""
        origin = given.get("Origin")
        if self.is_any:
            allowed = ANY
        elif origin is not None and self.allows(origin):
            allowed = origin
        else:
            return {"Vary": "Origin"} if origin is not None or self._origins else {}
        answer = {
            "Access-Control-Allow-Origin": allowed,
            "Access-Control-Expose-Headers": EXPOSED_HEADERS,
            "Cross-Origin-Resource-Policy": "cross-origin",
        }
        return answer if allowed == ANY else {**answer, "Vary": "Origin"}

    def preflight(self, given: Mapping[str, str], methods: str) -> dict[str, str] | None:
        """The answer to a preflight request, which has no key; None if the page is not allowed."""
        if not self.allows(given.get("Origin") or ""):
            return None
        asked = given.get("Access-Control-Request-Headers", "")
        names = asked if re.fullmatch(r"[A-Za-z0-9, _-]{1,1000}", asked) else ALLOWED_HEADERS
        return {
            "Access-Control-Allow-Methods": methods,
            "Access-Control-Allow-Headers": names,
            "Access-Control-Max-Age": "600",
            "Vary": PREFLIGHT_VARY,
        }


def _origin(text: str) -> str:
    """An origin as browsers send it."""
    origin = text.strip().lower()
    for scheme, port in (("http", ":80"), ("https", ":443")):
        if origin.startswith(f"{scheme}://"):
            origin = origin.removesuffix(port)
    return origin
