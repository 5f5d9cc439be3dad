"""Many prompts at once: no more than a window of them, and no more than the queue has room for."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

from llmkit.errors import QueueFullError
from llmkit.protocol import Completion
from llmkit.protocol.stream import Stream

__all__ = ["Batch"]

Prompt = TypeVar("Prompt")


class Batch(Generic[Prompt]):
    """Has prompts answered, ``window`` of them at once at most.

    ``submit`` begins an answer, or returns why there is none. What the engine's queue has no room
    for is submitted again when an earlier one has ended.

    >>> batch = Batch(llm.stream, 256)                                  # doctest: +SKIP
    >>> texts = [done.text for done in batch.results(["One,", "Two,"])]   # doctest: +SKIP
    """

    def __init__(self, submit: Callable[[Prompt], Stream | Exception], window: int) -> None:
        self._submit, self._window = submit, window
        self._begun: deque[tuple[Prompt, Stream | Exception]] = deque()
        self._count = 0

    @property
    def running(self) -> list[Stream]:
        """The streams whose results were not taken, oldest first."""
        return [stream for _, stream in self._begun if isinstance(stream, Stream)]

    def results(self, prompts: Iterable[Prompt]) -> Iterator[Completion | Exception]:
        """What became of each prompt, in order. Raises what ``submit`` raises, except a
        `QueueFullError`."""
        for prompt in prompts:
            while len(self._begun) >= self._window:
                yield self._take()
            self._count += 1
            while (begun := self._begin(prompt)) is None:
                yield self._take()
            self._begun.append((prompt, begun))
        while self._begun:
            yield self._take()

    def _begin(self, prompt: Prompt) -> Stream | Exception | None:
        """None: there is no room, but there will be."""
        try:
            return self._submit(prompt)
        except QueueFullError as error:
            return None if self._begun else error

    def _take(self) -> Completion | Exception:
        """Wait for the oldest, and take its result."""
        prompt, begun = self._begun[0]
        is_last_try = self._count == 1
        while isinstance(begun, Stream):
            done = begun.wait()
            assert done is not None
            if not isinstance(begun.failure, QueueFullError) or is_last_try:
                self._begun.popleft()
                return begun.failure or done
            # Refused after all: another caller got its place.
            is_last_try = not self._wait_for_room()
            with contextlib.suppress(QueueFullError):
                begun = self._submit(prompt)
                self._begun[0] = prompt, begun
        self._begun.popleft()
        return begun

    def _wait_for_room(self) -> bool:
        """Wait until another one has ended. False: none runs."""
        for stream in self.running:
            if not stream.finished:
                stream.wait()
                return True
        return False
