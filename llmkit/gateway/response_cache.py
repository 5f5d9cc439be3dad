"""Answers that are given again to the same request, and requests that share one computation.

Stored is what is meant to come out the same each time: greedy answers (``temperature`` 0), those
with a ``seed``, and vectors. An engine that is not ``deterministic`` may round differently beside
other requests, so that a second computation could differ after some tokens; the stored answer never
does. Errors and aborted answers are not stored. Any thread.
"""

from __future__ import annotations

import hashlib
import sys
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

from llmkit.bridge import wire
from llmkit.gateway.flights import Answer, Flight, VectorFlight, replay
from llmkit.protocol import EmbeddingRequest, Embeddings, GenerationRequest, TokenLogprob
from llmkit.protocol.client import EngineClient
from llmkit.protocol.stream import Stream

__all__ = ["ResponseCache"]

MAX_SHARE = 4  # an answer that takes a larger part of the cache is not stored
BASE_BYTES, DELTA_BYTES, TOKEN_BYTES, LOGPROB_BYTES = 3000, 270, 40, 300
# Not part of what is asked: whose it is, and how it goes.
# The digests of media are in the messages.
BESIDE = frozenset({"request_id", "caller", "priority", "weight", "cache_scope", "media"})
Key = tuple[str, bytes]  # whose it is, and a digest of all that matters
Place = tuple[Key, str, int]  # of a computation under way: its caller's, with its priority


@dataclass(slots=True)
class Kept:
    value: Answer | Embeddings
    size: int
    until: float
    engine: weakref.ref[EngineClient]
    model: str


