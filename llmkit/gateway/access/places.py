"""Who has a place in the queue, and what engines owe. Tornado loop only.

Only counts; `llmkit.gateway.access.overload` decides by them.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from llmkit.protocol.client import EngineClient
from llmkit.protocol.description import Use
from llmkit.protocol.stream import Channel

if TYPE_CHECKING:
    from llmkit.gateway.exchange import Exchange

__all__ = ["Caller", "Load", "Place", "Use", "Work", "is_over", "slots_of"]

Work = Channel | Future[Any]  # what an engine computes: an answer, or vectors


@dataclass(slots=True, eq=False)
class Place:
    """A request's place: it is on its way until it has an ``engine``, for ``count`` answers.

    Of these ``reserved`` are admitted and not submitted yet. ``works`` are computed for it and have
    not ended; one that several places wait for is counted for the first of them.
    """

    exchange: Exchange
    who: str
    use: Use
    task: asyncio.Task[object] | None
    entered_at: float
    count: int = 1
    reserved: int = 0
    works: list[Work] = field(default_factory=list)
    engine: EngineClient | None = None


@dataclass(slots=True, eq=False)
class Caller:
    """The places of one caller, oldest first."""

    weight: float
    places: dict[int, Place] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """Answers that it waits for."""
        return sum(place.count for place in self.places.values())

    @property
    def share(self) -> float:
        return self.count / self.weight


class Load:
    """Answers that engines owe (``flying``), and requests on their way to one (``coming``)."""

    def __init__(self, engines: Callable[[], list[EngineClient]]) -> None:
        self._engines = engines
        self.flying: Counter[EngineClient] = Counter()
        self.coming: Counter[Use] = Counter()

    def without(self, places: Iterable[Place]) -> Load:
        """A copy, as it would be if these had left."""
        rest = Load(self._engines)
        rest.flying, rest.coming = self.flying.copy(), self.coming.copy()
        for place in places:
            if place.engine is None:
                rest.coming[place.use] -= 1
            else:
                rest.flying[place.engine] -= place.count
        return rest

    def owe(self, place: Place, more: int) -> None:
        """Its engine owes a place so many answers more."""
        assert place.engine is not None
        place.count += more
        self.flying[place.engine] += more
        if not self.flying[place.engine]:
            del self.flying[place.engine]

    @property
    def num_queued(self) -> int:
        """Answers beyond what their engines compute at once."""
        return sum(max(0, count - slots_of(engine)) for engine, count in self.flying.items())

    @property
    def num_waiting(self) -> int:
        """These, and requests on their way to no free engine."""
        return self.num_queued + sum(
            max(0, number - self._free(use)) for use, number in self.coming.items() if number
        )

    def has_place(self, use: Use, most: int | None) -> bool:
        """Whether one more may be on its way when ``most`` may wait."""
        if most is None or self.num_queued + self.coming.total() < most or self.num_waiting < most:
            return True
        return self._free(use) > self.coming[use]

    def has_room(self, engine: EngineClient, count: int, most: int | None) -> bool:
        """Whether an engine may owe so many more when ``most`` may wait."""
        beyond = self.flying[engine] - slots_of(engine)
        more = max(0, beyond + count) - max(0, beyond)
        return most is None or not more or self.num_waiting + more <= most

    def _free(self, use: Use) -> int:
        """Answers that could be begun at once."""
        return sum(
            max(0, slots_of(engine) - self.flying[engine])
            for engine in self._engines()
            if _fits(engine, use)
        )


def is_over(work: Work) -> bool:
    """Whether the engine has finished it, read or not."""
    return work.finished if isinstance(work, Channel) else work.done()


def slots_of(engine: EngineClient) -> int:
    """Requests that an engine computes at once."""
    return engine.stats().num_slots or engine.description.n_slots or 1


def _fits(engine: EngineClient, use: Use) -> bool:
    return engine.description.use == use
