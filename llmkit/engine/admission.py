"""Who may join the queue: an exact bound on waiting requests, shared among callers. Any thread.

A caller alone may fill the whole queue. When it is full, a newcomer with fewer waiting requests
than the largest caller takes one of that caller's places, and the largest caller's newest request
is refused instead. So no caller is kept out by another's many requests.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

from llmkit.errors import QueueFullError

__all__ = ["Admission", "MakeWay"]


@dataclass(frozen=True, slots=True)
class MakeWay:
    """The newest waiting request of ``caller`` must give its place to another caller."""

    caller: str


class Admission:
    """Counts waiting requests per caller, at most ``most`` in total.

    >>> door = Admission(2)
    >>> door.enter("ann"), door.enter("ann"), door.enter("bob")
    ([], [], ['ann'])
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._lock = threading.RLock()
        self._is_counting = False
        # Not yet counted: the garbage collector may end requests in the middle of a count.
        self._left: list[str] = []
        self._waiting: dict[str, int] = {}
        self._total = 0
        # Places taken from a caller whose requests have not been refused yet.
        self._owed: dict[str, int] = {}

    def __len__(self) -> int:
        return self._total

    def enter(self, caller: str, count: int = 1) -> list[str]:
        """Take ``count`` places, or none. Returns the callers to displace, one entry per request to
        refuse. Raises `QueueFullError`."""
        with self._lock:
            self._is_counting = True
            try:
                return self._enter(caller, count)
            finally:
                self._count_left()

    def _enter(self, caller: str, count: int) -> list[str]:
        displaced: list[str] = []
        for taken in range(count):
            if self._total >= self._most:
                largest = max(self._waiting, key=lambda c: self._waiting[c], default=caller)
                if largest == caller or self._waiting[largest] <= self._waiting.get(caller, 0) + 1:
                    self._undo(caller, taken, displaced)
                    raise QueueFullError(
                        f"{self._total} requests are already waiting; try again later"
                    )
                self._add(largest, -1)
                self._owed[largest] = self._owed.get(largest, 0) + 1
                displaced.append(largest)
            self._add(caller, 1)
        return displaced

    def _undo(self, caller: str, taken: int, displaced: list[str]) -> None:
        self._add(caller, -taken)
        for other in displaced:
            self._settle(other)
            self._add(other, 1)

    def leave(self, caller: str) -> None:
        """One of the caller's requests no longer waits: it runs or has ended."""
        with self._lock:
            self._left.append(caller)
            if not self._is_counting:
                self._count_left()

    def _count_left(self) -> None:
        self._is_counting = True
        try:
            while self._left:
                caller = self._left.pop()
                if not self._settle(caller):
                    self._add(caller, -1)
        finally:
            self._is_counting = False

    def _settle(self, caller: str) -> bool:
        """Account for one place taken from the caller; False if there was none."""
        owed = self._owed.get(caller, 0)
        if owed > 1:
            self._owed[caller] = owed - 1
        elif owed:
            del self._owed[caller]
        return bool(owed)

    def owes(self, caller: str) -> bool:
        """Whether the caller has more requests waiting than places."""
        with self._lock:
            return caller in self._owed

    def _add(self, caller: str, count: int) -> None:
        self._total += count
        left = self._waiting.get(caller, 0) + count
        if left:
            self._waiting[caller] = left
        else:
            self._waiting.pop(caller, None)
