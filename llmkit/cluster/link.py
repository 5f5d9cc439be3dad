"""HTTP from a loop to one server: connections that are kept, answers as they come, cut at any time.

Tornado's own client cannot let go of a request that is silent, and opens a connection for each. No
proxy of the environment is used and no redirect is followed: either would see the key. One loop
only.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

from tornado import httputil, iostream
from tornado.http1connection import HTTP1Connection, HTTP1ConnectionParameters
from tornado.tcpclient import TCPClient

from llmkit.bridge import over_http
from llmkit.cluster.address import Address
from llmkit.errors import EngineError, EngineGoneError

__all__ = ["Link", "Reply"]

CONNECT_S = 10.0
FIRST_S, NEXT_S = 600.0, 60.0  # the longest silence: before an answer begins, and in it
KEPT_S, MAX_KEPT = 10.0, 8  # idle connections; servers drop theirs after 20 s or more
MAX_BODY, MAX_EVENT = 256 << 20, 64 << 20
ENDS = b"\n\n"


@dataclass(slots=True)
class Reply:
    """A whole answer; header names are lower case. That of a stream of events has no body."""

    status: int
    headers: dict[str, str]
    body: bytes


class Receiver(httputil.HTTPMessageDelegate):
    """Takes in an answer: its events one by one, anything else whole."""

    def __init__(self, on_event: Callable[[bytes], None] | None) -> None:
        self.status, self.headers = 0, httputil.HTTPHeaders()
        self.is_whole = False
        self.failure: Exception | None = None
        self.heard_at = time.monotonic()
        self._on_event, self._has_events = on_event, False
        self._parts: list[bytes] = []
        self._size = 0

    @property
    def body(self) -> bytes:
        return b"".join(self._parts)

    def headers_received(
        self,
        start_line: httputil.RequestStartLine | httputil.ResponseStartLine,
        headers: httputil.HTTPHeaders,
    ) -> None:
        assert isinstance(start_line, httputil.ResponseStartLine)
        self.heard_at = time.monotonic()
        self.status, self.headers = start_line.code, headers
        kind = headers.get("Content-Type", "")
        self._has_events = start_line.code == 200 and kind.startswith(over_http.EVENT_STREAM)

    def data_received(self, chunk: bytes) -> None:
        self.heard_at = time.monotonic()
        if self.failure is not None:
            return
        if not (self._has_events and self._on_event):
            self._size += len(chunk)
            if self._size > MAX_BODY:
                self.failure = EngineError(f"the answer is longer than {MAX_BODY >> 20} MiB")
                self._parts.clear()
            else:
                self._parts.append(chunk)
            return
        try:
            self._take(chunk)
        except Exception as error:
            self.failure = error

    def _take(self, chunk: bytes) -> None:
        assert self._on_event is not None
        if self._parts or not chunk.endswith(ENDS):
            self._size += len(chunk)
            if self._size > MAX_EVENT:
                raise EngineError(f"an event is longer than {MAX_EVENT >> 20} MiB")
            self._parts.append(chunk)
            # Its end may lie across two chunks.
            if ENDS not in (self._parts[-2][-1:] if len(self._parts) > 1 else b"") + chunk:
                return
            whole, _, rest = self.body.rpartition(ENDS)
            self._parts, self._size = [rest] if rest else [], len(rest)
            chunk = whole
        for block in chunk.split(ENDS):
            if block.startswith(b"data: "):
                self._on_event(block[6:])

    def finish(self) -> None:
        self.is_whole = True

    def on_connection_close(self) -> None:
        """What is missing is seen by ``is_whole``."""


@dataclass(slots=True, eq=False)
class Wire:
    """A connection; ``used`` before, it may have been closed by the server meanwhile."""

    stream: iostream.IOStream
    used: bool = False
    idle_since: float = field(default_factory=time.monotonic)


class Link:
    """Sends requests to a server.

    Raises `EngineGoneError` when it cannot be reached, or the connection is lost. Cancelling a
    ``send`` closes its connection, by which the server knows.
    """

    def __init__(self, address: Address) -> None:
        self.address = address
        self._client = TCPClient()
        self._tls = ssl.create_default_context() if address.is_secure else None
        self._kept: list[Wire] = []
        self._headers = {
            "Host": address.netloc,
            "User-Agent": "llmkit",
            "Accept-Encoding": "identity",
            over_http.WIRE: over_http.told(),
        }
        if address.key:
            self._headers["Authorization"] = f"Bearer {address.key}"

    async def send(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        on_event: Callable[[bytes], None] | None = None,
    ) -> Reply:
        """The answer, once it is there; ``on_event`` gets the data of its events before."""
        while True:
            wire = await self._wire()
            receiver = Receiver(on_event)
            try:
                is_open = await self._talk(wire, receiver, method, path, body)
            except BaseException:
                wire.stream.close()
                raise
            if receiver.is_whole and is_open:
                self._keep(wire, receiver)
            else:
                wire.stream.close()
            if receiver.failure is not None:
                raise receiver.failure
            if receiver.status and (receiver.is_whole or receiver.status >= 300):
                headers = {name.lower(): text for name, text in receiver.headers.get_all()}
                return Reply(receiver.status, headers, receiver.body)
            if not receiver.status and wire.used:
                continue  # closed while nobody used it: the server has begun nothing
            raise EngineGoneError(
                f"the connection to {self.address.base} was lost"
                + (" in the middle of an answer" if receiver.status else "")
                + "; send the request again"
            )

    async def _talk(
        self, wire: Wire, receiver: Receiver, method: str, path: str, body: bytes | None
    ) -> bool:
        """Send a request and take in its answer. Whether the connection can be used again."""
        parameters = HTTP1ConnectionParameters(max_body_size=1 << 60)
        connection = HTTP1Connection(wire.stream, True, parameters)
        headers = httputil.HTTPHeaders(self._headers)
        if body is not None:
            headers["Content-Type"] = "application/json"
            headers["Content-Length"] = str(len(body))
        start = httputil.RequestStartLine(method, self.address.path + path, "HTTP/1.1")
        async with self._heard(receiver):
            sent = connection.write_headers(start, headers, body)
            sent.add_done_callback(lambda f: f.cancelled() or f.exception())
            connection.finish()
            try:
                is_open = await connection.read_response(receiver)
            except iostream.StreamClosedError:
                return False
        return bool(is_open) and not wire.stream.closed()

    @contextlib.asynccontextmanager
    async def _heard(self, receiver: Receiver) -> AsyncIterator[None]:
        """Ends a wait in which the server is silent for too long."""
        loop = asyncio.get_running_loop()
        timer: asyncio.TimerHandle
        try:
            async with asyncio.timeout(None) as limit:

                def watch() -> None:
                    nonlocal timer
                    most = NEXT_S if receiver.status else FIRST_S
                    left = receiver.heard_at + most - time.monotonic()
                    if left <= 0:
                        limit.reschedule(loop.time())
                    else:
                        timer = loop.call_later(left, watch)

                timer = loop.call_later(NEXT_S, watch)
                try:
                    yield
                finally:
                    timer.cancel()
        except TimeoutError:
            raise EngineGoneError(
                f"{self.address.base} has said nothing for too long; send the request again"
            ) from None

    async def _wire(self) -> Wire:
        """A connection that was kept, or a new one."""
        now = time.monotonic()
        while self._kept:
            wire = self._kept.pop()
            if not wire.stream.closed() and now - wire.idle_since < KEPT_S:
                return wire
            wire.stream.close()
        base = self.address.base
        try:
            async with asyncio.timeout(CONNECT_S):
                stream = await self._client.connect(
                    self.address.host, self.address.port, ssl_options=self._tls
                )
        except (TimeoutError, iostream.StreamClosedError, OSError, UnicodeError) as error:
            raise _unreachable(base, error) from None
        for option, value in (
            (getattr(socket, "TCP_KEEPIDLE", None), 30),
            (getattr(socket, "TCP_KEEPINTVL", None), 10),
        ):
            if option is not None:
                with contextlib.suppress(OSError):
                    stream.socket.setsockopt(socket.IPPROTO_TCP, option, value)
        with contextlib.suppress(OSError):
            stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        stream.set_nodelay(True)
        return Wire(stream)

    def _keep(self, wire: Wire, receiver: Receiver) -> None:
        closes = receiver.headers.get("Connection", "").lower() == "close"
        if closes or len(self._kept) >= MAX_KEPT:
            wire.stream.close()
            return
        wire.used, wire.idle_since = True, time.monotonic()
        self._kept.append(wire)

    def close(self) -> None:
        """Close what is kept."""
        for wire in self._kept:
            wire.stream.close()
        self._kept.clear()
        self._client.close()


def _unreachable(base: str, error: BaseException) -> EngineGoneError:
    real = getattr(error, "real_error", None) or error
    if isinstance(real, ssl.SSLCertVerificationError):
        return EngineGoneError(
            f"the certificate of {base} is not trusted here: {real.verify_message}. With a "
            "certificate of one's own, set $SSL_CERT_FILE to its authority's."
        )
    if isinstance(real, ssl.SSLError):
        return EngineGoneError(f"{base} does not speak TLS: {real.reason or real}. Is it https?")
    if isinstance(real, TimeoutError):
        return EngineGoneError(f"nothing answers at {base} within {CONNECT_S:.0f} s")
    reason = getattr(real, "strerror", None) or str(real) or type(real).__name__
    return EngineGoneError(f"nothing answers at {base}: {reason}")
