"""The bound on requests that wait, shared fairly, and what those beyond it are told.

Refusing is cheap: it looks at counts, never at bodies. Tornado loop only.

A caller alone may fill the queue. When it is full, a newcomer that has less of it for its weight
than whoever has most takes one of that caller's places, and that caller's newest request, which
would be served last, is refused in its stead.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from llmkit.errors import QueueFullError
from llmkit.gateway.access.proxies import place as place_of
from llmkit.gateway.access.service_rate import ServiceRate, clipped
from llmkit.gateway.failures import ApiError
from llmkit.protocol.client import EngineClient

if TYPE_CHECKING:
    from llmkit.gateway.directory import EngineDirectory
    from llmkit.gateway.exchange import Exchange

__all__ = ["GENERATING", "VECTORS", "Overload", "Place"]

Use = Literal["generate", "embed"]
GENERATING = frozenset(
    {
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/responses",
        "/v1/messages",
        "/api/chat",
        "/api/generate",
    }
)
VECTORS = frozenset({"/v1/embeddings", "/v1/rerank", "/api/embed", "/api/embeddings"})
GONE = 499


@dataclass(slots=True, eq=False)
class Place:
    """A request's place: it is on its way until it has an ``engine``, for ``count`` answers."""

    exchange: Exchange
    who: str
    use: Use
    task: asyncio.Task[object] | None
    entered_at: float
    count: int = 1
    engine: EngineClient | None = None
    is_displaced: bool = False


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


