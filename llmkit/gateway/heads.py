"""Bounds the head of requests: the request line and the headers. Tornado loop only.

Tornado closes a connection whose head is too long, without a word. Here it is told why first.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
from typing import Any

from tornado import ioloop, iostream

__all__ = ["MAX_HEAD_BYTES", "MAX_LINE_BYTES", "Heads"]

MAX_LINE_BYTES, MAX_HEAD_BYTES = 8 << 10, 32 << 10
READ_S, TIMES = 0.05, 40  # how long what still comes is read and thrown away
MAX_DRAINED = 32  # connections at once, each with a descriptor that no other bound counts


class Heads:
    """The heads of a server's connections, of which so many are drained at once."""

    def __init__(self, most: int = MAX_DRAINED) -> None:
        self._most = most
        self._num_drained = 0

    def bound(self, stream: iostream.IOStream) -> None:
        """Have a connection that sends too long a head answered 414 or 431 before it is closed."""
        close = stream.close

        def tell_and_close(exc_info: Any = False) -> None:
            if isinstance(exc_info, iostream.UnsatisfiableReadError) and not stream.closed():
                with contextlib.suppress(OSError):
                    stream.socket.send(_answer(stream, exc_info))
                    if self._num_drained < self._most:
                        self._drain(stream.socket)
            close(exc_info)

        stream.close = tell_and_close  # type: ignore[method-assign]

    def _drain(self, connection: socket.socket) -> None:
        """Read on for two seconds: closing on unread bytes would reset the connection, and take the
        answer with it."""
        rest = socket.socket(fileno=os.dup(connection.fileno()))
        rest.setblocking(False)
        with contextlib.suppress(OSError):
            rest.shutdown(socket.SHUT_WR)
        loop = ioloop.IOLoop.current()
        self._num_drained += 1

        def read(times: int) -> None:
            try:
                if times and rest.recv(1 << 16):
                    loop.call_later(READ_S, read, times - 1)
                    return
            except BlockingIOError:
                loop.call_later(READ_S, read, times - 1)
                return
            except OSError:
                pass
            self._num_drained -= 1
            rest.close()

        read(TIMES)


def _answer(stream: iostream.IOStream, error: Exception) -> bytes:
    if not str(error).endswith(f" {MAX_HEAD_BYTES} bytes"):  # the size of a chunk of a body
        return _response(400, "Bad Request", "The body's chunks are malformed.", "invalid_chunk")
    begun = bytes(getattr(stream, "_read_buffer", b"")[:MAX_LINE_BYTES])
    if b"\n" not in begun:
        return _response(414, "URI Too Long", "The address is too long.", "uri_too_long")
    return _response(
        431,
        "Request Header Fields Too Large",
        f"The headers are longer than {MAX_HEAD_BYTES} bytes.",
        "headers_too_large",
    )


def _response(status: int, reason: str, message: str, code: str) -> bytes:
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
    body = json.dumps({"error": error}).encode()
    return (
        f"HTTP/1.1 {status} {reason}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nX-Content-Type-Options: nosniff\r\n"
        "Connection: close\r\n\r\n"
    ).encode() + body
