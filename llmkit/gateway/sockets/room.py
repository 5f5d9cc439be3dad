"""The sockets of a gateway: how many a caller may have, and how they end. Tornado loop only."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from llmkit.gateway.access.held import Held
from llmkit.gateway.access.identity import LOCAL, Identity, counted_as
from llmkit.gateway.exchange import Exchange
from llmkit.gateway.failures import ApiError

if TYPE_CHECKING:
    from llmkit.gateway.conversations.turns import Turns
    from llmkit.gateway.sockets.connection import Connection

__all__ = ["SocketRoom"]

MAX_SOCKETS, MAX_PER_CALLER, MAX_UNKNOWN = 2048, 256, 64
CHECK_S, IDLE_CHECKS = 1.0, 30  # of busy sockets; after so many, of all
LAST_S = 2.0  # for what is still to be sent when the server ends


class SocketRoom:
    """The open sockets.

    ``turns`` begins and finds turns, ``dispatch`` runs bodies, ``models`` gives the names of the
    models that are there for a caller. One caller may have ``most_per_caller`` sockets, an address
    ``most_unknown`` whose caller is not known yet.

    While a socket is busy its caller is looked at every second, else twice a minute: a key may be
    revoked, a login may end. No socket's check waits for another's.
    """

    def __init__(
        self,
        turns: Turns,
        dispatch: Callable[[Exchange], Awaitable[None]],
        models: Callable[[Identity], list[str]],
        held: Held,
        *,
        max_message_bytes: Callable[[], int],
        most: int = MAX_SOCKETS,
        most_per_caller: int = MAX_PER_CALLER,
        most_unknown: int = MAX_UNKNOWN,
    ) -> None:
        self.turns, self.dispatch, self.models, self.held = turns, dispatch, models, held
        self.max_message_bytes = max_message_bytes
        self._most, self._most_per_caller, self._most_unknown = most, most_per_caller, most_unknown
        self._who: dict[Connection, str] = {}
        self._counts: Counter[str] = Counter()
        self._checks: asyncio.Task[None] | None = None
        self._checking: dict[Connection, asyncio.Task[None]] = {}
        self._leaving: set[asyncio.Task[None]] = set()
        self._is_leaving = False

    def __len__(self) -> int:
        return len(self._who)

    def check(self, identity: Identity | None, address: str) -> str:
        """Whom one more socket would count for. Raises `ApiError` if that is one too many."""
        if identity is None:
            who, most = f"unknown {counted_as(LOCAL, address)}", self._most_unknown
        else:
            who, most = counted_as(identity, address), self._most_per_caller
        if self._is_leaving:
            message = "This server is shutting down; connect again."
            raise ApiError(503, message, "server_error", code="shutting_down")
        if self._counts[who] >= most or len(self._who) >= self._most:
            raise ApiError(
                429,
                f"{self._counts[who]} sockets of this caller are open; at most {most} may be, and "
                f"{self._most} of all. Close some.",
                "rate_limit_error",
                code="too_many_sockets",
                headers={"Retry-After": "5"},
            )
        return who

    def enter(self, connection: Connection, identity: Identity | None, address: str) -> None:
        """A socket is open, or its caller is known now. Raises `ApiError` if it is one too many."""
        self.leave(connection)
        who = self.check(identity, address)
        self._who[connection] = who
        self._counts[who] += 1
        if self._checks is None:
            self._checks = asyncio.create_task(self._watch())

    def leave(self, connection: Connection) -> None:
        """A socket is closed."""
        who = self._who.pop(connection, None)
        if who is None:
            return
        self._counts[who] -= 1
        if not self._counts[who]:
            del self._counts[who]

    async def _watch(self) -> None:
        for number in itertools.count(1):
            await asyncio.sleep(CHECK_S)
            looks_at_idle = number % IDLE_CHECKS == 0
            for connection in self._who:
                if (connection.is_busy or looks_at_idle) and connection not in self._checking:
                    self._check(connection)

    def _check(self, connection: Connection) -> None:
        """Begin a check; it may take as long as its client, or whoever knows its caller, likes."""
        task = asyncio.create_task(connection.check())
        self._checking[connection] = task
        task.add_done_callback(lambda _: self._checking.pop(connection, None))

    def drain(self) -> None:
        """The server shuts down: every socket is told, and closed as soon as it is idle."""
        self._is_leaving = True
        for connection in self._who:
            task = asyncio.create_task(connection.leave())
            self._leaving.add(task)
            task.add_done_callback(self._leaving.discard)

    async def close(self) -> None:
        """Close them all; what is over by now is still sent."""
        if self._checks is not None:
            self._checks.cancel()
        self.drain()
        await self._until(lambda: not any(c.is_busy for c in self._who) and not self._leaving)
        for connection in list(self._who):
            connection.cut()
        await self._until(lambda: not self._who)
        for task in [*self._leaving, *self._checking.values()]:
            task.cancel()

    @staticmethod
    async def _until(condition: Callable[[], bool]) -> None:
        end = asyncio.get_running_loop().time() + LAST_S
        while not condition() and asyncio.get_running_loop().time() < end:
            await asyncio.sleep(0.01)
