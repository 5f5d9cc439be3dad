"""Whose turn it is on the cores: two models in one process that compute at the same time would fight for them (ggml's threads spin at their barriers)."""

from __future__ import annotations

import threading
from collections import deque
from types import TracebackType

__all__ = ["Turns"]


class Turns:
    """A lock that is handed on in order of arrival, so that nobody waits longer than one step of each of the others.

    >>> turns = Turns()
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
        except BaseException:  # the stop button: the turn must not be handed to nobody
            with self._lock:
                waits = event in self._waiting
                if waits:
                    self._waiting.remove(event)
            if not waits:
                self.__exit__(None, None, None)
            raise

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with self._lock:
            if self._waiting:
                self._waiting.popleft().set()
            else:
                self._taken = False
