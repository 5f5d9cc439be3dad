"""What a server says and believes at its edge: security headers, CORS, proxies, TLS. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from llmkit.gateway.access.cors import Cors
from llmkit.gateway.access.proxies import Proxies, is_loopback

__all__ = ["SECURITY_HEADERS", "Edge"]

# On every answer; pages replace the policy by their own.
SECURITY_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "SAMEORIGIN",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'self'",
    "Cross-Origin-Resource-Policy": "same-origin",
}
HSTS = "max-age=31536000"


@dataclass(slots=True)
class Edge:
    """The same for all requests of a server.

    ``is_https``: it has TLS, on the port of HTTPS.
    """

    cors: Cors = field(default_factory=Cors)
    proxies: Proxies = field(default_factory=Proxies)
    is_https: bool = False

    def headers(self, host: str, given: Mapping[str, str]) -> dict[str, str]:
        """Headers of an answer that depend on the request."""
        headers = self.cors.headers(given)
        # Browsers apply it to all ports of a host: it would break plain servers beside this one.
        if self.is_https and not is_loopback(host):
            headers["Strict-Transport-Security"] = HSTS
        return headers
