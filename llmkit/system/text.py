"""Text from elsewhere, made safe for one line of a terminal or a log. Pure."""

from __future__ import annotations

__all__ = ["printable"]


def printable(text: str) -> str:
    """The text with everything escaped that is no visible character or space.

    Names of files and what clients send may hold anything: line ends, control sequences of
    terminals, bytes that are not UTF-8.

    >>> printable("a\\nb\\x1b[1m")
    'a\\\\nb\\\\x1b[1m'
    """
    if text.isprintable():  # a fast look: nearly all is
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
