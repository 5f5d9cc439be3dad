"""Time for a client to read why its body is not wanted. Tornado loop only."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Callable, Mapping
from typing import Any

from tornado import web

__all__ = ["discard_body", "has_body", "linger"]

LINGER_S = 2.0
LOOK_S = 0.02
MOST = 100  # connections at a time


def linger(connection: Any) -> None:
    """Close an HTTP/1 ``connection`` after its answer, but not before the body has come or
    ``LINGER_S`` have passed; Tornado throws away what comes meanwhile.

    A socket that is closed on unread bytes is reset, and the reset overtakes the answer: a client
    or proxy that still sends would see a broken connection instead of the error. Of more than
    ``MOST`` connections the one that has had the most time is closed.
    """
    room, close = _rooms.setdefault(asyncio.get_running_loop(), _Room()), connection.close
    connection.close = lambda: room.enter(connection, close)


def has_body(headers: Mapping[str, str]) -> bool:
    """Whether a request announces a body."""
    return headers.get("Content-Length", "0") != "0" or "Transfer-Encoding" in headers


def discard_body(handler: web.RequestHandler) -> None:
    """Before the answer to a request whose body nobody reads: see to it that it is read."""
    if has_body(handler.request.headers):
        handler.set_header("Connection", "close")
        linger(handler.request.connection)


class _Room:
    """The connections of a loop that linger, the first to leave first; one timer for all."""

    def __init__(self) -> None:
        self._ends: dict[Any, tuple[Callable[[], None], float]] = {}

    def enter(self, connection: Any, close: Callable[[], None]) -> None:
        if connection in self._ends:
            return
        loop = asyncio.get_running_loop()
        is_first = not self._ends
        self._ends[connection] = close, loop.time() + LINGER_S
        if is_first:
            loop.call_soon(self._look)
        elif len(self._ends) > MOST:
            self._leave(next(iter(self._ends)))

    def _look(self) -> None:
        loop = asyncio.get_running_loop()
        now = loop.time()
        for connection, (_, end) in list(self._ends.items()):
            stream = connection.stream
            if stream is None or stream.closed() or connection._read_finished or now >= end:
                self._leave(connection)
        if self._ends:
            loop.call_later(LOOK_S, self._look)

    def _leave(self, connection: Any) -> None:
        close, _ = self._ends.pop(connection)
        close()


_rooms: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Room] = weakref.WeakKeyDictionary()
