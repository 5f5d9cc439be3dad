"""Which sessions are in use here, beside those with running replies. Any thread."""

from __future__ import annotations

import threading
from collections import Counter

__all__ = ["Use", "Uses"]


class Uses:
    """The sessions in use: none of them makes way for another.

    >>> uses = Uses()
    >>> use = uses.begin()
    >>> use.of("sess_0"), uses.ids()
    (None, ['sess_0'])
    >>> use.end(), uses.ids()
    (None, [])
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.counts: Counter[str] = Counter()

    def begin(self) -> Use:
        """A use of sessions that are yet to be named."""
        return Use(self)

    def ids(self) -> list[str]:
        """The sessions."""
        with self.lock:
            return list(self.counts)


class Use:
    """One request's use of sessions, until its end."""

    def __init__(self, uses: Uses) -> None:
        self._uses = uses
        self._ids: list[str] = []
        self._is_over = False

    def of(self, session_id: str) -> None:
        """A session is in use; after the end none is."""
        with self._uses.lock:
            if not self._is_over:
                self._ids.append(session_id)
                self._uses.counts[session_id] += 1

    def end(self) -> None:
        """They are in use no longer."""
        counts = self._uses.counts
        with self._uses.lock:
            self._is_over = True
            for each in self._ids:
                counts[each] -= 1
                if not counts[each]:
                    del counts[each]
            self._ids.clear()
