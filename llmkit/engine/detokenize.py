"""Tokens to text, one request at a time: whole code points only, nothing of a stop string. Engine thread."""

from __future__ import annotations

import codecs
from collections.abc import Callable

__all__ = ["Detokenizer"]


class Detokenizer:
    """Turns token ids into text that can be shown at once.

    >>> d = Detokenizer([b"Hel", b"lo", b" STOP", b"\\xc3", b"\\xa9"].__getitem__, stop=("STOP",))
    >>> d.push(0), d.push(3), d.push(4)
    ('Hel', '', 'é')
    >>> d.push(2), d.stopped
    (' ', True)

    ``piece`` gives a token's bytes. Bytes of an unfinished code point and text that may begin a stop string are held back;
    ``flush`` gives them out at the end.
    """

    __slots__ = ("_decoder", "_held", "_stop", "matched", "piece", "stopped")

    def __init__(self, piece: Callable[[int], bytes], stop: tuple[str, ...] = ()) -> None:
        self.piece = piece
        self._stop = stop
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self.stopped = False
        self.matched: str | None = None  # the stop string that was met

    def push(self, token: int) -> str:
        """The text that this token completes. After a stop string was met, ``stopped`` is set and nothing more comes."""
        if self.stopped:
            return ""
        return self._release(self._decoder.decode(self.piece(token)))

    def flush(self) -> str:
        """What is still held back, at the end of the generation."""
        if self.stopped:
            return ""
        text = self._release(self._decoder.decode(b"", final=True))
        text, self._held = text + self._held, ""
        return text

    def _release(self, new: str) -> str:
        if not self._stop:
            return new
        text = self._held + new
        found = [(i, s) for i, s in ((text.find(s), s) for s in self._stop) if i >= 0]
        if found:
            at, self.matched = min(found)
            self.stopped, self._held = True, ""
            return text[:at]
        keep = max((_overlap(text, s) for s in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that is a beginning of ``stop``."""
    for n in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:n]):
            return n
    return 0