class ResponseCache:
    """At most ``max_bytes`` of answers, none older than ``max_age_s``.

    Each caller has its own unless they are ``shared``. Computations under way are joined by their
    own caller only: they have its weight. When it is full, whoever has most in it loses what it
    used least recently. ``hits`` are requests answered by it (``joined`` of them by a computation
    under way), ``misses`` those that had to be computed.
    """

    def __init__(
        self,
        max_bytes: int,
        max_age_s: float,
        *,
        shared: bool = False,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_bytes, self._max_age_s = max_bytes, max_age_s
        self._shared, self._now = shared, now
        self.hits = self.misses = self.joined = 0
        self._lock = threading.RLock()  # the garbage collector may close a stream within
        self._kept: dict[str, OrderedDict[bytes, Kept]] = {}  # by owner, longest unused first
        self._sizes: dict[str, int] = {}  # by owner
        self._flights: dict[Place, Flight | VectorFlight] = {}
        self._serials: weakref.WeakKeyDictionary[EngineClient, int] = weakref.WeakKeyDictionary()
        self._num_engines = 0

    def __len__(self) -> int:
        with self._lock:
            return sum(len(kept) for kept in self._kept.values())

    @property
    def num_bytes(self) -> int:
        with self._lock:
            return sum(self._sizes.values())

    def key_of(
        self, engine: EngineClient, request: GenerationRequest | EmbeddingRequest
    ) -> Key | None:
        """What the answer depends on; None if it is not to be stored."""
        if isinstance(request, GenerationRequest) and not _is_reproducible(request):
            return None
        model = engine.description
        asked: dict[str, Any] = {
            "kind": type(request).__name__,
            "engine": (self._serial(engine), model.name, model.path, model.created),
            "request": {
                f.name: getattr(request, f.name)
                for f in fields(request)
                if f.name not in BESIDE and f.name != "sampling"
            },
        }
        if isinstance(request, GenerationRequest):
            asked["sampling"] = request.sampling.as_dict()
            if request.messages is not None:  # a chat template may say what day it is
                asked["day"] = time.strftime("%Y-%m-%d")
        try:
            digest = hashlib.sha256(wire.encode(asked)).digest()
        except (ValueError, TypeError, RecursionError):
            return None  # it cannot be sent either: the engine's client says why
        return "" if self._shared else request.caller, digest

    def has(self, key: Key, request: GenerationRequest | EmbeddingRequest) -> bool:
        """Whether nothing need be computed."""
        with self._lock:
            return self._find(key) is not None or _place(key, request) in self._flights

    def streams(
        self, key: Key, engine: EngineClient, request: GenerationRequest, *, fresh: bool = False
    ) -> tuple[list[Stream], bool]:
        """The streams of a request, and whether they were there.

        ``fresh``: compute it in any case. Raises what the engine raises.
        """
        with self._lock:
            found = None if fresh else self._find(key)
            if isinstance(found, tuple):
                self.hits += 1
                return replay(found, request), True
            place = _place(key, request)
            flight = None if fresh else self._flights.get(place)
            joined = flight.join(request) if isinstance(flight, Flight) else None
            if joined is not None:
                self.hits, self.joined = self.hits + 1, self.joined + 1
                return joined, True
            self.misses += 1
            own = [engine.submit(request)] if request.n == 1 else engine.submit_choices(request)
            flight = Flight(own, partial(self._ended, place, engine), self._lock)
            self._flights[place] = flight
            mine = flight.join(request, first=True)
            flight.start()
        assert mine is not None  # it was not over before it began
        return mine, False

    def embed(
        self, key: Key, engine: EngineClient, request: EmbeddingRequest, *, fresh: bool = False
    ) -> tuple[Future[Embeddings], bool]:
        """The vectors of a request, in the same way. The future may be cancelled."""
        with self._lock:
            found = None if fresh else self._find(key)
            if isinstance(found, Embeddings):
                self.hits += 1
                done: Future[Embeddings] = Future()
                done.set_result(found)
                return done, True
            place = _place(key, request)
            flight = None if fresh else self._flights.get(place)
            joined = flight.join() if isinstance(flight, VectorFlight) else None
            if joined is not None:
                self.hits, self.joined = self.hits + 1, self.joined + 1
                return joined, True
            self.misses += 1
            abort = partial(engine.abort, request.request_id)
            ended = partial(self._ended, place, engine)
            flight = VectorFlight(engine.embed(request), ended, self._lock, abort)
            self._flights[place] = flight
            mine = flight.join()
            flight.start()
        assert mine is not None
        return mine, False

    def clear(self, model: str | None = None) -> None:
        """Forget all answers, or those of a model."""
        with self._lock:
            self._drop(lambda kept: model is None or kept.model == model)

    def _serial(self, engine: EngineClient) -> int:
        """The number of a loaded model: one that is loaded again is another."""
        with self._lock:
            serial = self._serials.get(engine)
            if serial is None:
                self._num_engines += 1
                serial = self._serials[engine] = self._num_engines
                self._drop(_is_orphan)
            return serial

    def _find(self, key: Key) -> Answer | Embeddings | None:
        owner, digest = key
        own = self._kept.get(owner)
        kept = None if own is None else own.get(digest)
        if own is None or kept is None:
            return None
        if self._now() >= kept.until:
            self._remove(owner, digest)
            return None
        own.move_to_end(digest)
        return kept.value

    def _ended(
        self,
        place: Place,
        engine: EngineClient,
        flight: Flight | VectorFlight,
        result: Answer | Embeddings | None,
    ) -> None:
        """A computation is over; keep its result, unless a fresh one was begun since."""
        with self._lock:
            if self._flights.get(place) is not flight:
                return
            del self._flights[place]
            if result is None:
                return
            size = _size(result)
            if size > self._max_bytes // MAX_SHARE:
                return
            owner, digest = place[0]
            self._remove(owner, digest)
            until = self._now() + self._max_age_s
            model = engine.description.name
            kept = Kept(result, size, until, weakref.ref(engine), model)
            self._kept.setdefault(owner, OrderedDict())[digest] = kept
            self._sizes[owner] = self._sizes.get(owner, 0) + size
            while self.num_bytes > self._max_bytes:
                largest = max(self._sizes, key=lambda o: self._sizes[o])
                self._remove(largest, next(iter(self._kept[largest])))

    def _remove(self, owner: str, digest: bytes) -> None:
        own = self._kept.get(owner)
        kept = None if own is None else own.pop(digest, None)
        if own is None or kept is None:
            return
        self._sizes[owner] -= kept.size
        if not own:
            del self._kept[owner], self._sizes[owner]

    def _drop(self, which: Callable[[Kept], bool]) -> None:
        found = [(o, d) for o, own in self._kept.items() for d, kept in own.items() if which(kept)]
        for owner, digest in found:
            self._remove(owner, digest)


def _is_reproducible(request: GenerationRequest) -> bool:
    params = request.sampling
    return (params.greedy or params.seed is not None) and not request.keep_on_disk


def _place(key: Key, request: GenerationRequest | EmbeddingRequest) -> Place:
    priority = request.priority if isinstance(request, GenerationRequest) else 0
    return key, request.caller, priority


def _is_orphan(kept: Kept) -> bool:
    engine = kept.engine()
    return engine is None or engine.state.is_gone


def _size(value: Answer | Embeddings) -> int:
    """The memory that a result takes, about."""
    if isinstance(value, Embeddings):
        return BASE_BYTES + len(value.data) + TOKEN_BYTES * len(value.num_tokens)
    size = BASE_BYTES
    for deltas, completion in value:
        size += sys.getsizeof(completion.text) + TOKEN_BYTES * len(completion.tokens)
        size += _scored(completion.logprobs) + _scored(completion.prompt_logprobs)
        size += sum(DELTA_BYTES + sys.getsizeof(delta.text) for delta in deltas)
    return size


def _scored(logprobs: tuple[TokenLogprob, ...]) -> int:
    return sum(LOGPROB_BYTES * (1 + len(entry.top)) for entry in logprobs)
