"""Which images and sounds are encoded next, and how long what became of them is kept. Engine thread
only, but for the encoder's own.

An encoder works beside the decodes, on a CPU for seconds. It is given two items at a time, so that
priorities and aborts count until then. Among running requests the most urgent goes first, then the
caller that has had the least for its weight, then the next item of each before their later ones;
requests that wait come last. What is encoded comes in and goes out between steps, so no step misses
what its plan was made with.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from llmkit.engine.backlog import MAX_CALLERS, Backlog
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
        # With their bytes, least recently used first; without their items, which hold files.
        self._kept: OrderedDict[int, tuple[object, int]] = OrderedDict()
        self._begun: dict[int, tuple[Item, Request]] = {}  # with the encoder, and for whom
        self._shares = Shares()
        self.num_bytes = 0
        self.num_encoded = 0
        self.seconds = 0.0

    @property
    def is_busy(self) -> bool:
        """Whether something is with the encoder."""
        return bool(self._begun)

    def blocks(self, request: Request) -> bool:
        """Whether the request waits for its next item to be encoded."""
        return (item := request.item) is not None and item.key not in self._kept

    def of(self, item: Item | None) -> object | None:
        """What chunks of ``item`` carry."""
        if item is None:
            return None
        self._kept.move_to_end(item.key)
        return self._kept[item.key][0]

    def advance(self, running: list[Request], waiting: Backlog) -> None:
        """Give the encoder what is to be encoded next, if it has room, and drop what nobody needs
        any more beyond the bound."""
        if self._encoder is None:
            return
        self._drop(running, waiting)
        while len(self._begun) < DEPTH and (found := self._next(running, waiting)) is not None:
            item, request = found
            self._begun[item.key] = found
            self._shares.charge(request, item.n_tokens)
            self._encoder.encode(item, self._on_done)

    def _next(self, running: list[Request], waiting: Backlog) -> tuple[Item, Request] | None:
        """An item, and the request that it is for."""
        wanted = [
            (place, request, item)
            for request in running
            for place, item in enumerate(_missing(request))
            if not self._has(item)
        ]
        if not (wanted or waiting.num_with_media):
            return None
        self._shares.enter({(request.priority, request.caller) for _, request, _ in wanted})
        wanted.sort(key=lambda w: (w[1].priority, self._shares.of(w[1]), w[0], w[1].arrived_at))
        if wanted and wanted[0][0] == 0:
            return wanted[0][2], wanted[0][1]
        pinned = self._pinned(running, waiting)
        room = self._max_bytes - sum(item.num_bytes for item, _ in self._begun.values())
        room -= sum(size for key, (_, size) in self._kept.items() if key in pinned)
        for place, request, item in wanted:
            if place == 0 or item.num_bytes <= room:
                return item, request
        ahead: list[Item] = []

        def fits(request: Request) -> bool:
            missing = (i for i in request.media if i.end > request.num_foreseen)
            ahead[:] = [i for i in missing if not self._has(i)][:1]
            return bool(ahead) and ahead[0].num_bytes <= room

        early = waiting.first(fits)
        if early is None:
            return None
        early.is_encoded_ahead = True
        return ahead[0], early

    def _has(self, item: Item) -> bool:
        return item.key in self._kept or item.key in self._begun

    @staticmethod
    def _pinned(running: list[Request], waiting: Backlog) -> set[int]:
        """The keys that live requests still need."""
        keys = {item.key for request in running for item in _missing(request)}
        if waiting.num_with_media:
            keys.update(i.key for r in waiting if r.is_encoded_ahead for i in r.media)
        return keys

    def take(
        self, done: Encoded, running: list[Request], waiting: Backlog
    ) -> tuple[Request, list[Request]]:
        """Keep what was encoded. Returns for whom it was, and the requests that a failure ends."""
        key = done.item.key
        _, request = self._begun.pop(key)
        self.seconds += done.seconds
        if isinstance(done.result, BaseException):
            ahead = [
                r for r in waiting if r.is_encoded_ahead and any(i.key == key for i in r.media)
            ]
            return request, [r for r in running if any(i.key == key for i in _missing(r))] + ahead
        self.num_encoded += 1
        self._kept[key] = done.result, done.item.num_bytes
        self.num_bytes += done.item.num_bytes
        self._drop(running, waiting)
        return request, []

    def _drop(self, running: list[Request], waiting: Backlog) -> None:
        if self.num_bytes <= self._max_bytes:
            return
        pinned = self._pinned(running, waiting)
        for key in [key for key in self._kept if key not in pinned]:
            self.num_bytes -= self._kept.pop(key)[1]
            if self.num_bytes <= self._max_bytes:
                break


class Shares:
    """What each caller got of the encoder, in tokens for its weight, by priority: what was urgent
    does not count against what is not. As in `Backlog`, to be away earns no credit."""

    def __init__(self) -> None:
        self._had: dict[tuple[int, str], float] = {}
        self._present: set[tuple[int, str]] = set()

    def enter(self, present: set[tuple[int, str]]) -> None:
        """These want something now, and no others do."""
        if not present & self._present:
            self._had.clear()
        elif len(self._had) > MAX_CALLERS:
            self._had = {key: had for key, had in self._had.items() if key in self._present}
        for priority, caller in present - self._present:
            at_work = [self._had[key] for key in present & self._present if key[0] == priority]
            key = priority, caller
            self._had[key] = max(self._had.get(key, 0.0), min(at_work, default=0.0))
        self._present = present

    def charge(self, request: Request, num_tokens: int) -> None:
        key = request.priority, request.caller
        self._had[key] = self._had.get(key, 0.0) + num_tokens / request.weight

    def of(self, request: Request) -> float:
        return self._had.get((request.priority, request.caller), 0.0)


def _missing(request: Request) -> Iterator[Item]:
    """The items that a running request has yet to compute, a half computed one included."""
    return (item for item in request.media if item.end > request.num_computed_tokens)
