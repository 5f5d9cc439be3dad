"""One computation for all who ask the same at the same time.

Readers run on the gateway's loop, engines bring news on their own threads. One reentrant lock, the
cache's, is over all flights: the garbage collector may close a stream of one within another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

from llmkit.protocol import (
    Completion,
    Delta,
    Embeddings,
    FinishReason,
    GenerationRequest,
    RequestMetrics,
)
from llmkit.protocol.stream import Channel, Stream

__all__ = ["Answer", "Flight", "VectorFlight", "computation", "replay"]

Lock = AbstractContextManager[Any]
Answer = tuple[tuple[tuple[Delta, ...], Completion], ...]  # of each choice: the deltas, the end


class Ended(Protocol):
    """Called once when a flight is over: with its result if it is worth keeping."""

    def __call__(
        self, flight: Flight | VectorFlight, result: Answer | Embeddings | None
    ) -> None: ...


def replay(answer: Answer, request: GenerationRequest) -> list[Stream]:
    """Streams that give a stored answer again, to another request."""
    streams = []
    for choice, (deltas, completion) in zip(request.choices(), answer, strict=True):
        channel = Channel(choice.request_id, lambda _: None)
        for delta in deltas:
            channel.push(delta)
        channel.finish(_again(completion, choice.request_id))
        streams.append(Stream(channel))
    return streams


class Reader(Channel):
    """What one of several reads; ``computed`` is the channel that the engine writes to."""

    __slots__ = ("computed",)

    def __init__(
        self, request_id: str, abort_request: Callable[[str], None], computed: Channel
    ) -> None:
        super().__init__(request_id, abort_request)
        self.computed = computed


class Waiter(Future[Embeddings]):
    """What one of several awaits; ``computed`` is the future that the engine ends."""

    def __init__(self, computed: Future[Embeddings]) -> None:
        super().__init__()
        self.computed = computed


def computation(answer: Stream | Future[Embeddings]) -> Channel | Future[Embeddings]:
    """The engine's work for an answer; one for all that share it."""
    given = answer.channel if isinstance(answer, Stream) else answer
    return given.computed if isinstance(given, Reader | Waiter) else given


def _again(completion: Completion, request_id: str) -> Completion:
    """The completion as another request's: its prompt came from the cache, and took no time."""
    usage = completion.usage
    return replace(
        completion,
        request_id=request_id,
        usage=replace(usage, cached_tokens=usage.prompt_tokens),
        metrics=RequestMetrics(
            prompt_tokens=usage.prompt_tokens,
            cached_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
        ),
    )


