"""`Reading`: nobody frees a model while its vocabulary is read. Any thread."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

__all__ = ["Reading"]

LIMIT_S = 10.0  # for readers still at work when the model is unloaded


class Reading:
    """``with reading():`` keeps a model from being freed, without blocking other readers.

    ``check_open`` raises once nobody may begin, and is called with ``lock`` held. Who wants to free
    the model makes it raise, then calls ``ended``.

        >>> reading = Reading(threading.Lock(), lambda: None)
        >>> with reading():
        ...     reading.ended(0)
        False
        >>> reading.ended()
        True
    """

    def __init__(self, lock: threading.Lock, check_open: Callable[[], None]) -> None:
        self._left = threading.Condition(lock)
        self._check_open = check_open
        self._num_readers = 0

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        with self._left:
            self._check_open()
            self._num_readers += 1
        try:
            yield
        finally:
            with self._left:
                self._num_readers -= 1
                self._left.notify_all()

    def ended(self, limit_s: float = LIMIT_S) -> bool:
        """Wait until nobody reads, and whether that came in time."""
        with self._left:
            return self._left.wait_for(lambda: not self._num_readers, limit_s)
