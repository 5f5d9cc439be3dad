"""A circuit breaker: an engine whose requests fail at once looks idle, and would get all of them.

Pure; its pool locks. Times are of any clock.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["MAX_FAILURES", "Breaker"]

MAX_FAILURES = 3  # in a row
FIRST_S, MAX_S = 1.0, 30.0


@dataclass(slots=True)
class Breaker:
    """After three failures in a row nothing is sent there for a second, later each time (30 s at
    most); then one request is, and what becomes of it decides.

    >>> breaker = Breaker()
    >>> for _ in range(3): breaker.failed(10.0)
    >>> breaker.allows(10.5), breaker.allows(11.0)
    (False, True)
    >>> breaker.taken(11.0); breaker.allows(11.0), breaker.succeeded(), breaker.allows(11.0)
    (False, None, True)
    """

    _failures: int = 0
    _wait_s: float = FIRST_S
    _until: float = 0.0
    _is_trying: bool = False

    @property
    def is_tripped(self) -> bool:
        return self._failures >= MAX_FAILURES

    def allows(self, now: float) -> bool:
        """Whether a request may be sent there."""
        return not self.is_tripped or (now >= self._until and not self._is_trying)

    def taken(self, now: float) -> None:
        """A request goes there."""
        self._is_trying = self.is_tripped and now >= self._until

    def failed(self, now: float) -> None:
        """The engine failed while it worked on a request."""
        if self.is_tripped and not self._is_trying:
            return  # one from before
        self._failures += 1
        self._is_trying = False
        if self.is_tripped:
            self._until = now + self._wait_s
            self._wait_s = min(2 * self._wait_s, MAX_S)

    def succeeded(self) -> None:
        """A request was answered."""
        self._failures, self._wait_s, self._is_trying = 0, FIRST_S, False

    def undecided(self) -> None:
        """A request has ended, which says nothing: it was aborted, say."""
        self._is_trying = False
