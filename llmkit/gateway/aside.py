"""Work for callers beside the event loop: in turn, and no longer than somebody waits for it.

Tornado loop only; the work runs on threads of its own kind.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, wait
from typing import Any, TypeVar

from llmkit.system.lanes import Lanes

__all__ = ["Aside", "Waiting"]

T = TypeVar("T")


class Waiting:
    """Whether somebody still waits for a piece of work. Any thread."""

    def __init__(self) -> None:
        self._left: Future[None] = Future()

    def check(self) -> None:
        """Between two steps of the work: raises `CancelledError` once nobody waits."""
        if self._left.done():
            raise CancelledError

    def result(self, future: Future[T], seconds: float | None = None) -> T:
        """What comes of a future, which nobody needs otherwise.

        Raises `CancelledError` as soon as nobody waits, and `TimeoutError` after ``seconds``.
        """
        both: list[Future[Any]] = [future, self._left]
        wait(both, seconds, FIRST_COMPLETED)
        if not future.done():
            future.cancel()
            self.check()
            raise TimeoutError
        return future.result()

    def leave(self) -> None:
        """Nobody waits any more."""
        if not self._left.done():
            self._left.set_result(None)


class Aside:
    """A few threads for one kind of work: callers in turn, each at most on one of them.

    Work ends at its next `Waiting.check` once whoever awaits it is cancelled.
    """

    def __init__(self, num_threads: int, name: str) -> None:
        self._lanes = Lanes(num_threads, name)

    async def run(self, caller: str, work: Callable[[Waiting], T]) -> T:
        """What the work returns. Raises what it raises."""
        waiting = Waiting()
        try:
            return await asyncio.wrap_future(self._lanes.submit(caller, lambda: work(waiting)))
        finally:
            waiting.leave()

    def close(self) -> None:
        """Cancel what waits for its turn."""
        self._lanes.close()
