"""A client's connection to one engine: its sockets, its greeting, and whether it is still there.

The loop's thread only, but for ``post`` and ``close``. What messages say is the client's affair.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import threading
import time
from collections.abc import Sequence
from typing import Protocol

import zmq
from zmq.utils.monitor import recv_monitor_message

from llmkit.bridge import wire
from llmkit.bridge.connection import Connection
from llmkit.bridge.curve import CurveKeys, beat
from llmkit.bridge.loop import Loop, loop_for
from llmkit.system.process import process_start_time
from llmkit.version import __version__

__all__ = ["EngineLine"]

logger = logging.getLogger("llmkit.bridge")

PING_S = 0.5
SILENT_S = 1.5  # engines answer pings: a request that ends one does so in the middle of talk
MAX_MESSAGES = 256  # read before other engines have a turn
WELCOME_S = 10.0  # for an engine of another host to answer the greeting
# Until a connection is made again. With -1, libzmq would drop what has come and was not yet read:
# the last words.
NEVER_MS = 3_600_000
CLOSED = "the connection to the engine was closed"
FAILED = "the connection to the engine failed"
WATCHED = (
    zmq.EVENT_CLOSED
    | zmq.EVENT_DISCONNECTED
    | zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
)


class Receiver(Protocol):
    """Whose connection it is. All methods are called on the loop's thread."""

    @property
    def is_gone(self) -> bool: ...

    def receive(self, kind: bytes, body: bytes, data: bytes) -> None: ...

    def lose(self, reason: str, *, blameless: bool = False) -> None: ...


