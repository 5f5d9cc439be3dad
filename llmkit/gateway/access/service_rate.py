"""How fast requests are served while others wait, and so how long a newcomer would. Pure."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

__all__ = ["MAX_RETRY_S", "ServiceRate"]

HALF_LIFE_S = 30.0  # of what was measured
MIN_SERVED = 2.0  # measurements that count
SMOOTHING = 0.1
DEFAULT_RETRY_S, MAX_RETRY_S = 2, 120


class ServiceRate:
    """Requests served per second, measured only while others wait: an idle server is not slow.

    Until that has happened, an estimate: those served at once, by how long each takes.

    >>> rate = ServiceRate(now=iter([0.0, 0.0, 4.0, 8.0, 8.0]).__next__)
    >>> rate.waits(True); rate.served(4.0); rate.served(4.0)
    >>> rate.retry_after(10)
    40
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._served = self._seconds = 0.0
        self._at: float | None = None  # measured until then; None while nobody waits
        self._duration_s: float | None = None

    def waits(self, is_waiting: bool) -> None:
        """Whether requests wait from now on."""
        self._advance()
        self._at = self._now() if is_waiting else None

    def served(self, seconds: float) -> None:
        """A request has left, which was served for so long."""
        if self._at is not None:
            self._advance()
            self._served += 1
        last = self._duration_s
        self._duration_s = seconds if last is None else last + SMOOTHING * (seconds - last)

    def _advance(self) -> None:
        if self._at is None:
            return
        now = self._now()
        kept = 0.5 ** ((now - self._at) / HALF_LIFE_S)
        self._served *= kept
        self._seconds = self._seconds * kept + now - self._at
        self._at = now

    @property
    def duration_s(self) -> float | None:
        """How long a request takes, smoothed; None before the first."""
        return self._duration_s

    def wait_s(self, ahead: int, at_once: int = 1) -> float | None:
        """Seconds until ``ahead`` requests have been served; None if nothing was measured.

        It never falls when ``ahead`` grows. ``at_once`` are served together.
        """
        if self._served >= MIN_SERVED:
            stalled = 0.0 if self._at is None else self._now() - self._at
            return ahead * (self._seconds + stalled) / self._served
        if self._duration_s is None:
            return None
        return ahead * self._duration_s / max(at_once, 1)

    def retry_after(self, ahead: int, at_once: int = 1) -> int:
        """The same in whole seconds, within bounds, for the header."""
        seconds = self.wait_s(ahead, at_once)
        return DEFAULT_RETRY_S if seconds is None else clipped(seconds)


def clipped(seconds: float) -> int:
    """Whole seconds from 1 to `MAX_RETRY_S`."""
    return max(1, min(MAX_RETRY_S, math.ceil(seconds)))
