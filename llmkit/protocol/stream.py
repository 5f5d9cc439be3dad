"""One stream of text for sync and async readers.

A `Channel` is the producer's end (engine or bridge thread); a `Stream` is the reader's. They are
separate objects so that the producer does not keep an abandoned `Stream` alive: when the reader
leaves (``break``, garbage collection), the request is aborted and its slot freed.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING

from llmkit.protocol import Completion, Delta, FinishReason, TokenLogprob

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Iterator

__all__ = ["Channel", "Stream"]

logger = logging.getLogger("llmkit")


class Channel:
    """The producer's end of a stream; any thread may write.

    ``push`` and ``finish`` only store; ``wake`` then notifies the reader. A producer with many
    channels stores first and wakes afterwards, so that a reader of many channels sees a whole
    step at once. None of them blocks. Without ``keeps_text`` the text is gone once it is read:
    images are large, and nobody wants them twice.
    """

    __slots__ = (
        "__weakref__",
        "_deltas",
        "_failure",
        "_keeps_text",
        "_listener",
        "_lock",
        "_result",
        "_wakers",
        "abort_request",
        "logprobs",
        "request_id",
        "text_parts",
    )

    def __init__(
        self, request_id: str, abort_request: Callable[[str], None], *, keeps_text: bool = True
    ) -> None:
        self._keeps_text = keeps_text
        self.request_id = request_id
        self.abort_request = abort_request
        self.text_parts: list[str] = []
        self.logprobs: list[TokenLogprob] = []
        self._listener: Callable[[], object] | None = None
        self._deltas: deque[Delta] = deque()
        self._result: Completion | None = None
        self._failure: Exception | None = None
        self._lock = threading.RLock()  # the garbage collector may close its stream within
        self._wakers: list[Callable[[], object]] = []

    def push(self, delta: Delta) -> None:
        """Store new text."""
        with self._lock:
            self._deltas.append(delta)
            if delta.text and self._keeps_text:
                self.text_parts.append(delta.text)
            self.logprobs.extend(delta.logprobs)

    def finish(self, result: Completion, failure: Exception | None = None) -> None:
        """Store the last event; later calls are ignored. ``failure`` is raised in the reader."""
        with self._lock:
            if self._result is None:
                self._result, self._failure = result, failure

    def fail(self, error: Exception) -> None:
        """Finish with an error, keeping the text so far."""
        self.finish(
            Completion(
                "".join(self.text_parts),
                FinishReason.ERROR,
                request_id=self.request_id,
                error=str(error),
            ),
            error,
        )

    def wake(self) -> None:
        """Notify the reader that something was stored."""
        with self._lock:
            wakers, self._wakers = self._wakers, []
            listener = self._listener
        for wake in wakers:
            with contextlib.suppress(RuntimeError):  # the reader's event loop is closed
                wake()
        if listener is not None:
            try:
                listener()
            except Exception:  # a failing reader must not end the engine's thread
                logger.exception("a stream listener failed")

    def listen(self, listener: Callable[[], object]) -> None:
        """Call ``listener`` at every ``wake``, on the producer's thread; once now if data waits.

        It must be quick and not raise.
        """
        with self._lock:
            self._listener = listener
            missed = bool(self._deltas) or self._result is not None
        if missed:
            listener()

    def take(self) -> tuple[list[Delta], Completion | None]:
        """All deltas since the last call, and the result once there is one."""
        with self._lock:
            deltas = list(self._deltas)
            self._deltas.clear()
            return deltas, self._result

    def wait(self, wake: Callable[[], object]) -> bool:
        """Have ``wake`` called once at the next event. False: something is there already."""
        with self._lock:
            if self._deltas or self._result is not None:
                return False
            self._wakers.append(wake)
            return True

    def wait_no_more(self, wake: Callable[[], object]) -> None:
        """Cancel `wait`."""
        with self._lock, contextlib.suppress(ValueError):
            self._wakers.remove(wake)

    @property
    def result(self) -> Completion | None:
        return self._result

    @property
    def failure(self) -> Exception | None:
        return self._failure

    @property
    def finished(self) -> bool:
        return self._result is not None


class Stream:
    """Text as it is generated: ``for piece in stream``, ``async for ...``, or ``stream.result()``.

    Leaving the loop early, ``close()`` or dropping the last reference aborts the request.
    ``result()`` returns the `Completion`; ``text`` is what has arrived so far. Not meant for two
    readers at once.

    Raises `EngineError` (or `EngineGoneError`) out of the loop if the engine failed.
    """

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    @property
    def request_id(self) -> str:
        return self._channel.request_id

    @property
    def channel(self) -> Channel:
        """The shared state; holding it does not keep the request alive."""
        return self._channel

    @property
    def text(self) -> str:
        """Everything received so far."""
        return "".join(self._channel.text_parts)

    @property
    def finished(self) -> bool:
        return self._channel.finished

    def close(self) -> None:
        """Abort the request if it is still running."""
        if not self._channel.finished:
            self._channel.abort_request(self._channel.request_id)

    def __del__(self) -> None:
        with contextlib.suppress(Exception):  # the interpreter may be shutting down
            self.close()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = self._channel.result.finish_reason.value if self._channel.result else "running"
        return f"<Stream {state}, {len(self.text)} characters>"

    def __iter__(self) -> Iterator[str]:
        return self._pieces()

    def _pieces(self) -> Generator[str, None, None]:
        try:
            while True:
                deltas, result = self._channel.take()
                for delta in deltas:
                    if delta.text:
                        yield delta.text
                if result is not None:
                    self._raise_failure()
                    return
                self._block(None)
        finally:
            self.close()

    def _block(self, timeout: float | None) -> None:
        event = threading.Event()
        wake = event.set
        if self._channel.wait(wake):
            try:
                event.wait(timeout)
            finally:
                self._channel.wait_no_more(wake)

    def _raise_failure(self) -> None:
        if self._channel.failure is not None:
            raise self._channel.failure

    def wait(self, timeout: float | None = None) -> Completion | None:
        """The completion, also of a failed request; None if ``timeout`` seconds pass first.

        Drops unread deltas.
        """
        end = None if timeout is None else time.monotonic() + timeout
        while self._channel.result is None:
            self._channel.take()
            left = None if end is None else end - time.monotonic()
            if left is not None and left <= 0:
                return None
            self._block(left)
        return self._channel.result

    def result(self, timeout: float | None = None) -> Completion:
        """Block until the request is finished.

        Raises `TimeoutError` after ``timeout`` seconds, and `EngineError` if the request failed.
        """
        completion = self.wait(timeout)
        if completion is None:
            raise TimeoutError(
                f"no result within {timeout} s; the request is still running (close() aborts it)"
            )
        self._raise_failure()
        return completion

    def __aiter__(self) -> AsyncPieces:
        return AsyncPieces(self)

    def __await__(self) -> Generator[object, None, Completion]:
        return self._result_async().__await__()

    async def _result_async(self) -> Completion:
        while True:
            _, result = await self.next_events()
            if result is not None:
                self._raise_failure()
                return result

    async def next_events(self) -> tuple[list[Delta], Completion | None]:
        """Wait for the deltas since the last call, and the completion once there is one.

        Cancellation aborts the request.
        """
        import asyncio  # heavy, and the caller has it

        while True:
            deltas, result = self._channel.take()
            if deltas or result is not None:
                return deltas, result
            loop = asyncio.get_running_loop()
            future: asyncio.Future[None] = loop.create_future()

            def wake(
                future: asyncio.Future[None] = future, loop: asyncio.AbstractEventLoop = loop
            ) -> None:
                loop.call_soon_threadsafe(_resolve, future)

            if self._channel.wait(wake):
                try:
                    await future
                except asyncio.CancelledError:
                    self.close()
                    raise

    @property
    def failure(self) -> Exception | None:
        """Why the request failed, once it has."""
        return self._channel.failure

    def listen(self, listener: Callable[[], object]) -> None:
        """See `Channel.listen`; for readers of many streams, with ``take``."""
        self._channel.listen(listener)

    def take(self) -> tuple[list[Delta], Completion | None]:
        """What has arrived since the last call, without waiting."""
        return self._channel.take()


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


class AsyncPieces:
    """Async iterator over a stream's text; dropping it aborts, as leaving a ``for`` loop does."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._ready: deque[str] = deque()
        self._done = False

    def __aiter__(self) -> AsyncPieces:
        return self

    async def __anext__(self) -> str:
        while not self._ready:
            if self._done:
                self._stream._raise_failure()
                raise StopAsyncIteration
            deltas, result = await self._stream.next_events()
            self._ready.extend(d.text for d in deltas if d.text)
            self._done = result is not None
        return self._ready.popleft()

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            self._stream.close()
