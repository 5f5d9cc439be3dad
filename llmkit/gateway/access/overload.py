"""The bound on requests that wait, shared fairly, and what those beyond it are told.

Refusing is cheap: it looks at counts, never at bodies. Tornado loop only.

A caller alone may fill the queue. When it is full, a newcomer that would have less of it for its
weight than whoever has most takes that caller's places, and that caller's newest requests, which
would be served last, are refused in its stead.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

from llmkit.errors import QueueFullError
from llmkit.gateway.access import refusals
from llmkit.gateway.access.computing import DRAWING, GENERATING, HEARING, SPEAKING, VECTORS
from llmkit.gateway.access.places import Caller, Load, Place, Use, Work, is_over, slots_of
from llmkit.gateway.access.service_rate import ServiceRate
from llmkit.gateway.failures import ApiError
from llmkit.protocol.client import EngineClient

if TYPE_CHECKING:
    from llmkit.gateway.directory import EngineDirectory
    from llmkit.gateway.exchange import Exchange

__all__ = ["Overload"]

SETTLE_EVERY_S = 0.25
GONE = 499


class Overload:
    """Bounds the requests that compute: ``max_queue`` that wait, ``max_concurrent`` of a caller.

    None means no bound; both may be changed at any time. An identity's own
    ``allowance.concurrent`` goes before ``max_concurrent``. With ``reads_first`` a request is read
    even when the queue is full, unless its body is large (see ``early``): its answer may be a
    stored one. ``refused`` counts refusals by code.
    """

    def __init__(
        self,
        directory: EngineDirectory,
        *,
        max_queue: int | None = None,
        max_concurrent: int | None = None,
        reads_first: bool = False,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.max_queue, self.max_concurrent = max_queue, max_concurrent
        self._reads_first = reads_first
        self.rate = ServiceRate(now)
        self.refused: Counter[str] = Counter()
        self._now = now
        self._callers: dict[str, Caller] = {}
        self._load = load = Load(directory.clients)
        self._flying, self._coming = load.flying, load.coming
        self._readers: dict[Work, list[Place]] = {}  # who waits for a work, its payer first
        self._settled_at = now()

    @contextlib.contextmanager
    def stage(self, exchange: Exchange) -> Iterator[None]:
        """A stage round the routes that compute. Raises `ApiError`."""
        use = _use(exchange)
        if use is None:
            yield
            return
        place = self._enter(exchange, use)
        try:
            yield
        except asyncio.CancelledError:
            task = place.task
            if exchange.record.is_displaced and task is not None and task.uncancel() <= 0:
                exchange.record.forget_unfinished()
                refusal = refusals.displaced(self.retry_after(exchange))
                raise self._say(exchange, refusal) from None
            raise
        except QueueFullError as error:
            refusal = refusals.queue_full(str(error), self.retry_after(exchange))
            raise self._say(exchange, refusal) from error
        finally:
            self._leave(place)

    def early(self, exchange: Exchange) -> ApiError | None:
        """Why a request need not be read; None if it may come in. Takes no place.

        Asked before a large body is read, so it also refuses one whose answer is stored, or that is
        for a model with free slots while requests for another fill the queue.
        """
        use = _use(exchange)
        if use is None:
            return None
        refusal = self._too_many(exchange) or self._no_place(exchange, use)
        return refusal and self._say(exchange, refusal)

    def admit(self, exchange: Exchange, engine: EngineClient, count: int) -> None:
        """A request goes to an engine, for so many answers more; for none if all are there.

        Raises `ApiError`.
        """
        place = self._place(exchange)
        if place is None:
            return
        if place.engine is None:
            self._coming[place.use] -= 1
            place.engine, place.count = engine, 0
        if not count:
            return
        late = self._late(exchange, engine)
        if late is not None and self._settle():
            late = self._late(exchange, engine)
        if late is not None:
            raise self._say(exchange, late)
        if self._lacks(engine, count) and (not self._settle() or self._lacks(engine, count)):
            most = self.max_queue
            self._make_way(exchange, count, lambda load: load.has_room(engine, count, most))
        place.reserved += count
        self._load.owe(place, count)
        self._note()

    def submitted(self, exchange: Exchange, works: Iterable[Work]) -> None:
        """What is computed for an admitted request, for it alone or for others too."""
        place = self._place(exchange)
        if place is None or place.engine is None:
            return
        self._load.owe(place, -place.reserved)
        place.reserved = 0
        for work in works:
            if is_over(work) or work in place.works:
                continue
            readers = self._readers.setdefault(work, [])
            readers.append(place)
            place.works.append(work)
            if len(readers) == 1:
                self._load.owe(place, 1)
        self._note()

    @property
    def num_waiting(self) -> int:
        """Answers beyond what engines compute at once, and requests on their way to none free."""
        return self._load.num_waiting

    def retry_after(self, exchange: Exchange) -> int:
        """Seconds after which a request of this caller would be served, within bounds."""
        return self.rate.retry_after(self._ahead(exchange), self._at_once)

    @property
    def _at_once(self) -> int:
        """Requests that are served at once."""
        busy = [slots_of(engine) for engine, count in self._flying.items() if count > 0]
        return sum(busy) or 1

    def _is_full(self, use: Use) -> bool:
        """Whether a newcomer finds no place, after what has ended is taken off."""
        most = self.max_queue
        if self._load.has_place(use, most):
            return False
        return not (self._settle() and self._load.has_place(use, most))

    def _no_place(self, exchange: Exchange, use: Use) -> ApiError | None:
        """Why a newcomer is refused, whom nobody would make way for; `admit` has them do it."""
        if not self._is_full(use):
            return None
        victims = self._victims(exchange, 1, lambda load: load.has_place(use, self.max_queue))
        return self._busy(exchange) if victims is None else None

    def _lacks(self, engine: EngineClient, count: int) -> bool:
        """Whether so many more are too many; who is alone may wait for all of its own."""
        has_room = self._load.has_room(engine, count, self.max_queue)
        return not has_room and self._load.num_waiting > 0

    def _enter(self, exchange: Exchange, use: Use) -> Place:
        refusal = self._too_many(exchange)
        if refusal is None and not self._reads_first:
            refusal = self._no_place(exchange, use)
        if refusal is not None:
            raise self._say(exchange, refusal)
        who = exchange.counted_as
        place = Place(exchange, who, use, asyncio.current_task(), self._now())
        caller = self._callers.setdefault(who, Caller(1.0))
        caller.weight = exchange.identity.allowance.weight
        caller.places[id(exchange)] = place
        self._coming[use] += 1
        self._note()
        return place

    def _leave(self, place: Place) -> None:
        caller = self._callers.get(place.who)
        if caller is None or caller.places.get(id(place.exchange)) is not place:
            return
        del caller.places[id(place.exchange)]
        if not caller.places:
            del self._callers[place.who]
        if place.engine is None:
            self._coming[place.use] -= 1
        else:
            count = place.count
            self._release(place)
            record = place.exchange.record
            is_served = not record.is_displaced and (record.status < 400 or record.status == GONE)
            if count and is_served:
                self.rate.served(self._now() - place.entered_at)
        self._note()

    def _release(self, place: Place) -> None:
        """A place owes and waits no longer; what others wait for as well is theirs from now on."""
        self._load.owe(place, -place.reserved)
        place.reserved = 0
        for work in place.works:
            readers = self._readers[work]
            was_first = readers[0] is place
            readers.remove(place)
            if was_first:
                self._load.owe(place, -1)
            if was_first and readers:
                self._load.owe(readers[0], 1)
            if not readers:
                del self._readers[work]
        place.works.clear()

    def _settle(self) -> bool:
        """Take off what engines have finished: who reads slowly fills no queue. Whether there was
        anything."""
        self._settled_at = self._now()
        over = [work for work in self._readers if is_over(work)]
        for work in over:
            readers = self._readers.pop(work)
            for place in readers:
                place.works.remove(work)
            self._load.owe(readers[0], -1)
            if not readers[0].count:
                self.rate.served(self._now() - readers[0].entered_at)
        self.rate.waits(self._load.num_queued > 0)
        return bool(over)

    def _note(self) -> None:
        if self._now() - self._settled_at >= SETTLE_EVERY_S:
            self._settle()
        else:
            self.rate.waits(self._load.num_queued > 0)

    def _place(self, exchange: Exchange) -> Place | None:
        caller = self._callers.get(exchange.counted_as)
        return None if caller is None else caller.places.get(id(exchange))

    def _make_way(self, exchange: Exchange, count: int, fits: Callable[[Load], bool]) -> None:
        """Refuse others so that ``count`` answers fit, or else this request, with `ApiError`."""
        victims = self._victims(exchange, count, fits)
        if victims is None:
            raise self._say(exchange, self._busy(exchange))
        for victim in victims:
            victim.exchange.record.is_displaced = True
            self._leave(victim)
            if victim.task is not None:
                victim.task.cancel()

    def _victims(
        self, exchange: Exchange, count: int, fits: Callable[[Load], bool]
    ) -> list[Place] | None:
        """The newest requests, not answered yet, of whoever has most for its weight, as long as
        that is more than this caller would have; None if too few of them make it fit."""
        load = self._load
        mine = self._callers.get(exchange.counted_as)
        own = (0 if mine is None else mine.count) + count
        share = own / exchange.identity.allowance.weight
        counts = {c: c.count for c in self._callers.values() if c is not mine and c.share > share}
        newest = {caller: reversed(caller.places.values()) for caller in counts}
        victims: list[Place] = []
        while not fits(load):
            caller = max(counts, key=lambda c: counts[c] / c.weight, default=None)
            if caller is None or counts[caller] / caller.weight <= share:
                return None
            place = next(newest[caller], None)
            if place is None:
                del counts[caller]
            elif place not in victims and (group := self._together(place)):
                rest = load.without(group)
                if rest.num_waiting < load.num_waiting:
                    load = rest
                    counts[caller] -= sum(each.count for each in group)
                    victims += group
        return victims

    def _together(self, place: Place) -> list[Place]:
        """The place and all that wait for the same works; none if one of them is answered already,
        is another caller's, or they owe nothing."""
        group = [place]
        for each in group:
            if each.exchange.record.first_token_at is not None or each.who != place.who:
                return []
            for work in each.works:
                group += [reader for reader in self._readers[work] if reader not in group]
        return group if any(each.count for each in group) else []

    def _ahead(self, exchange: Exchange) -> int:
        """Requests that would be served before one more of this caller: of each other caller no
        more than its own, by weight."""
        who, weight = exchange.counted_as, exchange.identity.allowance.weight
        mine = self._callers.get(who)
        own = mine.count if mine is not None else 0
        others = sum(
            min(float(caller.count), (own + 1) * caller.weight / weight)
            for name, caller in self._callers.items()
            if name != who
        )
        return min(self.num_waiting, round(own + others)) + 1

    def _late(self, exchange: Exchange, engine: EngineClient) -> ApiError | None:
        """Why a request is refused that cannot begin in its time."""
        deadline = exchange.record.deadline
        left = None if deadline is None else deadline.left
        if left is None or self._flying[engine] < slots_of(engine):
            return None
        wait = self.rate.wait_s(self._ahead(exchange), self._at_once)
        return None if wait is None or wait <= left else refusals.late(wait, left)

    def _too_many(self, exchange: Exchange) -> ApiError | None:
        own = exchange.identity.allowance.concurrent
        most = self.max_concurrent if own is None else own
        caller = self._callers.get(exchange.counted_as)
        if most is None or caller is None or len(caller.places) < most:
            return None
        return refusals.too_many(most, self.rate.duration_s or 2.0)

    def _busy(self, exchange: Exchange) -> ApiError:
        retry = self.retry_after(exchange)
        return refusals.server_busy(self.num_waiting, self.max_queue, retry)

    def _say(self, exchange: Exchange, refusal: ApiError) -> ApiError:
        """Count a refusal, and record it: the request may have ended as cancelled before."""
        self.refused[refusal.code or ""] += 1
        exchange.record.status, exchange.record.error = refusal.status, refusal.code or ""
        return refusal


def _use(exchange: Exchange) -> Use | None:
    """What a request computes; None for all that only looks."""
    if exchange.method != "POST":
        return None
    if exchange.route in GENERATING:
        return "generate"
    if exchange.route in HEARING | SPEAKING:
        return "hear" if exchange.route in HEARING else "speak"
    if exchange.route in DRAWING:
        return "draw"
    return "embed" if exchange.route in VECTORS else None
