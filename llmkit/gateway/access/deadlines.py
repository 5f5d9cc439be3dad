"""When a request must be over: its caller's ``timeout``, and the server's maximum. Tornado loop
only.

A caller says it in the body (``timeout``, seconds) or in a header. The ``x-stainless-…-timeout`` of
SDKs are not honoured: they are sent with every request, 600 s unless somebody changed it, and mean
the client's own wait, between two bytes of a stream say. Such a client goes away by itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import re
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING

from llmkit.errors import InvalidRequestError
from llmkit.gateway.access.computing import BOUNDED
from llmkit.gateway.failures import DeadlineError, api_error

if TYPE_CHECKING:
    from llmkit.gateway.exchange import Exchange
    from llmkit.gateway.record import Record

__all__ = ["Deadline", "Deadlines", "seconds_of"]

HEADERS = ("x-llmkit-timeout", "x-request-timeout")
NUMBER = re.compile(r"[0-9]{1,9}(\.[0-9]{0,9})?|\.[0-9]{1,9}")
EARLY_S = 0.001  # by which a loop's timer may be early
LATE_S = 5.0  # for a stream that has begun to say that its time is over
MAX_S = 1e9


class Deadline:
    """The end of one request's time; ``at`` is in the loop's time, None without an end."""

    def __init__(self, most_s: float | None, retry_after: Callable[[], int]) -> None:
        self._began = asyncio.get_running_loop().time()
        self._retry_after = retry_after
        self._seconds, self._is_servers = most_s, True
        self._timer: asyncio.Timeout | None = None
        self._late_s = 0.0

    @property
    def at(self) -> float | None:
        return None if self._seconds is None else self._began + self._seconds

    @property
    def left(self) -> float | None:
        """Seconds left, never below 0."""
        at = self.at
        return None if at is None else max(0.0, at - asyncio.get_running_loop().time())

    @property
    def is_over(self) -> bool:
        left = self.left
        return left is not None and left < EARLY_S

    def shorten(self, seconds: float) -> None:
        """The caller gives the request so many seconds from its beginning."""
        if self._seconds is None or seconds < self._seconds:
            self._seconds, self._is_servers = seconds, False
            self._set_timer()

    def begin_stream(self) -> None:
        """The answer has begun: its stream says that its time is over, in its dialect."""
        self._late_s = LATE_S
        self._set_timer()

    def run(self, timer: asyncio.Timeout) -> None:
        """Have ``timer`` end the request, unless its stream does."""
        self._timer = timer
        self._set_timer()

    def _set_timer(self) -> None:
        if self._timer is not None and not self._timer.expired():
            self._timer.reschedule(None if self.at is None else self.at + self._late_s)

    def error(self, record: Record) -> DeadlineError:
        """Why a request ended whose time is over."""
        limit = "request_timeout_s of this server" if self._is_servers else "its timeout"
        has_begun = record.first_token_at is not None
        more = (
            "" if has_begun else " It had not begun to answer: the server may be busy, try later."
        )
        return DeadlineError(
            f"The request did not end within {self._seconds:g} s ({limit}).{more}",
            is_callers=not self._is_servers,
            retry_after=None if has_begun else self._retry_after(),
        )


class Deadlines:
    """Ends requests at their deadline; ``most_s`` is the server's, and may be changed at any time.

    ``retry_after`` gives seconds after which a request that never began may be sent again.
    """

    def __init__(
        self,
        most_s: float | None = None,
        retry_after: Callable[[Exchange], int] = lambda _: 2,
    ) -> None:
        self.most_s = most_s
        self._retry_after = retry_after

    @contextlib.asynccontextmanager
    async def stage(self, exchange: Exchange) -> AsyncIterator[None]:
        """A stage round the routes that use an engine.

        Raises `DeadlineError`, and `InvalidRequestError` for a header that is no time.
        """
        if exchange.method != "POST" or exchange.route not in BOUNDED:
            yield
            return
        deadline = Deadline(self.most_s, lambda: self._retry_after(exchange))
        for name in HEADERS:
            value = exchange.header(name)
            if value is not None:
                deadline.shorten(seconds_of(_number(value), name))
        record = exchange.record
        record.deadline = deadline
        try:
            async with asyncio.timeout(None) as timer:
                deadline.run(timer)
                yield
        except TimeoutError:
            if not timer.expired():
                raise
            error = deadline.error(record)
            answer = api_error(error)  # what ended the route was noted as a client that left
            record.status, record.error = answer.status, answer.code or ""
            raise error from None


def _number(text: str) -> float | str:
    text = text.strip()
    return float(text) if NUMBER.fullmatch(text) else text


def seconds_of(value: object, name: str) -> float:
    """A time that a caller gives. Raises `InvalidRequestError` naming it.

    >>> seconds_of(30, "timeout")
    30.0
    """
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf:
        return float(min(value, MAX_S))
    raise InvalidRequestError(
        f"{name} must be a number of seconds above 0, such as 30, not {value!r:.60}.", name
    )