class EngineLine:
    """An engine on this host is gone when its process is, one of another host (``keys``) when its
    connection is: that is never made again, since nobody could say what was lost meanwhile. If its
    process was stopped or traced when it ended, or it had been silent, no request is to blame."""

    def __init__(
        self,
        connection: Connection,
        receiver: Receiver,
        *,
        weighs: bool = False,
        keys: CurveKeys | None = None,
        again: str = "",
    ) -> None:
        self._connection, self._receiver = connection, receiver
        self._weighs, self._keys, self._again = weighs, keys, again
        self._outbox: queue.SimpleQueue[tuple[bytes, list[bytes]]] = queue.SimpleQueue()
        self._closed = False
        self._over = threading.Event()
        self._greeted = self._heard = self._started = 0.0
        self._is_secure = False  # both sides have shown their keys
        self.greeting = False
        self._stands = False  # stopped or traced, by the last look at its process
        self._sock: zmq.Socket[bytes] | None = None
        self._monitor: zmq.Socket[bytes] | None = None
        self._loop: Loop | None = None

    def begin(self) -> None:
        """Have the loop drive it; messages may come from now on."""
        self._loop = loop_for(self)

    def post(self, kind: bytes, frames: list[bytes]) -> None:
        """Send a message. Any thread."""
        assert self._loop is not None
        self._outbox.put((kind, frames))
        self._loop.post(self)

    def close(self, patience_s: float) -> None:
        """End the connection, and wait for that. Any thread."""
        assert self._loop is not None
        self._closed = True
        self._loop.post(self)
        if not self._loop.is_here:
            self._over.wait(patience_s)

    def open(self, context: zmq.Context[zmq.Socket[bytes]]) -> Sequence[zmq.Socket[bytes]]:
        sock = self._sock = context.socket(zmq.DEALER)
        sock.setsockopt(zmq.LINGER, 100)
        # Nothing is dropped while a busy kernel does not read; the gateway bounds requests.
        sock.setsockopt(zmq.SNDHWM, 0)
        sockets = [sock]
        if self._keys is not None:
            # Read however busy we are: a heartbeat may wait behind what is not read.
            sock.setsockopt(zmq.RCVHWM, 0)
            sock.setsockopt(zmq.RECONNECT_IVL, NEVER_MS)
            beat(sock)
            self._keys.connect(sock)
            if "[" in self._connection.address:
                sock.setsockopt(zmq.IPV6, 1)
            self._monitor = sock.get_monitor_socket(WATCHED)
            sockets.append(self._monitor)
        elif self._connection.server_key:
            public, secret = zmq.curve_keypair()
            server = self._connection.server_key.encode()
            CurveKeys(public, secret, server).connect(sock)
        sock.connect(self._connection.address)
        self._heard = time.monotonic()
        self.greet()
        return sockets

    def greet(self) -> None:
        """Say who we are."""
        self.greeting, self._greeted = True, time.monotonic()
        with contextlib.suppress(OSError):
            self._started = self._started or process_start_time(os.getpid()) or 0.0
        # Elsewhere a process id means nothing.
        owner = (os.getpid(), self._started) if self._started and self._keys is None else None
        hello = wire.Hello(self._connection.key, owner, wire.VERSION, __version__, self._weighs)
        self._send(wire.HELLO, wire.encode(hello))

    def work(self) -> bool:
        self._receive()
        if self._monitor is not None:
            self._watch(self._monitor)
        if not self._outbox.empty():
            with contextlib.suppress(queue.Empty):
                while True:
                    kind, frames = self._outbox.get_nowait()
                    self._send(kind, *frames)
            # What has come while we sent: the socket's descriptor may not tell of it again.
            self._receive()
        return not self._closed and not self._receiver.is_gone

    def tick(self) -> float:
        self._send(wire.PING, b"{}")
        name = self._connection.model.name
        if self._keys is not None:
            if self.greeting and time.monotonic() - self._greeted > WELCOME_S:
                self._lose_remote(f"the engine of {name!r} does not answer")
        else:
            life = self._connection.life
            if life == "gone":
                self._lose_process()
            self._stands = life in ("stopped", "traced")
        return PING_S

    def _lose_remote(self, reason: str, *, blameless: bool = False) -> None:
        """Its address is for the log: a reason also goes to whoever asks for the model."""
        if not self._receiver.is_gone:  # nor has it said goodbye
            logger.warning("%s; its address is %s", reason, self._connection.address)
        self._receiver.lose(reason, blameless=blameless)

    def _lose_process(self) -> None:
        self._receive_all()  # its last words
        self._receiver.lose(
            f"the process with the model {self._connection.model.name!r} has ended: killed or "
            f"restarted. {self._again}",
            blameless=self._stands,
        )

    def shut(self, failure: Exception | None) -> None:
        try:
            if self._sock is not None and self._keys is None and not self._connection.is_alive:
                self._lose_process()  # before we had looked
            if failure is None:
                self._receiver.lose(CLOSED, blameless=True)
            else:
                self._receiver.lose(f"{FAILED}: {failure!r:.200}", blameless=True)
        finally:
            if self._sock is not None:
                if self._monitor is not None:
                    self._sock.disable_monitor()
                    self._monitor.close(0)
                self._sock.close()
            self._over.set()

    def _send(self, kind: bytes, *frames: bytes) -> None:
        assert self._sock is not None
        with contextlib.suppress(zmq.Again):
            self._sock.send_multipart([kind, *frames], zmq.NOBLOCK)

    def _receive_all(self) -> None:
        while self._receive_some():
            pass

    def _receive(self) -> None:
        """Read what has come; after many messages the rest with the next turn."""
        if self._receive_some():
            assert self._loop is not None
            self._loop.post(self)

    def _receive_some(self) -> bool:
        """Whether there may be more."""
        assert self._sock is not None
        for _ in range(MAX_MESSAGES):
            try:
                kind, body, *more = self._sock.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return False
            self._heard = time.monotonic()
            try:
                self._receiver.receive(kind, body, more[0] if more else b"")
            except Exception:  # one bad message must not end all streams
                logger.exception("a message from the engine (%r) could not be read", kind)
        return True

    def _watch(self, monitor: zmq.Socket[bytes]) -> None:
        """What has become of the connection to another host."""
        with contextlib.suppress(zmq.Again):
            while True:
                event = recv_monitor_message(monitor, zmq.NOBLOCK)["event"]
                if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                    self._is_secure = True
                    continue
                self._receive_all()  # its last words
                silent_s = time.monotonic() - self._heard
                name = self._connection.model.name
                if not self._is_secure:
                    reason = (
                        f"the engine of {name!r} cannot be reached, or does not know our fleet key"
                    )
                elif silent_s > SILENT_S:
                    reason = (
                        f"the connection to the engine of {name!r} was lost after a silence of "
                        f"{silent_s:.1f} s: the process is stopped, its host has ended, or the "
                        "network between"
                    )
                else:
                    reason = (
                        f"the connection to the engine of {name!r} was lost: the process or its "
                        "host has ended, or the network between"
                    )
                is_cut_off = not self._is_secure or silent_s > SILENT_S
                self._lose_remote(reason, blameless=is_cut_off)
