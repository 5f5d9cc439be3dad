"""The kernel's end of the bridge: one thread that moves messages between one `EngineClient` and ZMQ.

It sends one message per engine step and connection, never one per token, and knows nothing of HTTP: that stays out of the kernel. What takes time (reading a
large request, templates, tokens, grammars, writing a large answer) runs on a few other threads, one queue a caller, so that nobody waits for another's book.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from hmac import compare_digest
from typing import Any

import zmq

from llmkit.bridge import connection as files
from llmkit.bridge import messages as m
from llmkit.client import EngineClient
from llmkit.errors import EngineError, LLMKitError, QueueFullError
from llmkit.lanes import Lanes
from llmkit.stream import Stream
from llmkit.types import Completion, Embeddings, FinishReason, Inquiry

__all__ = ["BridgeServer"]

logger = logging.getLogger("llmkit.bridge")

PEER_TIMEOUT_S = 1.75  # after which it is asked whether the peer's process lives
STOPPED_S = 60.0  # after which a process that was stopped (SIGSTOP) is given up
TICK_MS = 250
MAX_PREPARING = 1024  # requests of a caller that are being read, rendered and tokenized
MAX_ASKED = 64  # questions of a caller
MAX_MESSAGES = 256  # that are read before news are sent


@dataclass(slots=True)
class Preparation:
    """A request on its way to the engine: the ids of its answers, less those that were aborted."""

    ids: set[str]
    future: Future[None] | None = None


@dataclass(slots=True)
class Peer:
    """One connected client and what it has running."""

    last_seen: float
    owner: tuple[int, float] | None = None  # its process (pid, start time): silence means nothing while it lives
    stopped_since: float | None = None
    streams: dict[str, Stream] = field(default_factory=dict)
    preparing: dict[str, Preparation] = field(default_factory=dict)  # by the id of each answer
    embedding: set[str] = field(default_factory=set)
    num_preparing: dict[str, int] = field(default_factory=dict)  # by caller


class Waker:
    """Wakes a poll loop from any thread; many calls before the loop looks cost one byte."""

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


class BridgeServer:
    """Serves ``client`` under a connection file until ``close``, or until ``client`` is gone.

    ``kernel_id`` ties it to a Jupyter kernel, None to the process only. Over ``tcp`` (the way on Windows) everything is encrypted by CURVE: others may open
    the port, but the server's public key and ours are only in the file.
    """

    def __init__(self, client: EngineClient, kernel_id: str | None = None, *, tcp: bool = sys.platform == "win32") -> None:
        self._client = client
        self._pid = os.getpid()
        self._waker = Waker()
        self._closing: str | None = None
        self._peers: dict[bytes, Peer] = {}
        self._lanes = Lanes(2, "llmkit-prepare")
        # What the other threads have made, for this one: what to send, and what to note before.
        self._made: deque[Callable[[], None]] = deque()
        connection = files.make_connection(client.description, kernel_id, time.time(), tcp=tcp)
        self._zmq = zmq.Context()
        self._socket = self._zmq.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 200)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        # Nothing is dropped: what a client that is held up does not read waits here, and one that is gone is an error.
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        if tcp:
            public, secret = zmq.curve_keypair()
            self._socket.setsockopt(zmq.CURVE_SERVER, 1)
            self._socket.setsockopt(zmq.CURVE_SECRETKEY, secret)
            connection = replace(connection, server_key=public.decode())
        self._socket.bind(connection.address)
        if tcp:
            connection = replace(connection, address=self._socket.getsockopt_string(zmq.LAST_ENDPOINT))
        self.connection = replace(connection, path=files.write(connection))
        self._thread = threading.Thread(target=self._run, name="llmkit-bridge", daemon=True)
        self._thread.start()

    @property
    def num_peers(self) -> int:
        return len(self._peers)

    def close(self, reason: str = "the model was unloaded") -> None:
        """Tell the clients, stop the thread, remove the file. A forked child changes nothing."""
        if self._pid != os.getpid():
            return
        if self._closing is None:
            self._closing = reason
            self._waker()
        self._thread.join(2)

    # -- bridge thread

    def _run(self) -> None:
        try:
            self._serve()
        except BaseException as error:  # clients must not wait for a thread that has ended
            logger.exception("the bridge stopped")
            self._closing = f"its bridge stopped: {error!r:.300}"
        for identity in list(self._peers):
            self._send(identity, m.GOODBYE, {"reason": self._closing})
        for identity in list(self._peers):
            self._drop(identity)
        files.remove(self.connection)
        self._lanes.close()
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
            while self._made:
                self._made.popleft()()
            self._send_news()
            self._judge_silent()
            self._closing = self._closing or self._client.gone

    def _receive_some(self) -> bool:
        """Read what has come. True: there may be more."""
        for _ in range(MAX_MESSAGES):
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return False
            try:
                self._handle(*frames)
            except Exception as error:  # garbage from a peer is dropped
                logger.debug("a message of %d frames was dropped: %r", len(frames), error)
        return True

    def _handle(self, identity: bytes, kind: bytes, payload: bytes, header: bytes = b"") -> None:
        """``header`` says briefly what a large ``payload`` is about, so that it need not be read here."""
        if kind == m.HELLO:
            return self._greet(identity, m.unpack(payload))
        peer = self._peers.get(identity)
        if peer is None:  # unknown, or dropped while it was silent: it says HELLO again
            return self._send(identity, m.DENIED, {})
        peer.last_seen, peer.stopped_since = time.monotonic(), None
        if kind == m.PING:
            self._send(identity, m.PONG, m.stats_to(self._client.stats()))
        elif kind == m.ABORT:
            self._abort(identity, peer, m.unpack(payload)["id"])
        else:
            about = m.unpack(header or payload)
            caller = str(about.get("caller") or "")[:1000]
            if kind == m.SUBMIT:
                self._submit(identity, peer, about["id"], int(about.get("n") or 1), caller, payload)
            elif kind == m.EMBED:
                self._embed(identity, peer, about["id"], caller, payload)
            elif kind == m.INQUIRE:
                self._inquire(identity, peer, about["id"], caller, payload)

    def _greet(self, identity: bytes, data: dict[str, Any]) -> None:
        if not compare_digest(str(data["key"]).encode(), self.connection.key.encode()):
            return self._send(identity, m.DENIED, {"key": True})
        owner = data.get("owner")
        self._peers[identity] = Peer(time.monotonic(), (int(owner[0]), float(owner[1])) if owner else None)
        self._send(identity, m.WELCOME, {"version": m.VERSION, "description": m.description_to(self._client.description)})

    def _prepare(self, identity: bytes, peer: Peer, caller: str, most: int, work: Callable[[], None]) -> Future[None]:
        """Run ``work`` on another thread, behind what the caller has there already. Raises `QueueFullError`."""
        busy = peer.num_preparing.get(caller, 0)
        if busy >= most:
            raise QueueFullError(f"{busy} requests of this caller are being read already; try again later")
        peer.num_preparing[caller] = busy + 1
        future = self._lanes.submit(f"{identity.hex()} {caller}", work)

        def done() -> None:
            peer.num_preparing[caller] -= 1
            if not peer.num_preparing[caller]:
                del peer.num_preparing[caller]

        future.add_done_callback(lambda _: self._later(done))
        return future

    def _later(self, note: Callable[[], None]) -> None:
        """From any thread: have the bridge thread do it soon."""
        self._made.append(note)
        self._waker()

    def _submit(self, identity: bytes, peer: Peer, request_id: str, n: int, caller: str, payload: bytes) -> None:
        ids = m.choice_ids(request_id, n)
        preparation = Preparation(set(ids))

        def work() -> None:
            if not preparation.ids:
                aborted = m.completion_to(Completion("", FinishReason.ABORT))
                ended = m.pack([[], [[i, aborted, None] for i in ids]])
                self._later(lambda: self._refused(identity, peer, ids, ended))
                return
            try:
                request = m.request_from(m.unpack(payload))
                streams = [self._client.submit(request)] if request.n == 1 else self._client.submit_choices(request)
            except BaseException as error:  # a panic in a library too: who asked must hear of it
                failure = error if isinstance(error, LLMKitError) else EngineError(f"the request could not be read: {error!r:.500}")
                packed = m.pack([[], [[i, None, m.error_to(failure)] for i in ids]])
                self._later(lambda: self._refused(identity, peer, ids, packed))
                return
            self._later(lambda: self._submitted(identity, peer, preparation, streams))

        try:
            peer.preparing.update(dict.fromkeys(ids, preparation))
            preparation.future = self._prepare(identity, peer, caller, MAX_PREPARING, work)
        except QueueFullError as error:
            self._refused(identity, peer, ids, m.pack([[], [[i, None, m.error_to(error)] for i in ids]]))

    def _refused(self, identity: bytes, peer: Peer, ids: list[str], packed: bytes) -> None:
        for request_id in ids:
            peer.preparing.pop(request_id, None)
        self._send_packed(identity, m.EVENTS, packed)

    def _submitted(self, identity: bytes, peer: Peer, preparation: Preparation, streams: list[Stream]) -> None:
        alive = self._peers.get(identity) is peer
        for stream in streams:
            peer.preparing.pop(stream.request_id, None)
            peer.streams[stream.request_id] = stream
            stream.listen(self._waker)
            if not alive or stream.request_id not in preparation.ids:
                self._client.abort(stream.request_id)

    def _abort(self, identity: bytes, peer: Peer, request_id: str) -> None:
        preparation = peer.preparing.get(request_id)
        if preparation is not None:
            preparation.ids.discard(request_id)
            if not preparation.ids and preparation.future is not None and preparation.future.cancel():
                ids = [i for i, p in peer.preparing.items() if p is preparation]
                aborted = m.completion_to(Completion("", FinishReason.ABORT))
                self._refused(identity, peer, ids, m.pack([[], [[i, aborted, None] for i in ids]]))
        elif request_id in peer.streams or request_id in peer.embedding:
            self._client.abort(request_id)

    def _embed(self, identity: bytes, peer: Peer, request_id: str, caller: str, payload: bytes) -> None:
        peer.embedding.add(request_id)

        def work() -> None:
            if request_id not in peer.embedding:
                return
            try:
                future = self._client.embed(m.embedding_request_from(m.unpack(payload)))
            except BaseException as error:  # a panic in a library too: who asked must hear of it
                self._answered(identity, peer, m.EMBEDDED, request_id, None, error)
                return
            future.add_done_callback(lambda f: self._embedded(identity, peer, request_id, caller, f))

        try:
            self._prepare(identity, peer, caller, MAX_PREPARING, work)
        except QueueFullError as error:
            self._answered(identity, peer, m.EMBEDDED, request_id, None, error)

    def _embedded(self, identity: bytes, peer: Peer, request_id: str, caller: str, future: Future[Embeddings]) -> None:
        def work() -> None:
            error = future.exception()
            self._answered(identity, peer, m.EMBEDDED, request_id, None if error else m.embeddings_to(future.result()), error)

        with contextlib.suppress(RuntimeError):  # closed meanwhile
            self._lanes.submit(f"{identity.hex()} {caller}", work)  # megabytes of text: not on the thread that computes

    def _inquire(self, identity: bytes, peer: Peer, request_id: str, caller: str, payload: bytes) -> None:
        def work() -> None:
            try:
                data = m.unpack(payload)
                found = self._client.inquire(Inquiry(data["id"], data["kind"], data["data"], caller)).result()
            except BaseException as error:  # a panic in a library too: who asked must hear of it
                self._answered(identity, peer, m.ANSWER, request_id, None, error)
            else:
                self._answered(identity, peer, m.ANSWER, request_id, found, None)

        try:
            self._prepare(identity, peer, f"? {caller}", MAX_ASKED, work)
        except QueueFullError as error:
            self._answered(identity, peer, m.ANSWER, request_id, None, error)

    def _answered(self, identity: bytes, peer: Peer, kind: bytes, request_id: str, found: Any, error: BaseException | None) -> None:
        """From any thread: what has one answer has it."""
        failure = error if error is None or isinstance(error, LLMKitError) else EngineError(f"this could not be answered: {error!r:.500}")
        packed = m.pack([request_id, found, None if failure is None else m.error_to(failure)])

        def send() -> None:
            peer.embedding.discard(request_id)
            self._send_packed(identity, kind, packed)

        self._later(send)

    def _send_news(self) -> None:
        for identity, peer in list(self._peers.items()):
            deltas: list[list[Any]] = []
            ends: list[list[Any]] = []
            for request_id, stream in list(peer.streams.items()):
                news, completion = stream.take()
                if news:
                    logprobs = m.logprobs_to([p for d in news for p in d.logprobs])
                    deltas.append([request_id, "".join(d.text for d in news), sum(d.num_tokens for d in news), logprobs])
                if completion is not None:
                    failure = stream.failure
                    ends.append([request_id, m.completion_to(completion), m.error_to(failure) if failure else None])
                    del peer.streams[request_id]
            if deltas or ends:
                self._send(identity, m.EVENTS, [deltas, ends])

    def _send(self, identity: bytes, kind: bytes, data: Any) -> None:
        self._send_packed(identity, kind, m.pack(data))

    def _send_packed(self, identity: bytes, kind: bytes, packed: bytes) -> None:
        try:
            self._socket.send_multipart([identity, kind, packed], zmq.NOBLOCK)
        except zmq.ZMQError:  # it has closed its end
            self._drop(identity)

    def _judge_silent(self) -> None:
        """A process that has ended is gone; one that is stopped, after a while; one that is only held up (a cell in C that keeps the GIL) never."""
        now = time.monotonic()
        for identity, peer in list(self._peers.items()):
            if now - peer.last_seen <= PEER_TIMEOUT_S:
                continue
            life = "gone" if peer.owner is None else files.life_of(*peer.owner)
            if life == "stopped":
                peer.stopped_since = peer.stopped_since or now
                life = "gone" if now - peer.stopped_since > STOPPED_S else life
            else:
                peer.stopped_since = None
                peer.last_seen = now  # asked again in a while
            if life == "gone":
                self._drop(identity)

    def _drop(self, identity: bytes) -> None:
        """Forget a peer, and end what it has running."""
        peer = self._peers.pop(identity, None)
        if peer is None:
            return
        for preparation in peer.preparing.values():
            preparation.ids.clear()
            if preparation.future is not None:
                preparation.future.cancel()
        embedding, peer.embedding = peer.embedding, set()
        for request_id in (*peer.streams, *embedding):
            self._client.abort(request_id)
