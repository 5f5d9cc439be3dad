"""Addresses of HTTP servers, as people write them. Pure."""

from __future__ import annotations

from urllib.parse import SplitResult, urlsplit

__all__ = ["UNRESERVED", "http_parts"]

UNRESERVED = "/%~!$&'()*+,;=:@"  # stays in a path as it is


def http_parts(url: str) -> tuple[SplitResult, int] | None:
    """An address and its port; None if it is none, or holds a query or control characters.

    >>> http_parts("https://example.org/llmkit")[1], http_parts("ftp://example.org")
    (443, None)
    """
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        return None
    odd = parts.query or parts.fragment or any(c <= " " or c == "\x7f" for c in url)
    if parts.scheme not in ("http", "https") or not parts.hostname or odd:
        return None
    return parts, port or (443 if parts.scheme == "https" else 80)
