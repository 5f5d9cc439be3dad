"""The HTTP server of a standalone gateway: bounds connections, in total and per address.

It survives a lack of descriptors: Tornado would log a traceback for each failed accept, some
thousand times a second; here accepting pauses, and one line is logged. Tornado loop only.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
import ssl
import sys
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from typing import Any

from tornado import httpserver, httputil, ioloop, iostream, web
from tornado.http1connection import HTTP1ServerConnection

from llmkit.gateway.access.proxies import OURSELVES, place
from llmkit.gateway.heads import MAX_HEAD_BYTES, Heads

__all__ = ["MAX_CONNECTIONS", "SPARE_DESCRIPTORS", "BoundedServer", "place_of", "raise_descriptors"]

logger = logging.getLogger("llmkit.gateway")

MAX_CONNECTIONS = 4096
SPARE_DESCRIPTORS = 64  # for files, engines and the log
HEADER_S, BODY_S = 20.0, 60.0
PAUSE_S = 1.0
EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
ACCEPTS = 64  # connections accepted per turn of the loop
EVICTED = 16  # idle connections closed when no descriptor is free


def raise_descriptors() -> int:
    """Raise the descriptor limit as far as allowed. Returns the limit."""
    if sys.platform == "win32":
        return 512
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = min(hard, 1 << 16) if hard != resource.RLIM_INFINITY else 1 << 16
    if soft < wanted:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            soft = wanted
    return soft


class BoundedServer(httpserver.HTTPServer):
    """Accepts at most ``most`` connections, and half of that per address other than our own.

    ``is_shared`` tells addresses of proxies, which bring many clients and may have all. With
    ``ssl_options`` it speaks TLS; other ones count for the connections that follow.

    At the limit it closes the longest idle connection, from the address with the most; if none is
    idle, the new one. A connection is idle until its whole request has arrived.
    """

    def initialize(  # type: ignore[override]
        self,
        app: web.Application,
        *,
        most: int,
        ssl_options: ssl.SSLContext | None = None,
        is_shared: Callable[[str], bool] = lambda address: False,
    ) -> None:
        super().initialize(
            app,
            max_header_size=MAX_HEAD_BYTES,
            max_body_size=1 << 60,  # the handler bounds bodies, since it can answer with an error
            idle_connection_timeout=HEADER_S,
            body_timeout=BODY_S,
            ssl_options=ssl_options,
        )
        self._most, self._is_shared = most, is_shared
        self._heads = Heads()
        self._places: dict[iostream.IOStream, str] = {}
        # By address, longest idle first.
        self._idle: dict[str, OrderedDict[iostream.IOStream, None]] = {}
        self._counts: Counter[str] = Counter()
        self._is_exhausted = False

    def add_sockets(self, sockets: Iterable[socket.socket]) -> None:
        for sock in sockets:
            sock.setblocking(False)
            self._sockets[sock.fileno()] = sock
            self._listen(sock)

    def _listen(self, sock: socket.socket) -> None:
        loop = ioloop.IOLoop.current()
        loop.add_handler(sock, self._accept, ioloop.IOLoop.READ)
        self._handlers[sock.fileno()] = lambda: loop.remove_handler(sock)

    def _accept(self, sock: socket.socket, events: int) -> None:
        for _ in range(ACCEPTS):
            try:
                connection, address = sock.accept()
            except (BlockingIOError, InterruptedError):
                return
            except ConnectionAbortedError:
                continue
            except OSError as error:
                if error.errno not in EXHAUSTED:
                    raise
                self._pause(sock, error)
                return
            if self._is_exhausted:
                self._is_exhausted = False
                logger.info("accepting connections again")
            self._handle_connection(connection, address)

    def _pause(self, sock: socket.socket, error: OSError) -> None:
        """No descriptor is free: new connections wait in the system's queue."""
        loop = ioloop.IOLoop.current()
        loop.remove_handler(sock)
        self._handlers[sock.fileno()] = lambda: None
        if not self._is_exhausted:
            self._is_exhausted = True
            logger.error(
                "cannot accept connections at the moment (%s); retrying every second",
                os.strerror(error.errno or 0),
            )
        for _ in range(EVICTED):
            self._make_way()
        loop.call_later(PAUSE_S, self._go_on, sock)

    def _go_on(self, sock: socket.socket) -> None:
        if sock.fileno() in self._sockets:  # not stopped in the meantime
            self._listen(sock)

    def handle_stream(self, stream: iostream.IOStream, address: Any) -> None:
        place = place_of(address)
        is_many = place == OURSELVES or self._is_shared(str(address[0]))
        most = self._most if is_many else max(1, self._most // 2)
        if self._counts[place] >= most:
            self._make_way(place)
        elif len(self._places) >= self._most:
            self._make_way()
        if self._counts[place] >= most or len(self._places) >= self._most:
            stream.close()
            return
        self._places[stream] = place
        self._counts[place] += 1
        self._note(stream, idle=True)
        self._heads.bound(stream)
        super().handle_stream(stream, address)

    def start_request(self, server_conn: object, request_conn: Any) -> Any:
        delegate = super().start_request(server_conn, request_conn)
        assert isinstance(server_conn, HTTP1ServerConnection)
        stream = server_conn.stream
        self._note(stream, idle=True)
        return _Watched(delegate, lambda: self._note(stream, idle=False))

    def _note(self, stream: iostream.IOStream, *, idle: bool) -> None:
        place = self._places.get(stream)
        if place is None:
            return
        known = self._idle.setdefault(place, OrderedDict())
        known.pop(stream, None)
        if idle:
            known[stream] = None

    def on_close(self, server_conn: object) -> None:
        super().on_close(server_conn)
        assert isinstance(server_conn, HTTP1ServerConnection)
        stream = server_conn.stream
        if stream.closed():
            self._forget(stream)
        else:  # a WebSocket has it now, and counts until it is closed
            stream.set_close_callback(lambda: self._forget(stream))

    def _forget(self, stream: iostream.IOStream) -> None:
        self._note(stream, idle=False)
        place = self._places.pop(stream, None)
        if place is None:
            return
        self._counts[place] -= 1
        if not self._counts[place]:
            del self._counts[place], self._idle[place]

    def _make_way(self, place: str | None = None) -> None:
        """Close the longest idle connection, of ``place`` or of the address with the most."""
        for each in [place] if place is not None else [p for p, _ in self._counts.most_common()]:
            idle = next(iter(self._idle.get(each, ())), None)
            if idle is not None:
                self._forget(idle)
                idle.close()
                return


class _Watched(httputil.HTTPMessageDelegate):
    """A request's delegate that reports when the whole request has arrived."""

    def __init__(self, delegate: Any, on_whole: Callable[[], None]) -> None:
        self._delegate, self._on_whole = delegate, on_whole

    def headers_received(self, start_line: Any, headers: httputil.HTTPHeaders) -> Any:
        return self._delegate.headers_received(start_line, headers)

    def data_received(self, chunk: bytes) -> Any:
        return self._delegate.data_received(chunk)

    def finish(self) -> None:
        self._on_whole()
        self._delegate.finish()

    def on_connection_close(self) -> None:
        self._delegate.on_connection_close()


def place_of(address: Any) -> str:
    """What a socket's address counts as, see `place`."""
    return place(str(address[0])) if isinstance(address, tuple) and address else OURSELVES
