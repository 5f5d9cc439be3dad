"""The HTTP server of a gateway that runs alone: bounded connections, in all and for each address, and it stays up when descriptors run out. Tornado loop only.

Tornado logs a traceback for each accept that fails for want of descriptors, some thousand times a second; here accepting pauses instead, and one line says so.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import logging
import os
import socket
import sys
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from typing import Any

from tornado import httpserver, httputil, ioloop, iostream, web
from tornado.http1connection import HTTP1ServerConnection

__all__ = ["MAX_CONNECTIONS", "SPARE_DESCRIPTORS", "BoundedServer", "place_of", "raise_descriptors"]

logger = logging.getLogger("llmkit.gateway")

MAX_CONNECTIONS = 4096
SPARE_DESCRIPTORS = 64  # for files, engines and the log
HEADER_S, BODY_S = 20.0, 60.0
PAUSE_S = 1.0
EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
ACCEPTS = 64  # connections that are accepted before the loop turns
EVICTED = 16  # idle connections that are closed when no descriptor is free
OURSELVES = "local"


def raise_descriptors() -> int:
    """As many descriptors as this process may have. Returns their number."""
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
    """At most ``most`` connections, half of them of one address (all, where that address is this machine's).

    When there are too many, the one that has been idle for longest makes way, of the address that has the most; if none is idle, the new one is closed. A
    connection is idle until all of its request is here.
    """

    def initialize(self, app: web.Application, *, most: int, max_body_size: int) -> None:  # type: ignore[override]
        super().initialize(app, max_body_size=max_body_size, idle_connection_timeout=HEADER_S, body_timeout=BODY_S)
        self._most = most
        self._places: dict[iostream.IOStream, str] = {}
        self._idle: dict[str, OrderedDict[iostream.IOStream, None]] = {}  # by address, the longest first
        self._counts: Counter[str] = Counter()
        self._is_exhausted = False

    # -- accepting

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
                logger.info("connections are accepted again")
            self._handle_connection(connection, address)

    def _pause(self, sock: socket.socket, error: OSError) -> None:
        """No descriptor is free: whoever has one goes on, new ones wait in the system's queue."""
        loop = ioloop.IOLoop.current()
        loop.remove_handler(sock)
        self._handlers[sock.fileno()] = lambda: None
        if not self._is_exhausted:
            self._is_exhausted = True
            logger.error("no connection can be accepted at the moment (%s); retrying every second", os.strerror(error.errno or 0))
        for _ in range(EVICTED):
            self._make_way()
        loop.call_later(PAUSE_S, self._go_on, sock)

    def _go_on(self, sock: socket.socket) -> None:
        if sock.fileno() in self._sockets:  # not stopped meanwhile
            self._listen(sock)

    # -- which connections there are

    def handle_stream(self, stream: iostream.IOStream, address: Any) -> None:
        place = place_of(address)
        most = self._most if place == OURSELVES else max(1, self._most // 2)
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
        self._forget(server_conn.stream)

    def _forget(self, stream: iostream.IOStream) -> None:
        self._note(stream, idle=False)
        place = self._places.pop(stream, None)
        if place is None:
            return
        self._counts[place] -= 1
        if not self._counts[place]:
            del self._counts[place], self._idle[place]

    def _make_way(self, place: str | None = None) -> None:
        """Close the connection that has been idle for longest, of ``place`` or of whoever has the most."""
        for each in [place] if place is not None else [p for p, _ in self._counts.most_common()]:
            idle = next(iter(self._idle.get(each, ())), None)
            if idle is not None:
                self._forget(idle)
                idle.close()
                return


class _Watched(httputil.HTTPMessageDelegate):
    """A request's delegate that says when the whole request is here."""

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
    """Whom connections from an address count for: this machine, an IPv4 address, or the /64 that one IPv6 host has to itself."""
    if not isinstance(address, tuple) or not address:
        return OURSELVES
    ip = ipaddress.ip_address(str(address[0]).partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        ip = ip.ipv4_mapped or ip
    if ip.is_loopback:
        return OURSELVES
    return str(ip) if isinstance(ip, ipaddress.IPv4Address) else str(ipaddress.ip_network((ip, 64), strict=False))
