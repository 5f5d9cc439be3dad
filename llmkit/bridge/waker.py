"""Wakes a ZMQ poll loop from any thread. Used at both ends of the bridge; knows no messages."""

from __future__ import annotations

import contextlib
import socket

__all__ = ["Waker"]


class Waker:
    """Calling it wakes the loop; calls that the loop has not seen yet share one byte."""

    def __init__(self) -> None:
        self._read, self._write = socket.socketpair()
        self._read.setblocking(False)
        self._write.setblocking(False)
        self._pending = False

    @property
    def fileno(self) -> int:
        return self._read.fileno()

    def __call__(self) -> None:
        if not self._pending:
            self._pending = True
            with contextlib.suppress(OSError):
                self._write.send(b"\0")

    def clear(self) -> None:
        with contextlib.suppress(OSError):
            self._read.recv(64)
        self._pending = False

    def close(self) -> None:
        self._read.close()
        self._write.close()
