"""Tornado's side of a chat socket: frames in and out, with bounds. Tornado loop only.

What waits in this process for a client that does not read is one frame; the system's buffer is
bounded too. A message that is too large is refused in words, where Tornado would reset the
connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from tornado import gen, iostream, websocket

from llmkit.gateway.access.held import SMALL_BYTES, Held
from llmkit.gateway.exchange import WRITE_TIMEOUT_S, ClientGoneError
from llmkit.gateway.failures import ApiError
from llmkit.gateway.sockets.messages import Failed, encode, fault_of

__all__ = ["PING_S", "ChatProtocol", "ChatWire"]

PING_S = 30.0
SEND_BUFFER = 128 << 10  # bytes that the system keeps for a client that does not read
LINGER_S, CHUNK = 3.0, 64 << 10
MESSAGE_TOO_BIG, TRY_LATER = 1009, 1013
TEXT = 0x1
LONGEST_HEAD = 8  # bytes that are read at once of what stands before a frame's data


class ChatProtocol(websocket.WebSocketProtocol13):
    """Frames of one socket. The bytes of long messages are ``held`` for ``who`` sends them.

    Messages are small until ``accept``.
    """

    def __init__(
        self,
        handler: Any,
        max_bytes: int,
        held: Held,
        who: Callable[[], str],
        ping_s: float = PING_S,
    ) -> None:
        params = websocket._WebSocketParams(ping_interval=ping_s, max_message_size=SMALL_BYTES)
        super().__init__(handler, False, params)
        self._max_bytes, self._held, self._who = max_bytes, held, who
        self._holder, self._num_held = "", 0
        self._lingering: asyncio.Task[None] | None = None

    def accept(self) -> None:
        """Messages may be as long as bodies from now on."""
        self.params.max_message_size = self._max_bytes

    def write_text(self, frame: bytes) -> asyncio.Future[None]:
        return self._write_frame(True, TEXT, frame)

    async def _receive_frame(self) -> None:
        try:
            await super()._receive_frame()
        except BaseException:
            self._let_go()
            raise
        if self._fragmented_message_buffer is None:
            self._let_go()

    async def _read_bytes(self, n: int) -> bytes:
        if n > SMALL_BYTES or (self._fragmented_message_buffer and n > LONGEST_HEAD):
            try:
                self._hold(n)
            except ApiError as error:
                self._refuse(TRY_LATER, error)
                raise iostream.StreamClosedError from None
        return await super()._read_bytes(n)

    def _hold(self, n: int) -> None:
        if not self._num_held:
            self._holder = self._who()
        size = n + len(self._fragmented_message_buffer or b"")
        self._held.add(self._holder, n, body=size)
        self._num_held += n

    def _let_go(self) -> None:
        if self._num_held:
            self._held.add(self._holder, -self._num_held)
            self._num_held = 0

    def close(self, code: int | None = None, reason: str | None = None) -> None:
        if code != MESSAGE_TOO_BIG or self.server_terminated:
            super().close(code, reason)
            return
        most = self.params.max_message_size
        message = f"The message is larger than {most} bytes."
        if most < self._max_bytes:
            message += " Authenticate first."
        self._refuse(code, ApiError(413, message, code="request_too_large"))

    def _refuse(self, code: int, error: ApiError) -> None:
        """Say why, and read on for a moment: closing on unread bytes would reset the connection,
        and take the answer with it."""
        self._lingering = asyncio.ensure_future(self._linger())
        with contextlib.suppress(iostream.StreamClosedError):
            self.write_text(encode(Failed(fault_of(error))))
        super().close(code, error.code)
        self.client_terminated = True  # nothing more is taken from it

    async def _linger(self) -> None:
        with contextlib.suppress(iostream.StreamClosedError, TimeoutError):
            async with asyncio.timeout(LINGER_S):
                while True:
                    await self.stream.read_bytes(CHUNK, partial=True)
        self._lingering = None
        self._abort()

    def _abort(self) -> None:
        if self._lingering is None or self.stream.closed():
            super()._abort()


class ChatWire:
    """A `Wire` over such a protocol."""

    def __init__(self, protocol: ChatProtocol, stall_s: float = WRITE_TIMEOUT_S) -> None:
        self._protocol, self._stall_s = protocol, stall_s
        self._turn = asyncio.Lock()  # so that one frame waits at most
        protocol.set_nodelay(True)
        with contextlib.suppress(OSError):
            protocol.stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)

    async def send(self, frame: bytes) -> None:
        async with self._turn:
            if self._protocol.is_closing():
                raise ClientGoneError
            try:
                sent = self._protocol.write_text(frame)
                if not self._protocol.stream.writing():
                    return  # the system has it all; awaiting would only cost a turn of the loop
                await gen.with_timeout(
                    timedelta(seconds=self._stall_s),
                    sent,
                    quiet_exceptions=iostream.StreamClosedError,
                )
            except (iostream.StreamClosedError, TimeoutError) as error:
                self._protocol.stream.close()
                raise ClientGoneError from error

    def accept(self) -> None:
        self._protocol.accept()

    def close(self, code: int, reason: str) -> None:
        if not self._protocol.is_closing():
            self._protocol.close(code, reason[:100])
