"""Ids of replies and of requests to engines. Any thread."""

from __future__ import annotations

import os

__all__ = ["new_id", "random_hex"]

MANY = 256  # ids whose random bytes are fetched at once: the system call costs more than the id
_ready: list[str] = []
os.register_at_fork(after_in_child=_ready.clear)  # a child must not give its parent's ids again


def new_id(prefix: str, separator: str = "-") -> str:
    """A new id: the prefix and 24 random hexadecimal digits."""
    return f"{prefix}{separator}{random_hex()[:24]}"


def random_hex() -> str:
    """128 random bits, as 32 hexadecimal digits."""
    try:
        return _ready.pop()
    except IndexError:
        digits = os.urandom(16 * MANY).hex()
        _ready.extend(digits[at : at + 32] for at in range(32, len(digits), 32))
        return digits[:32]