class Flight:
    """The streams of one request, read by several: each sees them from the beginning.

    When the last reader leaves, the request is aborted.
    """

    def __init__(self, streams: Sequence[Stream], on_end: Ended, lock: Lock) -> None:
        self._streams, self._on_end = list(streams), on_end
        self._lock = lock
        self._deltas: list[list[Delta]] = [[] for _ in streams]
        self._ends: list[tuple[Completion, Exception | None] | None] = [None] * len(streams)
        self._readers: list[dict[str, Channel]] = [{} for _ in streams]
        self._first: set[str] = set()  # the answers whose usage is the engine's own
        self._is_over = False

    def start(self) -> None:
        """Begin to take what the engine brings; after the first reader has joined."""
        for index, stream in enumerate(self._streams):
            stream.listen(partial(self._news, index))

    def join(self, request: GenerationRequest, *, first: bool = False) -> list[Stream] | None:
        """Streams for one more reader; None if the flight is over. The ``first`` reader's usage is
        the engine's own."""
        streams = []
        with self._lock:
            if self._is_over:
                return None
            for index, choice in enumerate(request.choices()):
                computed = self._streams[index].channel
                channel = Reader(choice.request_id, partial(self._leave, index), computed)
                for delta in self._deltas[index]:
                    channel.push(delta)
                end = self._ends[index]
                if end is None:
                    self._readers[index][choice.request_id] = channel
                else:
                    self._finish(channel, *end)
                if first:
                    self._first.add(choice.request_id)
                streams.append(Stream(channel))
        return streams

    def _news(self, index: int) -> None:
        with self._lock:
            deltas, completion = self._streams[index].take()
            if self._ends[index] is not None:
                return
            readers = list(self._readers[index].values())
            self._deltas[index] += deltas
            for reader in readers:
                for delta in deltas:
                    reader.push(delta)
            if completion is not None:
                end = completion, self._streams[index].failure
                self._ends[index] = end
                if self._ends_now():  # kept before anybody has read it: the next one finds it
                    self._on_end(self, self._result())
                for reader in readers:
                    self._finish(reader, *end)
                self._readers[index].clear()
        for reader in readers:
            reader.wake()

    def _ends_now(self) -> bool:
        """Whether the last choice has ended just now."""
        if self._is_over or None in self._ends:
            return False
        self._is_over = True
        return True

    def _finish(self, reader: Channel, completion: Completion, failure: Exception | None) -> None:
        is_own = failure is not None or reader.request_id in self._first
        reader.finish(completion if is_own else _again(completion, reader.request_id), failure)

    def _result(self) -> Answer | None:
        """The answer, unless a choice of it failed or was aborted."""
        parts = []
        for deltas, end in zip(self._deltas, self._ends, strict=True):
            if end is None or end[1] is not None:
                return None
            if end[0].finish_reason in (FinishReason.ERROR, FinishReason.ABORT):
                return None
            parts.append((_joined(deltas), end[0]))
        return tuple(parts)

    def _leave(self, index: int, request_id: str) -> None:
        """A reader has gone, for one of its choices."""
        with self._lock:
            reader = self._readers[index].pop(request_id, None)
            if reader is None:
                return
            deserted = not any(self._readers) and not self._is_over
            self._is_over = self._is_over or deserted
        reader.finish(
            Completion("".join(reader.text_parts), FinishReason.ABORT, request_id=request_id)
        )
        reader.wake()
        if deserted:
            for stream in self._streams:
                stream.close()
            self._on_end(self, None)


def _joined(deltas: Sequence[Delta]) -> tuple[Delta, ...]:
    """All deltas as one, which takes a fraction of the memory."""
    if len(deltas) < 2:
        return tuple(deltas)
    return (
        Delta(
            "".join(delta.text for delta in deltas),
            sum(delta.num_tokens for delta in deltas),
            tuple(entry for delta in deltas for entry in delta.logprobs),
        ),
    )


class VectorFlight:
    """The vectors of one request, awaited by several. ``abort`` ends the request."""

    def __init__(
        self,
        future: Future[Embeddings],
        on_end: Ended,
        lock: Lock,
        abort: Callable[[], None],
    ) -> None:
        self._future, self._on_end, self._abort = future, on_end, abort
        self._lock = lock
        self._waiters: set[Future[Embeddings]] = set()
        self._is_over = False

    def start(self) -> None:
        """Begin to wait for the engine; after the first waiter has joined."""
        self._future.add_done_callback(self._done)

    def join(self) -> Waiter | None:
        """A future for one more waiter, who may cancel it; None if the flight is over."""
        waiter = Waiter(self._future)
        with self._lock:
            if self._is_over:
                return None
            self._waiters.add(waiter)
        waiter.add_done_callback(self._leave)
        return waiter

    def _done(self, future: Future[Embeddings]) -> None:
        with self._lock:
            if self._is_over:
                return
            self._is_over = True
            waiters = list(self._waiters)
        error = future.exception() if not future.cancelled() else None
        result = None if future.cancelled() or error is not None else future.result()
        self._on_end(self, result)
        for waiter in waiters:
            if not waiter.set_running_or_notify_cancel():
                continue
            if result is not None:
                waiter.set_result(result)
            else:
                waiter.set_exception(error or RuntimeError("the request was cancelled"))

    def _leave(self, waiter: Future[Embeddings]) -> None:
        if not waiter.cancelled():
            return
        with self._lock:
            self._waiters.discard(waiter)
            deserted = not self._waiters and not self._is_over
            self._is_over = self._is_over or deserted
        if deserted:
            if not self._future.cancel():
                self._abort()
            self._on_end(self, None)
