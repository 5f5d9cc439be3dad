"""Turns on the CPU for the models of a process. Any thread.

Computing at the same time, they would fight for the cores: ggml's threads spin at barriers.
"""

from __future__ import annotations

import threading
from collections import deque
from types import TracebackType

__all__ = ["CpuTurns"]


class CpuTurns:
    """A fair lock, handed on in order of arrival: each waits at most one step of every other.

    >>> turns = CpuTurns()
    >>> with turns: pass
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: deque[threading.Event] = deque()
        self._taken = False

    def __enter__(self) -> None:
        event = threading.Event()
        with self._lock:
            if not self._taken:
                self._taken = True
                return
            self._waiting.append(event)
        try:
            event.wait()
        except BaseException:  # the stop button: do not keep the turn
            with self._lock:
                waits = event in self._waiting
                if waits:
                    self._waiting.remove(event)
            if not waits:
                self.__exit__(None, None, None)
            raise

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._lock:
            if self._waiting:
                self._waiting.popleft().set()
            else:
                self._taken = False
