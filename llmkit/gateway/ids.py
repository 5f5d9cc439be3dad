"""Ids of replies and of requests to engines. Pure."""

from __future__ import annotations

import secrets

__all__ = ["new_id"]


def new_id(prefix: str, separator: str = "-") -> str:
    """A new id: the prefix and 24 random hexadecimal digits."""
    return f"{prefix}{separator}{secrets.token_hex(12)}"
