"""Who may still queue: an exact bound on waiting requests, shared among callers. Any thread.

A caller alone may fill the whole queue. When it is full, a caller with fewer waiting requests than the one with the most takes a place of that one, whose
newest request is refused in its stead: so nobody is kept out by the number of another's requests.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

from llmkit.errors import QueueFullError

__all__ = ["Admission", "MakeWay"]


@dataclass(frozen=True, slots=True)
class MakeWay:
    """The newest waiting request of ``caller`` gives its place to somebody else's."""

    caller: str


class Admission:
    """Counts waiting requests by caller; at most ``most`` in all.

    >>> door = Admission(2)
    >>> door.enter("ann"), door.enter("ann"), door.enter("bob")
    ([], [], ['ann'])
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._waiting: dict[str, int] = {}
        self._total = 0
        self._owed: dict[str, int] = {}  # places given away whose requests have not been refused yet

    def __len__(self) -> int:
        return self._total

    def enter(self, caller: str, count: int = 1) -> list[str]:
        """Take ``count`` places, or none. Returns the callers that must give up a waiting request each. Raises `QueueFullError`."""
        with self._lock:
            displaced: list[str] = []
            for taken in range(count):
                if self._total >= self._most:
                    most = max(self._waiting, key=lambda c: self._waiting[c], default=caller)
                    if most == caller or self._waiting[most] <= self._waiting.get(caller, 0) + 1:
                        self._undo(caller, taken, displaced)
                        raise QueueFullError(f"{self._total} requests wait already; try again later")
                    self._add(most, -1)
                    self._owed[most] = self._owed.get(most, 0) + 1
                    displaced.append(most)
                self._add(caller, 1)
            return displaced

    def _undo(self, caller: str, taken: int, displaced: list[str]) -> None:
        self._add(caller, -taken)
        for other in displaced:
            self._settle(other)
            self._add(other, 1)

    def leave(self, caller: str) -> None:
        """A request of the caller waits no longer: it runs, or has ended."""
        with self._lock:
            if not self._settle(caller):
                self._add(caller, -1)

    def _settle(self, caller: str) -> bool:
        """One place given away is accounted for."""
        owed = self._owed.get(caller, 0)
        if owed > 1:
            self._owed[caller] = owed - 1
        elif owed:
            del self._owed[caller]
        return bool(owed)

    def owes(self, caller: str) -> bool:
        """Whether the caller still has more requests waiting than places."""
        with self._lock:
            return caller in self._owed

    def _add(self, caller: str, count: int) -> None:
        self._total += count
        left = self._waiting.get(caller, 0) + count
        if left:
            self._waiting[caller] = left
        else:
            self._waiting.pop(caller, None)
