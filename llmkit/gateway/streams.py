"""Engine streams on the gateway's loop: the updates of many, merged into one sequence.

Tornado loop only, but for `Bell.ring`, which any thread may call. Knows no HTTP and no dialect.
"""

from __future__ import annotations

import asyncio
import weakref
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from typing import ClassVar

from llmkit.errors import (
    DrainingError,
    EngineGoneError,
    InvalidRequestError,
    ModelBusyError,
    ModelUnloadedError,
    QueueFullError,
)
from llmkit.gateway import record, rules
from llmkit.protocol import Completion, Delta, FinishReason, GenerationRequest
from llmkit.protocol.client import EngineClient
from llmkit.protocol.stream import Stream

__all__ = ["NEVER_BEGUN", "StreamUpdate", "close_all", "gather", "merge", "submit_all"]

PING_S = 15.0
# How engines refuse requests, which then cost nothing.
NEVER_BEGUN = (
    InvalidRequestError,
    QueueFullError,
    DrainingError,
    ModelBusyError,
    ModelUnloadedError,
)
StreamUpdate = tuple[int, list[Delta], Completion | None]  # the index of the stream first


class Bell:
    """Wakes a loop from other threads, once for many events: each wake-up costs a system call."""

    _bells: ClassVar[weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Bell]] = (
        weakref.WeakKeyDictionary()
    )

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = weakref.ref(loop)
        self._events: deque[asyncio.Event] = deque()
        self._rung = False

    @classmethod
    def of(cls, loop: asyncio.AbstractEventLoop) -> Bell:
        return cls._bells.setdefault(loop, cls(loop))

    def ring(self, event: asyncio.Event) -> None:
        """Have ``event`` set on the loop's thread."""
        self._events.append(event)
        loop = self._loop()
        if not self._rung and loop is not None and not loop.is_closed():
            # Before the call: it finds whatever is appended from now on, or that rings again.
            self._rung = True
            loop.call_soon_threadsafe(self._set_all)

    def _set_all(self) -> None:
        self._rung = False
        while self._events:
            self._events.popleft().set()


def submit_all(engine: EngineClient, requests: list[GenerationRequest]) -> list[Stream]:
    """Submit all requests within the gateway's rules, or none if one is refused."""
    streams: list[Stream] = []
    visit = rules.current()
    try:
        if visit is not None:
            requests = visit.checked(engine, requests)
            streams = visit.submit(engine, requests)
        else:
            for request in requests:
                streams += rules.submitted(engine, request)
    except BaseException:
        close_all(streams)
        raise
    if (kept := record.current()) is not None:
        kept.begin(engine, requests, [stream.request_id for stream in streams])
    return streams


def close_all(streams: list[Stream]) -> None:
    for stream in streams:
        stream.close()


async def gather(streams: list[Stream], on_wait: Callable[[], None]) -> list[Completion]:
    """The completions of all streams, in order. Raises the first failure at once."""
    done: dict[int, Completion] = {}
    async for update in merge(streams):
        if update is None:
            on_wait()
            continue
        index, _, completion = update
        if completion is not None:
            done[index] = completion
    return [done[i] for i in range(len(streams))]


async def merge(streams: list[Stream]) -> AsyncIterator[StreamUpdate | None]:
    """The updates of all streams as they come; None after 15 s of silence.

    Raises the error of a failed stream, and `DeadlineError` when the request's time is over.
    """
    loop, arrived = asyncio.get_running_loop(), asyncio.Event()
    bell = Bell.of(loop)
    last_update = loop.time()
    timer: asyncio.TimerHandle | None = None

    def watch_silence() -> None:
        """One timer for all: a timeout around every wait would cost more than the wait."""
        nonlocal timer
        # A consumer that is held up gets one ping per interval too, not a flood of them.
        silent = loop.time() - last_update
        timer = loop.call_later(
            PING_S - silent if silent < PING_S - 0.01 else PING_S, watch_silence
        )
        arrived.set()

    timer = loop.call_later(PING_S, watch_silence)
    for stream in streams:
        stream.listen(lambda: bell.ring(arrived))
    waiting = dict(enumerate(streams))
    kept, counts = record.current(), [0] * len(streams)
    deadline = None if kept is None else kept.deadline
    at = None if deadline is None else deadline.at
    end = None if at is None else loop.call_at(at, arrived.set)
    try:
        while waiting:
            await arrived.wait()
            arrived.clear()
            if loop.time() - last_update >= PING_S:
                last_update = loop.time()
                yield None
            for update in _take(waiting):
                last_update = loop.time()
                if kept is not None:
                    index, deltas, completion = update
                    new = sum([delta.num_tokens for delta in deltas])
                    counts[index] += new
                    kept.progress(completion, new if completion is None else new - counts[index])
                    if completion is not None:
                        kept.unfinished.pop(streams[index].request_id, None)
                yield update
            if waiting and kept is not None and deadline is not None and deadline.is_over:
                raise deadline.error(kept)
    finally:
        timer.cancel()
        if end is not None:
            end.cancel()
        if kept is not None:
            for index, stream in enumerate(streams):
                if not counts[index] and isinstance(stream.failure, NEVER_BEGUN):
                    kept.unfinished.pop(stream.request_id, None)


def _take(waiting: dict[int, Stream]) -> Iterator[StreamUpdate]:
    """What the waiting streams have; removes the finished ones. Raises a failed stream's error."""
    for index, stream in list(waiting.items()):
        deltas, completion = stream.take()
        if completion is not None:
            del waiting[index]
            if completion.finish_reason in (FinishReason.ERROR, FinishReason.ABORT):
                raise stream.failure or EngineGoneError("the request was aborted in the kernel")
        if deltas or completion is not None:
            yield index, deltas, completion
