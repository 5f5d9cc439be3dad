"""Engine streams on the gateway's loop: news of many as one sequence. Tornado loop only."""

from __future__ import annotations

import asyncio
import weakref
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from typing import ClassVar

from llmkit.client import EngineClient
from llmkit.errors import EngineGoneError
from llmkit.stream import Stream
from llmkit.types import Completion, Delta, FinishReason, GenerationRequest

__all__ = ["News", "close_all", "gather", "merge", "submit_all"]

PING_S = 15.0
News = tuple[int, list[Delta], Completion | None]


class Bell:
    """Wakes a loop from other threads: a step of the engine has news of many streams, and waking the loop costs a system call."""

    _bells: ClassVar[weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Bell]] = weakref.WeakKeyDictionary()

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = weakref.ref(loop)
        self._events: deque[asyncio.Event] = deque()
        self._rung = False

    @classmethod
    def of(cls, loop: asyncio.AbstractEventLoop) -> Bell:
        return cls._bells.setdefault(loop, cls(loop))

    def ring(self, event: asyncio.Event) -> None:
        """Set ``event`` on the loop's thread, soon."""
        self._events.append(event)
        loop = self._loop()
        if not self._rung and loop is not None and not loop.is_closed():
            self._rung = True  # before the call: what is appended from now on is found by it, or rings anew
            loop.call_soon_threadsafe(self._set_all)

    def _set_all(self) -> None:
        self._rung = False
        while self._events:
            self._events.popleft().set()


def submit_all(engine: EngineClient, requests: list[GenerationRequest]) -> list[Stream]:
    """All or none."""
    streams: list[Stream] = []
    try:
        for request in requests:
            streams += [engine.submit(request)] if request.n == 1 else engine.submit_choices(request)
    except BaseException:
        close_all(streams)
        raise
    return streams


def close_all(streams: list[Stream]) -> None:
    for stream in streams:
        stream.close()


async def gather(streams: list[Stream], on_wait: Callable[[], None]) -> list[Completion]:
    """The completions of all streams, in order. The first failure is raised at once."""
    done: dict[int, Completion] = {}
    async for event in merge(streams):
        if event is None:
            on_wait()
        elif event[2] is not None:
            done[event[0]] = event[2]
    return [done[i] for i in range(len(streams))]


async def merge(streams: list[Stream]) -> AsyncIterator[News | None]:
    """News of any stream as it comes; None after 15 s of silence. A failed stream's error is raised."""
    loop, arrived = asyncio.get_running_loop(), asyncio.Event()
    bell = Bell.of(loop)
    last_news = loop.time()
    timer: asyncio.TimerHandle | None = None

    def watch_silence() -> None:
        """One timer for the whole stream; a timeout around every wait would cost more than the wait."""
        nonlocal timer
        # A reader that is held up is told once in a while, too, not all the time.
        silent = loop.time() - last_news
        timer = loop.call_later(PING_S - silent if silent < PING_S - 0.01 else PING_S, watch_silence)
        arrived.set()

    timer = loop.call_later(PING_S, watch_silence)
    for stream in streams:
        stream.listen(lambda: bell.ring(arrived))
    waiting = dict(enumerate(streams))
    try:
        while waiting:
            await arrived.wait()
            arrived.clear()
            if loop.time() - last_news >= PING_S:
                last_news = loop.time()
                yield None
            for event in take_news(waiting):
                last_news = loop.time()
                yield event
    finally:
        timer.cancel()


def take_news(waiting: dict[int, Stream]) -> Iterator[News]:
    """What the waiting streams have; ended ones are taken out. A failed stream's error is raised."""
    for index, stream in list(waiting.items()):
        deltas, completion = stream.take()
        if completion is not None:
            del waiting[index]
            if completion.finish_reason in (FinishReason.ERROR, FinishReason.ABORT):
                raise stream.failure or EngineGoneError("the request was aborted in the kernel")
        if deltas or completion is not None:
            yield index, deltas, completion
