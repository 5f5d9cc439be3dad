"""The events of one turn, which any number of readers follow from any of them. Tornado loop only.

Consecutive deltas of one kind are one block of text with the place where each ends: four bytes a
delta, and a reader that is behind gets all it lacks of a block as one event.
"""

from __future__ import annotations

import asyncio
from array import array
from bisect import bisect_right
from collections.abc import AsyncIterator, Iterator
from typing import Any, Literal

import msgspec

__all__ = ["EventLog", "Kind", "TurnEvent"]

Kind = Literal["start", "delta", "reasoning", "call", "pruned", "end", "error"]
MAX_BLOCK = 512  # deltas in one block
BASE_BYTES = 400  # of an event that is not text, besides its message


class TurnEvent(msgspec.Struct, frozen=True, omit_defaults=True):
    """Something that a turn came to; ``seq`` counts from 1.

    ``text`` is of a delta of the answer or its reasoning, ``call`` a tool call in OpenAI's form.
    The last event is ``end`` or ``error``, whose ``message`` is the reply as it is stored. A
    ``pruned`` event says in ``message`` what was left out of the prompt.

    A reader that is behind gets neighbouring deltas as one event with the ``seq`` of the last.
    """

    seq: int
    type: Kind
    text: str = ""
    call: dict[str, Any] | None = None
    message: dict[str, Any] | None = None
    usage: dict[str, Any] | None = None
    error: dict[str, Any] | None = None


class Block:
    """Consecutive deltas of one kind."""

    __slots__ = ("_parts", "ends", "first", "kind")

    def __init__(self, first: int, kind: Kind) -> None:
        self.first, self.kind = first, kind
        self.ends = array("I")  # characters of the block up to the end of each delta
        self._parts: list[str] = []

    @property
    def last(self) -> int:
        return self.first + len(self.ends) - 1

    def add(self, text: str) -> None:
        self._parts.append(text)
        self.ends.append((self.ends[-1] if self.ends else 0) + len(text))

    def after(self, seq: int) -> TurnEvent:
        """What comes after ``seq``, as one event."""
        if seq == self.last - 1:  # a reader that keeps up
            return TurnEvent(self.last, self.kind, self._parts[-1])
        return TurnEvent(self.last, self.kind, self._text[self._start(seq) :])

    def _start(self, seq: int) -> int:
        return 0 if seq < self.first else self.ends[seq - self.first]

    @property
    def _text(self) -> str:
        if len(self._parts) > 2:  # the last one stays apart, for readers that keep up
            self._parts = ["".join(self._parts[:-1]), self._parts[-1]]
        return "".join(self._parts)


class EventLog:
    """The events so far. ``num_bytes`` is the memory they take, about."""

    def __init__(self) -> None:
        self._entries: list[Block | TurnEvent] = []
        self._firsts: list[int] = []  # the seq with which each entry begins
        self._news = asyncio.Event()
        self.last, self.is_closed, self.num_bytes = 0, False, 0

    def text(self, kind: Literal["delta", "reasoning"], text: str) -> None:
        """Append a delta."""
        if not text:
            return
        block = self._entries[-1] if self._entries else None
        if not isinstance(block, Block) or block.kind != kind or len(block.ends) >= MAX_BLOCK:
            block = Block(self.last + 1, kind)
            self._append(block, block.first)
        block.add(text)
        self._grow(len(text) + 8)

    def add(self, kind: Kind, *, is_last: bool = False, size: int = 0, **fields: Any) -> None:
        """Append another event; ``size`` is that of its message in bytes, about."""
        event = TurnEvent(self.last + 1, kind, **fields)
        self._append(event, event.seq)
        self.is_closed = is_last
        self._grow(BASE_BYTES + size)

    def _append(self, entry: Block | TurnEvent, first: int) -> None:
        self._entries.append(entry)
        self._firsts.append(first)

    def _grow(self, size: int) -> None:
        self.last += 1
        self.num_bytes += size
        news, self._news = self._news, asyncio.Event()
        news.set()

    def since(self, after: int) -> Iterator[TurnEvent]:
        """The events after ``after``, neighbouring deltas as one."""
        for entry in self._entries[max(0, bisect_right(self._firsts, after) - 1) :]:
            if isinstance(entry, Block):
                if entry.last > after:
                    yield entry.after(after)
            elif entry.seq > after:
                yield entry

    async def follow(
        self, after: int = 0, ping_s: float | None = None
    ) -> AsyncIterator[TurnEvent | None]:
        """The events after ``after`` as they come, to the last one; None after such a silence."""
        while True:
            news = self._news
            for event in list(self.since(after)):
                after = event.seq
                yield event
            if news is not self._news:
                continue  # more came while they were taken
            if self.is_closed:
                return
            try:
                async with asyncio.timeout(ping_s):
                    await news.wait()
            except TimeoutError:
                yield None
