"""Tokens to text, per request: whole code points, nothing of a stop string. Engine thread only."""

from __future__ import annotations

import codecs
from collections.abc import Callable

__all__ = ["Detokenizer", "ResumedDetokenizer"]


class Detokenizer:
    """Turns token ids into text that can be shown immediately.

    >>> d = Detokenizer([b"Hel", b"lo", b" STOP", b"\\xc3", b"\\xa9"].__getitem__, stop=("STOP",))
    >>> d.push(0), d.push(3), d.push(4)
    ('Hel', '', 'é')
    >>> d.push(2), d.stopped
    (' ', True)

    ``piece`` returns a token's bytes. An unfinished code point, and text that may begin a stop
    string, are held back; ``flush`` releases them at the end.
    """

    __slots__ = ("_decoder", "_held", "_stop", "matched", "piece", "stopped")

    def __init__(self, piece: Callable[[int], bytes], stop: tuple[str, ...] = ()) -> None:
        self.piece = piece
        self._stop = stop
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self.stopped = False
        self.matched: str | None = None  # the stop string found

    def push(self, token: int) -> str:
        """The text that this token completes. After a stop string, ``stopped`` is set and nothing
        more follows."""
        if self.stopped:
            return ""
        return self._release(self._decoder.decode(self.piece(token)))

    def flush(self) -> str:
        """The text still held back at the end of generation."""
        if self.stopped:
            return ""
        text = self._release(self._decoder.decode(b"", final=True))
        text, self._held = text + self._held, ""
        return text

    def _release(self, new: str) -> str:
        if not self._stop:
            return new
        text = self._held + new
        matches = [(i, s) for i, s in ((text.find(s), s) for s in self._stop) if i >= 0]
        if matches:
            at, self.matched = min(matches)
            self.stopped, self._held = True, ""
            return text[:at]
        keep = max((_overlap(text, s) for s in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


class ResumedDetokenizer(Detokenizer):
    """One that leaves out the first ``sent_chars`` characters, which the reader has.

    >>> d = ResumedDetokenizer([b"Hel", b"lo"].__getitem__, sent_chars=4)
    >>> d.push(0), d.push(1)
    ('', 'o')
    """

    __slots__ = ("_left",)

    def __init__(
        self, piece: Callable[[int], bytes], stop: tuple[str, ...] = (), sent_chars: int = 0
    ) -> None:
        super().__init__(piece, stop)
        self._left = sent_chars

    @property
    def num_missing(self) -> int:
        """How many characters the reader has that the tokens so far do not explain, even with what
        is held back: that was sent if the answer ended there and only its end was lost."""
        begun = b"" if self.stopped else self._decoder.getstate()[0]
        return max(0, self._left - len(self._held) - len(begun.decode("utf-8", "replace")))

    def push(self, token: int) -> str:
        return self._unsent(super().push(token))

    def flush(self) -> str:
        return self._unsent(super().flush())

    def _unsent(self, text: str) -> str:
        sent = min(self._left, len(text))
        self._left -= sent
        return text[sent:]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest suffix of ``text`` that is a prefix of ``stop``."""
    for n in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:n]):
            return n
    return 0
