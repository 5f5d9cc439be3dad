"""Rates counted by `limits`: in memory, or in Redis where several gateways share them.

Windows slide: the one before counts by the share of it that is still in the span, as if its
requests had come evenly. So a burst at a border is held back, at two numbers a caller, whatever the
rate. The clock cannot move windows: memory counts by a steady clock, Redis by its own. Tornado loop
only.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from urllib.parse import urlsplit

from limits import RateLimitItem, RateLimitItemPerSecond
from limits.storage import SlidingWindowCounterSupport, Storage
from limits.strategies import SlidingWindowCounterRateLimiter

from llmkit.errors import InvalidRequestError
from llmkit.gateway.access.clock import steady
from llmkit.settings.allowances import Rate, read_rate
from llmkit.settings.gateway import GATEWAY_OPTIONS

__all__ = ["Redis", "Standing", "SteadyMemory", "Windows", "item_of", "rate_of"]

logger = logging.getLogger("llmkit.gateway")

MAX_CALLERS = 1 << 16
PROBE = Rate(1_000_000, 1)
REDIS_S, RETRY_S = 0.25, 1.0  # the longest wait for an answer; between tries once it is gone

rate_of = lru_cache(1024)(read_rate)


@dataclass(slots=True)
class _Window:
    start: float
    seconds: int
    previous: int = 0
    current: int = 0

    def roll(self, now: float) -> None:
        """Let windows that are over be over."""
        passed = int((now - self.start) // self.seconds)
        if passed > 0:
            self.previous = self.current if passed == 1 else 0
            self.current = 0
            self.start += passed * self.seconds


class SteadyMemory(Storage, SlidingWindowCounterSupport):
    """A storage for `limits` by a clock that nobody sets, of at most ``most`` callers.

    Beyond that the one that was seen longest ago is forgotten. A window begins with its first
    request, as in Redis.
    """

    STORAGE_SCHEME = None

    def __init__(self, now: Callable[[], float] = steady, most: int = MAX_CALLERS) -> None:
        super().__init__()
        self._now, self._most = now, most
        self._windows: OrderedDict[str, _Window] = OrderedDict()

    def _at(self, key: str, seconds: int) -> _Window:
        now = self._now()
        window = self._windows.get(key)
        if window is None:
            window = _Window(now, seconds)
        else:
            window.roll(now)
            if not (window.current or window.previous):
                window.start = now
        return window

    def _keep(self, key: str, window: _Window) -> None:
        self._windows[key] = window
        self._windows.move_to_end(key)
        if len(self._windows) > self._most:
            self._windows.popitem(last=False)

    def acquire_sliding_window_entry(
        self, key: str, limit: int, expiry: int, amount: int = 1
    ) -> bool:
        window = self._at(key, expiry)
        left = 1 - (self._now() - window.start) / expiry
        if int(window.previous * left) + window.current + amount > limit:
            return False
        window.current += amount
        self._keep(key, window)
        return True

    def get_sliding_window(self, key: str, expiry: int) -> tuple[int, float, int, float]:
        window = self._at(key, expiry)
        left = expiry - (self._now() - window.start)
        return window.previous, left if window.previous else 0.0, window.current, left + expiry

    def clear_sliding_window(self, key: str, expiry: int) -> None:
        self.clear(key)

    def incr(self, key: str, expiry: int, amount: int = 1) -> int:
        window = self._at(key, expiry)
        window.current += amount
        self._keep(key, window)
        return window.current

    def get(self, key: str) -> int:
        window = self._windows.get(key)
        return 0 if window is None else self._at(key, window.seconds).current

    def get_expiry(self, key: str) -> float:
        window = self._windows.get(key)
        return self._now() if window is None else window.start + window.seconds

    def clear(self, key: str) -> None:
        self._windows.pop(key, None)

    def check(self) -> bool:
        return True

    def reset(self) -> int:
        number = len(self._windows)
        self._windows.clear()
        return number

    @property
    def base_exceptions(self) -> type[Exception]:
        return ValueError


@dataclass(frozen=True, slots=True)
class Standing:
    """Where a caller stands: ``remaining`` requests now, one more in ``reset_s`` seconds."""

    is_allowed: bool
    rate: Rate
    remaining: int
    reset_s: float

    @classmethod
    def of(cls, is_allowed: bool, rate: Rate, window: tuple[int, float, int, float]) -> Standing:
        """Of what a storage says: the requests of the window before, how long they count, those of
        this one, and how long they do."""
        before, before_s, now, now_s = window
        counted = before * before_s / rate.seconds  # it drops with time; what is below 1 is free
        if counted >= 1:
            reset_s = counted % 1 * rate.seconds / before
        else:
            reset_s = max(0.0, now_s - rate.seconds) if now else 0.0
        return cls(is_allowed, rate, max(0, rate.amount - int(counted) - now), reset_s)


@lru_cache(1024)
def item_of(rate: Rate) -> RateLimitItem:
    """The rate in the words of `limits`."""
    return RateLimitItemPerSecond(rate.amount, rate.seconds, "llmkit")


class Redis:
    """Windows in Redis or Valkey, as long as it answers.

    Raises `InvalidRequestError` for a ``url`` that names none, or without the client.
    """

    def __init__(self, url: str) -> None:
        from limits.aio.storage import RedisStorage
        from limits.aio.strategies import SlidingWindowCounterRateLimiter as Limiter
        from limits.errors import ConfigurationError

        self.place, address = _address(url)
        try:
            from redis.asyncio.retry import Retry
            from redis.backoff import NoBackoff
            from redis.exceptions import ConnectionError as LostError

            # One more try, since Redis may have been restarted in the meantime.
            retry = Retry(NoBackoff(), 1, supported_errors=(LostError,))
            self._storage = RedisStorage(
                address,
                implementation="redispy",
                key_prefix="llmkit",
                socket_timeout=REDIS_S,
                socket_connect_timeout=REDIS_S,
                retry=retry,  # type: ignore[arg-type]
            )
            # Parameters that the client does not know are else found with the first request.
            with contextlib.suppress(AttributeError):  # `limits` promises no such way to its client
                self._storage.bridge.storage.connection_pool.make_connection()  # type: ignore[attr-defined]
        except (ImportError, ConfigurationError) as error:
            if isinstance(error, ImportError) or "prerequisite" in str(error):
                message = "redis_url needs a client: pip install 'llmkit[redis]'."
            else:  # its own words may hold a part of the password
                message = (
                    "redis_url must be like redis://host:6379/0 or unix:///path; in a password, "
                    "/ ? # and @ are written as %2F, %3F, %23 and %40."
                )
            raise InvalidRequestError(message, "redis_url") from None
        except (ValueError, TypeError) as error:
            why = str(error).partition(") ")[2] or error  # without the client's own function
            reason = str(why).rstrip(".")
            message = f"redis_url must be like redis://host:6379/0 or unix:///path: {reason}."
            raise InvalidRequestError(message, "redis_url") from None
        self._limiter = Limiter(self._storage)
        self._is_gone = False
        self._trying: asyncio.Task[None] | None = None

    async def take(self, rate: Rate, key: str) -> Standing | None:
        """Count a request; None if Redis does not answer, which is said once."""
        if self._is_gone:
            if self._trying is None or self._trying.done():
                self._trying = asyncio.ensure_future(self._try_again())
            return None
        try:
            async with asyncio.timeout(2 * REDIS_S):
                item = item_of(rate)
                allowed = await self._limiter.hit(item, key)
                window = await self._storage.get_sliding_window(item.key_for(key), rate.seconds)
        except Exception as error:  # the client's, the system's, or the script's
            self._say_gone(error)
            return None
        return Standing.of(allowed, rate, window)

    def _say_gone(self, error: Exception) -> None:
        if not self._is_gone:
            self._is_gone = True
            logger.warning(
                "Redis at %s is gone (%s); until it is back, this gateway counts rates alone",
                self.place,
                str(error) or type(error).__name__,
            )

    async def _try_again(self) -> None:
        await asyncio.sleep(RETRY_S)
        with contextlib.suppress(Exception):
            async with asyncio.timeout(2 * REDIS_S):
                # One that is full or a replica answers a ping, and counts nothing.
                if await self._limiter.hit(item_of(PROBE), "probe") and self._is_gone:
                    self._is_gone = False
                    logger.warning("Redis at %s is back; rates are shared again", self.place)

    async def close(self) -> None:
        if self._trying is not None:
            self._trying.cancel()
        with contextlib.suppress(Exception):
            await self._storage.bridge.storage.aclose()  # type: ignore[attr-defined]


def _address(url: str) -> tuple[str, str]:
    """How messages name it, without what may be a password; and how `limits` does."""
    GATEWAY_OPTIONS["redis_url"].check(url)
    scheme, _, rest = url.partition("://")
    known = {
        "redis": "async+redis",
        "rediss": "async+rediss",
        "valkey": "async+redis",
        "valkeys": "async+rediss",
        "unix": "async+redis+unix",
    }
    parts = urlsplit(f"{scheme}://{rest.partition('?')[0].rpartition('@')[2]}")
    return f"{parts.netloc}{parts.path}", f"{known[scheme]}://{rest}"


class Windows:
    """Rates of callers: by Redis if there is one, else and meanwhile in memory.

    What Redis lets through is counted here as well, so that nobody begins anew when it goes.
    """

    def __init__(self, redis: Redis | None = None, now: Callable[[], float] = steady) -> None:
        self._redis = redis
        self._memory = SteadyMemory(now)
        self._own = SlidingWindowCounterRateLimiter(self._memory)

    async def take(self, rate: Rate, key: str) -> Standing:
        """Count a request, unless it is one too many."""
        if self._redis is not None:
            standing = await self._redis.take(rate, key)
            if standing is not None:
                if standing.is_allowed:
                    self._own.hit(item_of(rate), key)
                return standing
        return self.take_here(rate, key)

    def take_here(self, rate: Rate, key: str) -> Standing:
        """The same, in memory only."""
        item = item_of(rate)
        allowed = self._own.hit(item, key)
        window = self._memory.get_sliding_window(item.key_for(key), rate.seconds)
        return Standing.of(allowed, rate, window)

    async def close(self) -> None:
        if self._redis is not None:
            await self._redis.close()
