"""A small thread pool with one queue per caller, so that no caller starves the others.

Standard library only.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

__all__ = ["Lanes"]

T = TypeVar("T")


class Lanes:
    """Runs work on ``num_threads`` daemon threads: callers in turn, each one's work in order.

    >>> lanes = Lanes(2, "llmkit-example")
    >>> lanes.submit("ann", lambda: 6 * 7).result()
    42
    >>> lanes.close()

    A caller's work never runs concurrently. Threads start on demand. Work that is cancelled before
    it begins is skipped.
    """

    def __init__(self, num_threads: int, name: str) -> None:
        self._num_threads, self._name = num_threads, name
        self._pid = os.getpid()
        self._changed = threading.Condition()
        self._queues: OrderedDict[str, deque[tuple[Future[Any], list[Callable[[], Any]]]]] = (
            OrderedDict()
        )  # of callers with no work running, in turn
        self._busy: dict[str, deque[tuple[Future[Any], list[Callable[[], Any]]]]] = {}
        self._num_started = self._num_idle = 0
        self._closed = False

    def submit(self, caller: str, work: Callable[[], T]) -> Future[T]:
        """Queue work. Raises `RuntimeError` after ``close``."""
        future: Future[T] = Future()
        with self._changed:
            if self._closed:
                raise RuntimeError(f"{self._name} is closed")
            queue = self._busy.get(caller)
            if queue is None:
                queue = self._queues.setdefault(caller, deque())
            entry = [work]
            # Cancelled work is freed at once, not at its turn.
            future.add_done_callback(lambda f: entry.clear() if f.cancelled() else None)
            queue.append((future, entry))
            if len(self._queues) > self._num_idle and self._num_started < self._num_threads:
                self._num_started += 1
                threading.Thread(
                    target=self._run, name=f"{self._name}-{self._num_started}", daemon=True
                ).start()
            self._changed.notify()
        return future

    def num_waiting(self, caller: str) -> int:
        """How much of a caller's work has not begun."""
        with self._changed:
            return len(self._busy.get(caller) or self._queues.get(caller) or ())

    def _run(self) -> None:
        while True:
            with self._changed:
                self._num_idle += 1
                while not self._queues and not self._closed:
                    self._changed.wait()
                self._num_idle -= 1
                if self._closed:
                    return
                caller, queue = self._queues.popitem(last=False)
                future, entry = queue.popleft()
                self._busy[caller] = queue
            if future.set_running_or_notify_cancel():
                try:
                    result = entry[0]()
                except BaseException as error:  # any error belongs to the caller
                    future.set_exception(error)
                else:
                    future.set_result(result)
            entry.clear()
            del future, entry
            with self._changed:
                queue = self._busy.pop(caller)
                if queue:
                    self._queues[caller] = queue  # behind the others
                    self._changed.notify()

    def close(self) -> None:
        """Cancel waiting work; running work ends by itself."""
        if self._pid != os.getpid():
            return
        with self._changed:
            self._closed = True
            left = [
                future
                for queues in (self._queues, self._busy)
                for queue in queues.values()
                for future, _ in queue
            ]
            self._queues.clear()
            for queue in self._busy.values():
                queue.clear()
            self._changed.notify_all()
        for future in left:
            future.cancel()
