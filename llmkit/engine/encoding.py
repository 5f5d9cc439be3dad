"""Which images and sounds are encoded next, and how long what became of them is kept. Engine thread
only, but for the encoder's own.

An encoder works beside the decodes, on a CPU for seconds. It is given two items at a time, so that
priorities and aborts count until then: first the next item of each running request, then their
later ones, then those of requests that wait. What is encoded comes in and goes out between steps,
so no step misses what its plan was made with.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from llmkit.engine.backlog import Backlog
from llmkit.engine.media import Item
from llmkit.engine.request import Request

__all__ = ["Encoded", "Encoder", "Encodings"]

DEPTH = 2  # items with the encoder: one at work, one to follow at once


@dataclass(frozen=True, slots=True)
class Encoded:
    """What the encoder made of an item, or an exception, after so many seconds."""

    item: Item
    result: object
    seconds: float


class Encoder(Protocol):
    """Makes embeddings of items, one after the other, on a thread of its own."""

    def encode(self, item: Item, done: Callable[[Encoded], None]) -> None:
        """Returns at once. ``done`` is called on the encoder's thread; the result is what chunks of
        the item are to carry."""
        ...


class Encodings:
    """What is encoded, by key: at most ``max_bytes``, and what running requests need next.

    ``on_done`` is the encoder's; it is to have the engine's thread call ``take``.
    """

    def __init__(
        self, encoder: Encoder | None, max_bytes: int, on_done: Callable[[Encoded], None]
    ) -> None:
        self._encoder = encoder
        self._max_bytes = max_bytes
        self._on_done = on_done
        self._kept: OrderedDict[int, Encoded] = OrderedDict()  # least recently used first
        self._begun: dict[int, Item] = {}  # with the encoder
        self.num_bytes = 0
        self.num_encoded = 0
        self.seconds = 0.0

    def blocks(self, request: Request) -> bool:
        """Whether the request waits for its next item to be encoded."""
        return (item := request.item) is not None and item.key not in self._kept

    def of(self, item: Item | None) -> object | None:
        """What chunks of ``item`` carry."""
        if item is None:
            return None
        self._kept.move_to_end(item.key)
        return self._kept[item.key].result

    def advance(self, running: list[Request], waiting: Backlog) -> None:
        """Give the encoder what is to be encoded next, if it has room, and drop what nobody needs
        any more beyond the bound."""
        if self._encoder is None:
            return
        self._drop(running, waiting)
        while len(self._begun) < DEPTH and (item := self._next(running, waiting)) is not None:
            self._begun[item.key] = item
            self._encoder.encode(item, self._on_done)

    def _next(self, running: list[Request], waiting: Backlog) -> Item | None:
        found = [
            ((place, request.priority, request.arrived_at), item)
            for request in running
            for place, item in enumerate(_missing(request))
            if not self._has(item)
        ]
        wanted = sorted(found, key=lambda each: each[0])
        if wanted and wanted[0][0][0] == 0:
            return wanted[0][1]
        if not (wanted or waiting.num_with_media):
            return None
        pinned = self._pinned(running, waiting)
        room = self._max_bytes - sum(i.num_bytes for i in self._begun.values())
        room -= sum(e.item.num_bytes for key, e in self._kept.items() if key in pinned)
        for _, item in wanted:
            if item.num_bytes <= room:
                return item
        ahead: list[Item] = []

        def fits(request: Request) -> bool:
            missing = (i for i in request.media if i.end > request.num_foreseen)
            ahead[:] = [i for i in missing if not self._has(i)][:1]
            return bool(ahead) and ahead[0].num_bytes <= room

        request = waiting.first(fits)
        if request is None:
            return None
        request.is_encoded_ahead = True
        return ahead[0]

    def _has(self, item: Item) -> bool:
        return item.key in self._kept or item.key in self._begun

    @staticmethod
    def _pinned(running: list[Request], waiting: Backlog) -> set[int]:
        """The keys that live requests still need."""
        keys = {item.key for request in running for item in _missing(request)}
        if waiting.num_with_media:
            keys.update(i.key for r in waiting if r.is_encoded_ahead for i in r.media)
        return keys

    def take(self, done: Encoded, running: list[Request], waiting: Backlog) -> list[Request]:
        """Keep what was encoded. After a failure: the requests that it ends."""
        key = done.item.key
        del self._begun[key]
        self.seconds += done.seconds
        if isinstance(done.result, BaseException):
            ahead = [
                r for r in waiting if r.is_encoded_ahead and any(i.key == key for i in r.media)
            ]
            return [r for r in running if any(i.key == key for i in _missing(r))] + ahead
        self.num_encoded += 1
        self._kept[key] = done
        self.num_bytes += done.item.num_bytes
        self._drop(running, waiting)
        return []

    def _drop(self, running: list[Request], waiting: Backlog) -> None:
        if self.num_bytes <= self._max_bytes:
            return
        pinned = self._pinned(running, waiting)
        for key in [key for key in self._kept if key not in pinned]:
            self.num_bytes -= self._kept.pop(key).item.num_bytes
            if self.num_bytes <= self._max_bytes:
                break


def _missing(request: Request) -> Iterator[Item]:
    """The items that a running request has yet to compute, a half computed one included."""
    return (item for item in request.media if item.end > request.num_computed_tokens)
