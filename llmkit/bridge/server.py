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

import zmq

from llmkit.bridge import connection as files
from llmkit.bridge import wire
from llmkit.bridge.intake import Intake
from llmkit.bridge.peers import Peer
from llmkit.bridge.waker import Waker
from llmkit.protocol.client import EngineClient
from llmkit.system.process import life_of
from llmkit.version import __version__

__all__ = ["BridgeServer"]

logger = logging.getLogger("llmkit.bridge")

PEER_TIMEOUT_S = 1.75  # of silence, after which the peer's process is checked
UNLOADED = "another program of yours unloaded it"
STOPPED_S = 60.0  # after which a stopped process (SIGSTOP) is given up
TICK_MS = 250
MAX_MESSAGES = 256  # read before news is sent


class BridgeServer:
    """Serves ``client`` under a connection file until ``close``, or until ``client`` is gone.

    ``kernel_id`` ties it to a Jupyter kernel; None ties it to the process only. With ``tcp`` (as on
    Windows) traffic is encrypted with CURVE: anyone may open the port, but only the file holds the
    key and the server's public key.
    """

    def __init__(
        self,
        client: EngineClient,
        kernel_id: str | None = None,
        *,
        tcp: bool = sys.platform == "win32",
    ) -> None:
        self._client = client
        self._pid = os.getpid()
        self._waker = Waker()
        self._closing: str | None = None
        self._peers: dict[bytes, Peer] = {}
        self._intake = Intake(client, self._waker, self._send, self._is_connected)
        connection = files.make_connection(client.description, kernel_id, time.time(), tcp=tcp)
        self._zmq = zmq.Context()
        self._socket = self._zmq.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 200)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        # Nothing is dropped: messages wait here for a busy client, and a missing one is an error.
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        if tcp:
            public, secret = zmq.curve_keypair()
            self._socket.setsockopt(zmq.CURVE_SERVER, 1)
            self._socket.setsockopt(zmq.CURVE_SECRETKEY, secret)
            connection = replace(connection, server_key=public.decode())
        self._socket.bind(connection.address)
        if tcp:
            connection = replace(
                connection, address=self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
            )
        self.connection = replace(connection, path=files.write(connection))
        self._thread = threading.Thread(target=self._run, name="llmkit-bridge", daemon=True)
        self._thread.start()

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

    def close(self, reason: str = "the model was unloaded") -> None:
        """Tell the clients, stop the thread, remove the file. Does nothing in a forked child."""
        if self._pid != os.getpid():
            return
        if self._closing is None:
            self._closing = reason
            self._waker()
        self._thread.join(2)

    def _run(self) -> None:
        try:
            self._serve()
        except BaseException as error:  # clients must not wait for a dead thread
            logger.exception("the bridge stopped")
            self._closing = f"its bridge stopped: {error!r:.300}"
        for identity in list(self._peers):
            self._send(
                identity,
                wire.GOODBYE,
                wire.encode(wire.Goodbye(self._closing or "the model was unloaded")),
            )
        for identity in list(self._peers):
            self._drop(identity)
        files.remove(self.connection)
        self._intake.close()
        self._socket.close()
        self._zmq.term()
        self._waker.close()

    def _serve(self) -> None:
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._waker.fileno, zmq.POLLIN)
        more = False
        while self._closing is None:
            events = dict(poller.poll(0 if more else TICK_MS))
            if self._waker.fileno in events:
                self._waker.clear()
            more = self._receive_some()
            self._intake.settle()
            self._send_news()
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
        self, identity: bytes, kind: bytes, payload: bytes, header: bytes = b"", *_: bytes
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
                self._intake.submit(peer, about.id, about.n, caller, payload)
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
        self._send(
            identity,
            wire.WELCOME,
            wire.encode(wire.Welcome(self._client.description, wire.VERSION, __version__)),
        )

    def _send_news(self) -> None:
        for identity, peer in list(self._peers.items()):
            events = wire.Events(news=[], ends=[])
            for request_id, stream in list(peer.streams.items()):
                news, completion = stream.take()
                if news:
                    logprobs = tuple(p for d in news for p in d.logprobs)
                    events.news.append(
                        wire.News(
                            request_id,
                            "".join(d.text for d in news),
                            sum(d.num_tokens for d in news),
                            logprobs,
                        )
                    )
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
        """Drop silent peers whose process has ended, or has been stopped for long.

        One that is merely busy (a cell in C code that holds the GIL) stays.
        """
        now = time.monotonic()
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

    def _drop(self, identity: bytes) -> None:
        """Forget a peer and abort its requests."""
        peer = self._peers.pop(identity, None)
        if peer is not None:
            self._intake.abort_all(peer)

    def _is_connected(self, peer: Peer) -> bool:
        return self._peers.get(peer.identity) is peer
