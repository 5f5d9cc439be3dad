"""The time of day, steadied against a clock that jumps. Standard library only; any thread."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from datetime import date, timedelta

__all__ = ["SteadyClock", "steady"]

logger = logging.getLogger("llmkit.gateway")

JUMP_S, BELIEVED_S = 2.0, 300.0
DAY_S, EPOCH = 86_400.0, date(1970, 1, 1).toordinal()
_BOOT = getattr(time, "CLOCK_BOOTTIME", None)  # goes on while the machine sleeps


def steady() -> float:
    """Seconds that only ever go forward, at one pace."""
    return time.monotonic() if _BOOT is None else time.clock_gettime(_BOOT)


class SteadyClock:
    """The time in seconds since the epoch. A jump counts only once it has lasted five minutes.

    So a clock that is set wrong and corrected neither expires keys nor renews budgets.
    """

    def __init__(
        self,
        wall: Callable[[], float] = time.time,
        steady: Callable[[], float] = steady,
    ) -> None:
        self._wall, self._steady = wall, steady
        self._offset = wall() - steady()
        self._doubted: tuple[float, float] | None = None  # the new offset, and since when

    def now(self) -> float:
        ticks = self._steady()
        offset = self._wall() - ticks
        doubted = self._doubted  # once: another thread may set it meanwhile
        if abs(offset - self._offset) <= JUMP_S:
            self._offset, self._doubted = offset, None
        elif doubted is None or abs(offset - doubted[0]) > JUMP_S:
            self._doubted = (offset, ticks)
            logger.warning(
                "the clock jumped by %+.0f s; that counts once it has lasted %.0f minutes",
                offset - self._offset,
                BELIEVED_S / 60,
            )
        elif ticks - doubted[1] >= BELIEVED_S:
            self._offset, self._doubted = offset, None
            logger.warning("the clock's new time counts from now on")
        return ticks + self._offset

    def today(self) -> date:
        """The day in UTC."""
        return date.fromordinal(EPOCH + int(self.now() // DAY_S))

    def left_of_day(self) -> float:
        """Seconds until the next day begins, in UTC."""
        return DAY_S - self.now() % DAY_S

    def left_of_month(self) -> float:
        """Seconds until the next month begins, in UTC."""
        today = self.today()
        following = (today.replace(day=1) + timedelta(days=32)).replace(day=1)
        return (following - today).days * DAY_S - self.now() % DAY_S
