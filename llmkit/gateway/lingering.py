"""Time for a client to read why its body is not wanted. Tornado loop only."""

from __future__ import annotations

import asyncio
from typing import Any

__all__ = ["linger"]

LINGER_S = 2.0
LOOK_S = 0.02


def linger(connection: Any) -> None:
    """Close an HTTP/1 ``connection`` after its answer, but not before the body has come or
    ``LINGER_S`` have passed; Tornado throws away what comes meanwhile.

    A socket that is closed on unread bytes is reset, and the reset overtakes the answer: a client
    or proxy that still sends would see a broken connection instead of the error.
    """
    close, loop = connection.close, asyncio.get_running_loop()

    def look(end: float) -> None:
        stream = connection.stream
        if stream is None or stream.closed() or connection._read_finished or loop.time() >= end:
            close()
        else:
            loop.call_later(LOOK_S, look, end)

    connection.close = lambda: look(loop.time() + LINGER_S)
