"""Slows down whoever tries keys: failed attempts by address. Tornado loop only."""

from __future__ import annotations

from collections.abc import Callable

from limits.strategies import SlidingWindowCounterRateLimiter

from llmkit.gateway.access.clock import steady
from llmkit.gateway.access.proxies import place
from llmkit.gateway.access.windows import Standing, SteadyMemory, item_of
from llmkit.settings.allowances import Rate

__all__ = ["Throttle"]

FAILURES = Rate(20, 60)
MAX_PLACES = 10_000


class Throttle:
    """Wrong keys from each address, in a bounded table."""

    def __init__(
        self, rate: Rate = FAILURES, now: Callable[[], float] = steady, most: int = MAX_PLACES
    ) -> None:
        self._item = item_of(rate)
        self._rate, self._memory = rate, SteadyMemory(now, most)
        self._failed = SlidingWindowCounterRateLimiter(self._memory)

    def note(self, address: str) -> None:
        """Count a wrong key."""
        self._failed.hit(self._item, place(address))

    def wait_s(self, address: str) -> float:
        """Seconds until this address may try again; 0 if it may now."""
        where = place(address)
        if self._failed.test(self._item, where):
            return 0.0
        window = self._memory.get_sliding_window(self._item.key_for(where), self._rate.seconds)
        return max(1.0, Standing.of(False, self._rate, window).reset_s)
