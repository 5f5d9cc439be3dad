"""The kernel's end of the bridge: one thread that moves messages between an `EngineClient` and ZMQ.

It sends one message per engine step and connection, never one per token. It knows nothing of HTTP,
which stays out of the kernel. Anything slow is left to the `Intake`.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from dataclasses import replace
from hmac import compare_digest
from pathlib import Path

import zmq

from llmkit.bridge import connection as files
from llmkit.bridge import wire
from llmkit.bridge.curve import CurveKeys, Doorkeeper, beat
from llmkit.bridge.intake import Intake
from llmkit.bridge.peers import Peer
from llmkit.bridge.waker import Waker
from llmkit.errors import ModelLoadError
from llmkit.protocol.client import EngineClient
from llmkit.system.process import life_of
from llmkit.version import __version__

__all__ = ["BridgeServer"]

logger = logging.getLogger("llmkit.bridge")

PEER_TIMEOUT_S = 1.75  # of silence, after which the peer's process is checked
REMOTE_SILENT_S = 0.75  # after which it is asked whether the connection is still there
UNLOADED = "another program of yours unloaded it"
STOPPED_S = 60.0  # after which a stopped process (SIGSTOP) is given up
TICK_MS = 250
MAX_MESSAGES = 256  # read before news is sent


class BridgeServer:
    """Serves ``client`` under a connection file until ``close``, or until ``client`` is gone.

    ``kernel_id`` ties it to a Jupyter kernel; None ties it to the process only. With ``tcp`` (as on
    Windows) traffic is encrypted with CURVE: anyone may open the port, but only the file holds the
    key and the server's public key.

    With ``listen`` (``tcp://HOST:PORT``, port ``*`` for a free one) and ``keys`` it serves other
    hosts instead, and only those that hold the other side's secret key. There is no file then:
    ``connection`` is for whoever announces it. Raises `OSError` if it cannot listen there.
    """

    def __init__(
        self,
        client: EngineClient,
        kernel_id: str | None = None,
        *,
        tcp: bool = sys.platform == "win32",
        listen: str | None = None,
        keys: CurveKeys | None = None,
    ) -> None:
        assert (listen is None) == (keys is None)
        tcp = tcp or listen is not None
        self._client = client
        self._pid = os.getpid()
        self._waker = Waker()
        self._closing: str | None = None
        self._ends_at: float | None = None  # by time.monotonic(), once it drains
        self._is_drained = False
        self._peers: dict[bytes, Peer] = {}
        self._described = client.description
        self._intake = Intake(client, self._waker, self._send, self._is_connected)
        connection = files.make_connection(client.description, kernel_id, time.time(), tcp=tcp)
        if listen is not None:
            connection = replace(connection, address=listen)
        self._zmq = zmq.Context()
        self._doorkeeper = None if keys is None else Doorkeeper(self._zmq, keys)
        self._socket = self._zmq.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 200)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        # Nothing is dropped: messages wait here for a busy client, and a missing one is an error.
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        if keys is not None:
            keys.serve(self._socket)
            beat(self._socket)
            self._socket.setsockopt(zmq.LINGER, 1000)
            self._socket.setsockopt(zmq.IPV6, int("[" in connection.address))
        elif tcp:
            public, secret = zmq.curve_keypair()
            self._socket.setsockopt(zmq.CURVE_SERVER, 1)
            self._socket.setsockopt(zmq.CURVE_SECRETKEY, secret)
            connection = replace(connection, server_key=public.decode())
        self._bind(connection.address)
        if tcp:
            connection = replace(
                connection, address=self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
            )
        try:
            path = Path() if listen is not None else files.write(connection)
        except OSError as error:
            self._close_sockets()
            self._waker.close()
            files.remove(connection)
            raise ModelLoadError(
                f"the model cannot be shared: {files.runtime_dir()} cannot be written "
                f"({error.strerror or error}). Name another folder in JUPYTER_RUNTIME_DIR; in "
                "Python, share=False does without."
            ) from None
        self.connection = replace(connection, path=path)
        self._thread = threading.Thread(target=self._run, name="llmkit-bridge", daemon=True)
        self._thread.start()

    def _bind(self, address: str) -> None:
        try:
            self._socket.bind(address)
        except zmq.ZMQError as error:
            self._close_sockets()
            self._waker.close()
            raise OSError(error.errno, f"{address}: {error.strerror}") from None

    @property
    def alive(self) -> bool:
        """Whether it still serves."""
        return self._thread.is_alive()

    @property
    def is_unloading(self) -> bool:
        """Whether a client has the model unloaded now."""
        return self._intake.unloading == "begun"

    @property
    def reason(self) -> str | None:
        """Why it ends, or has ended."""
        return self._closing

    @property
    def num_peers(self) -> int:
        return len(self._peers)

    @property
    def is_draining(self) -> bool:
        """Whether `drain` was called."""
        return self._ends_at is not None

    @property
    def is_drained(self) -> bool:
        """Whether `drain` has taken effect, and nothing is left to do."""
        return self._is_drained

    def drain(self, seconds: float) -> None:
        """Refuse new requests with `DrainingError` and tell the clients so; running ones go on.

        Clients hear that all ends in so many ``seconds``. It is for the caller to ``close`` then,
        or once it ``is_drained``.
        """
        self._ends_at = time.monotonic() + seconds
        self._waker()

    def close(self, reason: str = "the model was unloaded") -> None:
        """Tell the clients, stop the thread, remove the file. Does nothing in a forked child."""
        if self._pid != os.getpid():
            return
        if self._closing is None:
            self._closing = reason
            self._waker()
        self._thread.join(2)

    def _run(self) -> None:
        has_failed = False
        try:
            self._serve()
        except BaseException as error:  # clients must not wait for a dead thread
            logger.exception("the bridge stopped")
            self._closing, has_failed = f"its bridge stopped: {error!r:.300}", True
        files.remove(self.connection)  # first: whoever hears the goodbye must not find it again
        state = self._client.state
        has_failed = has_failed or (state.is_gone and not state.blameless)
        goodbye = wire.Goodbye(self._closing or "the model was unloaded", has_failed)
        for identity in list(self._peers):
            self._send(identity, wire.GOODBYE, wire.encode(goodbye))
        for identity in list(self._peers):
            self._drop(identity)
        self._intake.close()
        self._close_sockets()
        self._waker.close()

    def _close_sockets(self) -> None:
        self._socket.close()
        if self._doorkeeper is not None:
            self._doorkeeper.close()
        self._zmq.term()

    def _serve(self) -> None:
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._waker.fileno, zmq.POLLIN)
        if self._doorkeeper is not None:
            poller.register(self._doorkeeper.socket, zmq.POLLIN)
        more = False
        while self._closing is None:
            events = dict(poller.poll(0 if more else TICK_MS))
            if self._waker.fileno in events:
                self._waker.clear()
            if self._doorkeeper is not None:
                self._doorkeeper.answer()
            if self._ends_at is not None and not self._intake.draining:
                self._intake.draining = True
                for identity in list(self._peers):
                    self._tell_of_drain(identity, self._ends_at)
            more = self._receive_some()
            self._intake.settle()
            self._tell_of_change()
            self._send_news()
            self._is_drained = self._intake.draining and not any(
                peer.num_requests for peer in self._peers.values()
            )
            self._judge_silent()
            self._end_with_client()

    def _end_with_client(self) -> None:
        """End once the client is gone; if it is being unloaded, once that is done and answered."""
        if self._intake.unloading == "begun":
            return
        if self._intake.unloading == "done":
            self._closing = self._closing or UNLOADED
        elif self._client.state.is_gone:
            self._closing = self._closing or self._client.state.reason or "the engine has ended"

    def _receive_some(self) -> bool:
        """Read pending messages. True: there may be more."""
        for _ in range(MAX_MESSAGES):
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return False
            try:
                self._handle(*frames)
            except Exception as error:  # a peer's garbage is dropped
                logger.debug("dropped a message of %d frames: %r", len(frames), error)
        return True

    def _handle(
        self,
        identity: bytes,
        kind: bytes,
        payload: bytes,
        header: bytes = b"",
        data: bytes = b"",
        *_: bytes,
    ) -> None:
        """``header`` sums up a large ``payload``, which therefore need not be parsed here."""
        if kind == wire.HELLO:
            return self._greet(identity, wire.decode(payload, wire.Hello))
        peer = self._peers.get(identity)
        if peer is None:  # unknown, or dropped while silent: it greets again
            return self._send(identity, wire.DENIED, wire.encode(wire.Denied()))
        peer.last_seen, peer.stopped_since = time.monotonic(), None
        if kind == wire.PING:
            self._send(identity, wire.PONG, wire.pack(self._client.stats()))
        elif kind == wire.ABORT:
            self._intake.abort(peer, wire.decode(payload, wire.Name).id)
        elif kind in (wire.SUBMIT, wire.EMBED, wire.INQUIRE):
            about = wire.decode(header, wire.About)
            caller = about.caller[:1000]
            if kind == wire.SUBMIT:
                self._intake.submit(peer, about.id, about.n, caller, payload, data)
            elif kind == wire.EMBED:
                self._intake.embed(peer, about.id, caller, payload)
            else:
                self._intake.inquire(peer, about.id, caller, payload)

    def _greet(self, identity: bytes, hello: wire.Hello) -> None:
        if not compare_digest(hello.key.encode(), self.connection.key.encode()):
            return self._send(identity, wire.DENIED, wire.encode(wire.Denied(key=True)))
        why = wire.stranger(hello.version, hello.llmkit)
        if why is not None:
            return self._send(identity, wire.GOODBYE, wire.encode(wire.Goodbye(why)))
        self._peers[identity] = Peer(identity, time.monotonic(), hello.owner, weighs=hello.weighs)
        self._welcome(identity)
        if self._ends_at is not None:
            self._tell_of_drain(identity, self._ends_at)

    def _welcome(self, identity: bytes) -> None:
        welcome = wire.Welcome(self._client.description, wire.VERSION, __version__)
        self._send(identity, wire.WELCOME, wire.encode(welcome))

    def _tell_of_change(self) -> None:
        """Welcome all clients again once the model is another than was said."""
        if self._described != (found := self._client.description):
            self._described = found
            for identity in list(self._peers):
                self._welcome(identity)

    def _tell_of_drain(self, identity: bytes, ends_at: float) -> None:
        left = max(0.0, ends_at - time.monotonic())
        self._send(identity, wire.DRAINING, wire.encode(wire.Draining(left)))

    def _send_news(self) -> None:
        for identity, peer in list(self._peers.items()):
            events = wire.Events(news=[], ends=[])
            for request_id, stream in list(peer.streams.items()):
                news, completion = stream.take()
                if news:
                    events.news.append(wire.News.of(request_id, news))
                if completion is not None:
                    events.ends.append(wire.End.of(request_id, completion, stream.failure))
                    del peer.streams[request_id]
            if events.news or events.ends:
                try:
                    packed = wire.pack(events)
                except Exception:  # one client's news must not end the bridge
                    logger.exception("news could not be sent")
                    self._drop(identity)
                    continue
                self._send(identity, wire.EVENTS, packed)

    def _send(self, identity: bytes, kind: bytes, *frames: bytes) -> None:
        try:
            self._socket.send_multipart([identity, kind, *frames], zmq.NOBLOCK)
        except zmq.ZMQError:  # the peer has closed its end
            self._drop(identity)

    def _judge_silent(self) -> None:
        """Drop silent peers whose process has ended, or has been stopped for long; of other hosts,
        those whose connection is lost.

        One that is merely busy (a cell in C code that holds the GIL), or held by a debugger, stays.
        """
        now = time.monotonic()
        if self._doorkeeper is not None:
            return self._judge_remote(now)
        for identity, peer in list(self._peers.items()):
            if now - peer.last_seen <= PEER_TIMEOUT_S:
                continue
            life = "gone" if peer.owner is None else life_of(*peer.owner)
            if life == "stopped":
                peer.stopped_since = peer.stopped_since or now
                life = "gone" if now - peer.stopped_since > STOPPED_S else life
            else:
                peer.stopped_since = None
                peer.last_seen = now  # check again in a while
            if life == "gone":
                self._drop(identity)

    def _judge_remote(self, now: float) -> None:
        for identity, peer in list(self._peers.items()):
            if now - peer.last_seen > REMOTE_SILENT_S:
                peer.last_seen = now  # check again in a while
                # To a connection that is lost nothing can be sent, and that drops the peer.
                self._send(identity, wire.PONG, wire.pack(self._client.stats()))

    def _drop(self, identity: bytes) -> None:
        """Forget a peer and abort its requests."""
        peer = self._peers.pop(identity, None)
        if peer is not None:
            self._intake.abort_all(peer)

    def _is_connected(self, peer: Peer) -> bool:
        return self._peers.get(peer.identity) is peer
