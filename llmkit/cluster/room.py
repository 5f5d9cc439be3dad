"""How one client shares a server with others: a few requests at a time, and patience with a server
that is busy. One loop only."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Awaitable, Callable

from llmkit.cluster.address import Address
from llmkit.cluster.link import Reply
from llmkit.cluster.refusals import BUSY, refusal, retry_after, said_in

__all__ = ["Room"]

MOST = 64  # requests at a server at once; more wait here, in order
PATIENCE_S = 60.0  # a busy server is asked again for so long, or while it serves others of ours


class Room:
    """``served`` is how many of this client's requests are being answered."""

    def __init__(self, address: Address) -> None:
        self.served = 0
        self._address = address
        self._places = asyncio.Semaphore(MOST)
        self._refused: deque[asyncio.Future[None]] = deque()

    async def ask(self, send: Callable[[], Awaitable[Reply]]) -> Reply:
        """What a server answers once it has room. Raises what it refuses with."""
        try:
            async with self._places:
                return await self._patiently(send)
        finally:
            self._next()

    async def _patiently(self, send: Callable[[], Awaitable[Reply]]) -> Reply:
        end = time.monotonic() + PATIENCE_S
        while True:
            reply = await send()
            if reply.status == 200:
                return reply
            is_busy = said_in(reply.body).get("code") in BUSY
            if not is_busy or (self.served == 0 and time.monotonic() > end):
                raise refusal(self._address, reply.status, reply.headers, reply.body)
            waiter = asyncio.get_running_loop().create_future()
            self._refused.append(waiter)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(retry_after(reply.headers)):
                    await waiter

    def _next(self) -> None:
        """One of ours has ended: another that was refused may try."""
        while self._refused:
            waiter = self._refused.popleft()
            if not waiter.done():
                waiter.set_result(None)
                return
