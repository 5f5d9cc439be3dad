"""Log-probabilities in OpenAI's two shapes. Pure."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from typing import Any

from llmkit.protocol import TokenLogprob

__all__ = ["Offsets", "chat_logprobs", "text_logprobs"]

FLOOR = -9999.0  # JSON has no negative infinity


def chat_logprobs(entries: Iterable[TokenLogprob]) -> dict[str, Any]:
    """``logprobs`` of a chat choice."""

    def token(piece: bytes, logprob: float | None) -> dict[str, Any]:
        return {"token": _text(piece), "logprob": _finite(logprob), "bytes": list(piece)}

    return {
        "content": [
            {**token(e.piece, e.logprob), "top_logprobs": [token(b, p) for _, b, p in e.top]}
            for e in entries
        ],
        "refusal": None,
    }


class Offsets:
    """Where each token starts in a text, in characters.

    A token that only continues a character starts where that character does.

    >>> offsets = Offsets()
    >>> [offsets.push(piece) for piece in (b"caf", b"\\xc3", b"\\xa9", b"!")]
    [0, 3, 3, 4]
    """

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._length = 0

    def push(self, piece: bytes) -> int:
        start = self._length
        self._length += len(self._decoder.decode(piece))
        return start


def text_logprobs(
    entries: Sequence[TokenLogprob], offsets: Offsets | None = None
) -> dict[str, Any]:
    """``logprobs`` of a text completion; ``offsets`` counts on from its earlier tokens.

    The first token of a prompt has no log-probability.
    """
    offsets = offsets or Offsets()
    return {
        "tokens": [_text(e.piece) for e in entries],
        "token_logprobs": [None if e.logprob is None else _finite(e.logprob) for e in entries],
        "top_logprobs": [None if e.logprob is None else _top(e) for e in entries],
        "text_offset": [offsets.push(entry.piece) for entry in entries],
    }


def _top(entry: TokenLogprob) -> dict[str, float]:
    # Reversed, so that of equal texts the most likely one is kept.
    top = {_text(piece): _finite(logprob) for _, piece, logprob in reversed(entry.top)}
    return {**dict(reversed(top.items())), _text(entry.piece): _finite(entry.logprob)}


def _finite(logprob: float | None) -> float:
    return FLOOR if logprob is None else max(logprob, FLOOR)


def _text(piece: bytes) -> str:
    """The token as text; bytes that are not valid UTF-8 in OpenAI's notation."""
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{b:02x}" for b in piece)