class Overload:
    """Bounds the requests that compute: ``max_queue`` that wait, ``max_concurrent`` of a caller.

    None means no bound; both may be changed at any time. An identity's own
    ``allowance.concurrent`` goes before ``max_concurrent``. With ``reads_first`` a request is read
    even when the queue is full: its answer may be a stored one. ``refused`` counts refusals by
    code.
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
        self._directory, self._now = directory, now
        self._callers: dict[str, Caller] = {}
        self._coming: Counter[Use] = Counter()  # requests on their way to an engine
        self._flying: Counter[EngineClient] = Counter()  # answers that engines owe

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
            if place.is_displaced and task is not None and task.uncancel() <= 0:
                raise self._say(exchange, self._displaced(exchange)) from None
            raise
        except QueueFullError as error:
            raise self._queue_full(exchange, str(error)) from error
        finally:
            self._leave(place)

    def early(self, exchange: Exchange) -> ApiError | None:
        """Why a request need not be read; None if it may come in. Takes no place."""
        use = _use(exchange)
        if use is None:
            return None
        refusal = self._too_many(exchange)
        if refusal is None and self._is_full(use) and self._fullest(exchange) is None:
            refusal = self._busy(exchange)
        return refusal and self._say(exchange, refusal)

    def admit(self, exchange: Exchange, engine: EngineClient, count: int) -> None:
        """A request goes to an engine, for so many answers more. Raises `ApiError`."""
        caller = self._callers.get(_who(exchange))
        place = caller.places.get(id(exchange)) if caller is not None else None
        if place is None:
            return
        if place.engine is None:
            self._coming[place.use] -= 1
            place.engine, place.count = engine, 0
        slots, flying = _slots(engine), self._flying[engine]
        self._check_time(exchange, flying >= slots)
        more = max(0, flying + count - slots) - max(0, flying - slots)
        if more and self.max_queue is not None:
            waiting = self.num_waiting
            if waiting and waiting + more > self.max_queue:
                self._make_way(exchange)
        place.count += count
        self._flying[place.engine] += count
        self._note()

    @property
    def num_waiting(self) -> int:
        """Answers beyond what engines compute at once, and requests on their way to none free."""
        waiting = self._num_queued
        if any(self._coming.values()):
            engines = self._engines()
            for use, coming in self._coming.items():
                waiting += max(0, coming - self._free(use, engines))
        return waiting

    @property
    def _num_queued(self) -> int:
        """Answers beyond what their engines compute at once."""
        return sum(max(0, count - _slots(engine)) for engine, count in self._flying.items())

    def retry_after(self, exchange: Exchange) -> int:
        """Seconds after which a request of this caller would be served, within bounds."""
        return self.rate.retry_after(self._ahead(exchange), self._at_once)

    def _engines(self) -> list[EngineClient]:
        return [entry.client for entry in self._directory.entries()]

    def _free(self, use: Use, engines: list[EngineClient]) -> int:
        return sum(
            max(0, _slots(engine) - self._flying[engine])
            for engine in engines
            if _fits(engine, use)
        )

    @property
    def _at_once(self) -> int:
        """Requests that are served at once."""
        busy = [_slots(engine) for engine, count in self._flying.items() if count > 0]
        return sum(busy) or 1

    def _is_full(self, use: Use) -> bool:
        if self.max_queue is None or self._num_queued + self._coming.total() < self.max_queue:
            return False
        if self.num_waiting < self.max_queue:
            return False
        return self._free(use, self._engines()) <= self._coming[use]

    def _enter(self, exchange: Exchange, use: Use) -> Place:
        refusal = self._too_many(exchange)
        if refusal is not None:
            raise self._say(exchange, refusal)
        if self._is_full(use) and not self._reads_first:
            self._make_way(exchange)
        who = _who(exchange)
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
            self._flying[place.engine] -= place.count
            if not self._flying[place.engine]:
                del self._flying[place.engine]
            status = place.exchange.record.status
            if place.count and not place.is_displaced and (status < 400 or status == GONE):
                self.rate.served(self._now() - place.entered_at)
        self._note()

    def _note(self) -> None:
        self.rate.waits(any(n > _slots(engine) for engine, n in self._flying.items()))

    def _make_way(self, exchange: Exchange) -> None:
        """Refuse the newest request of whoever has most, or else this one, with `ApiError`."""
        victim = self._fullest(exchange)
        if victim is None:
            raise self._say(exchange, self._busy(exchange))
        victim.is_displaced = True
        self._leave(victim)
        if victim.task is not None:
            victim.task.cancel()

    def _fullest(self, exchange: Exchange) -> Place | None:
        """The newest request, not answered yet, of the caller with the most for its weight, if that
        is more than this caller would have."""
        mine = self._callers.get(_who(exchange))
        share = ((mine.count if mine is not None else 0) + 1) / exchange.identity.allowance.weight
        larger = [c for c in self._callers.values() if c is not mine and c.share > share]
        for caller in sorted(larger, key=lambda c: -c.share):
            for place in reversed(caller.places.values()):
                if place.exchange.record.first_token_at is None and place.count:
                    return place
        return None

    def _ahead(self, exchange: Exchange) -> int:
        """Requests that would be served before one more of this caller: of each other caller no
        more than its own, by weight."""
        who, weight = _who(exchange), exchange.identity.allowance.weight
        mine = self._callers.get(who)
        own = mine.count if mine is not None else 0
        others = sum(
            min(float(caller.count), (own + 1) * caller.weight / weight)
            for name, caller in self._callers.items()
            if name != who
        )
        return min(self.num_waiting, round(own + others)) + 1

    def _check_time(self, exchange: Exchange, is_busy: bool) -> None:
        """Refuse a request that cannot begin in its time."""
        deadline = exchange.record.deadline
        left = None if deadline is None else deadline.left
        if left is None or not is_busy:
            return
        wait = self.rate.wait_s(self._ahead(exchange), self._at_once)
        if wait is not None and wait > left:
            message = (
                f"This request would begin in about {clipped(wait)} s, and its time ends in "
                f"{left:.3g} s. Allow it more time, or send it later."
            )
            refusal = self._refusal(503, message, "cannot_begin_in_time", clipped(wait))
            raise self._say(exchange, refusal)

    def _too_many(self, exchange: Exchange) -> ApiError | None:
        own = exchange.identity.allowance.concurrent
        most = self.max_concurrent if own is None else own
        caller = self._callers.get(_who(exchange))
        if most is None or caller is None or len(caller.places) < most:
            return None
        retry = clipped((self.rate.duration_s or 2.0) / most)
        message = (
            f"{most} requests of this caller are running or waiting, which is as many as it may "
            f"have at once; send this one when one of them has ended, in about {retry} s."
        )
        return self._refusal(429, message, "too_many_concurrent_requests", retry)

    def _busy(self, exchange: Exchange) -> ApiError:
        retry = self.retry_after(exchange)
        message = (
            f"The server is busy: {self.num_waiting} requests are waiting, and at most "
            f"{self.max_queue} may. Try again in {retry} s."
        )
        return self._refusal(503, message, "server_busy", retry)

    def _displaced(self, exchange: Exchange) -> ApiError:
        retry = self.retry_after(exchange)
        message = (
            "The server is busy, and this caller has the most requests waiting: this one made way "
            f"for another caller's. Try again in {retry} s."
        )
        return self._refusal(503, message, "server_busy", retry)

    def _queue_full(self, exchange: Exchange, message: str) -> ApiError:
        """The engine's own refusal, in whatever dialect."""
        retry = self.retry_after(exchange)
        refusal = self._refusal(429, f"{message} (in {retry} s).", "queue_full", retry)
        return self._say(exchange, refusal)

    @staticmethod
    def _refusal(status: int, message: str, code: str, retry: int) -> ApiError:
        kind = "rate_limit_error" if status == 429 else "server_error"
        return ApiError(status, message, kind, code=code, headers={"Retry-After": str(retry)})

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
    return "embed" if exchange.route in VECTORS else None


def _who(exchange: Exchange) -> str:
    """Who is counted: the identity; without a key, the address."""
    identity = exchange.identity
    return identity.name if identity.kind != "local" else f"address {place_of(exchange.address)}"


def _slots(engine: EngineClient) -> int:
    """Requests that an engine computes at once."""
    return engine.stats().num_slots or engine.description.n_slots or 1


def _fits(engine: EngineClient, use: Use) -> bool:
    model = engine.description
    return bool(model.embedding_size or model.ranks) == (use == "embed")
