"""The kernel's end of the bridge: one thread that serves one `EngineClient` over ZMQ.

It sends one message per engine step and connection, never one per token, and knows nothing of HTTP: that stays out of the kernel.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from hmac import compare_digest
from typing import Any

import zmq

from llmkit.bridge import connection as files
from llmkit.bridge import messages as m
from llmkit.client import EngineClient
from llmkit.errors import EngineError, LLMKitError, QueueFullError
from llmkit.stream import Stream
from llmkit.types import Embeddings, Inquiry

__all__ = ["BridgeServer"]

PEER_TIMEOUT_S = 1.75
TICK_MS = 250
MAX_ASKED = 64


@dataclass(slots=True)
class Peer:
    """One connected client and its running requests."""

    last_seen: float
    owner: tuple[int, float] | None = None  # a process (pid, start time) that may be silent as long as it lives
    streams: dict[str, Stream] = field(default_factory=dict)


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
    """Serves ``client`` under a connection file until ``close``.

    ``kernel_id`` ties it to a Jupyter kernel, None to the process only. Over ``tcp`` (the way on Windows) everything is encrypted by CURVE: others may open
    the port, but the server's public key and ours are only in the file.
    """

    def __init__(self, client: EngineClient, kernel_id: str | None = None, *, tcp: bool = sys.platform == "win32") -> None:
        self._client = client
        self._pid = os.getpid()
        self._waker = Waker()
        self._closing: str | None = None
        self._peers: dict[bytes, Peer] = {}
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="llmkit-inquiry")
        self._asked: list[tuple[bytes, str, Future[dict[str, Any]]]] = []
        self._embedding: list[tuple[bytes, str, Future[Embeddings]]] = []
        connection = files.make_connection(client.description, kernel_id, time.time(), tcp=tcp)
        self._zmq = zmq.Context()
        self._socket = self._zmq.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 200)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._socket.setsockopt(zmq.SNDHWM, 10_000)
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
        if self._pid != os.getpid() or self._closing is not None:
            return
        self._closing = reason
        self._waker()
        self._thread.join(2)
        files.remove(self.connection)

    # -- bridge thread

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._waker.fileno, zmq.POLLIN)
        turned = time.monotonic()
        while self._closing is None:
            events = dict(poller.poll(TICK_MS))
            before, turned = turned, time.monotonic()
            if turned - before > PEER_TIMEOUT_S / 2:
                self._excuse()
            if self._waker.fileno in events:
                self._waker.clear()
            # Everything that waits is read before anybody is judged silent.
            while self._receive():
                pass
            self._send_news()
            self._send_vectors()
            self._send_answers()
            self._drop_silent()
        for identity in self._peers:
            self._send(identity, m.GOODBYE, {"reason": self._closing})
        self._abort_all()
        self._worker.shutdown(wait=False, cancel_futures=True)
        self._socket.close()
        self._zmq.term()
        self._waker.close()

    def _receive(self) -> bool:
        try:
            frames = self._socket.recv_multipart(zmq.NOBLOCK)
        except zmq.Again:
            return False
        with contextlib.suppress(Exception):  # garbage from a peer is dropped
            identity, kind, payload = frames
            self._handle(identity, kind, m.unpack(payload))
        return True

    def _handle(self, identity: bytes, kind: bytes, data: Any) -> None:
        if kind == m.HELLO:
            if compare_digest(str(data["key"]).encode(), self.connection.key.encode()):
                owner = data.get("owner")
                self._peers[identity] = Peer(time.monotonic(), (int(owner[0]), float(owner[1])) if owner else None)
                self._send(identity, m.WELCOME, {"description": m.description_to(self._client.description)})
            else:
                self._send(identity, m.DENIED, {"key": True})
            return
        peer = self._peers.get(identity)
        if peer is None:  # unknown, or dropped while it was silent: it says HELLO again
            self._send(identity, m.DENIED, {})
            return
        peer.last_seen = time.monotonic()
        if kind == m.PING:
            self._send(identity, m.PONG, m.stats_to(self._client.stats()))
        elif kind == m.ABORT:
            if data["id"] in peer.streams:
                self._client.abort(data["id"])
        elif kind == m.SUBMIT:
            self._submit(identity, peer, data)
        elif kind == m.EMBED:
            self._embed(identity, data)
        elif kind == m.INQUIRE:
            self._answer(identity, data)

    def _submit(self, identity: bytes, peer: Peer, data: dict[str, Any]) -> None:
        try:
            stream = self._client.submit(m.request_from(data))
        except Exception as error:
            failure = error if isinstance(error, LLMKitError) else EngineError(f"the request could not be read: {error!r}")
            self._send(identity, m.EVENTS, [[], [[data["id"], None, m.error_to(failure)]]])
            return
        peer.streams[data["id"]] = stream
        stream.listen(self._waker)

    def _embed(self, identity: bytes, data: dict[str, Any]) -> None:
        try:
            future = self._client.embed(m.embedding_request_from(data))
        except Exception as error:
            failure = error if isinstance(error, LLMKitError) else EngineError(f"the request could not be read: {error!r}")
            self._send(identity, m.EMBEDDED, [data["id"], None, m.error_to(failure)])
            return
        self._embedding.append((identity, data["id"], future))
        future.add_done_callback(lambda _: self._waker())

    def _answer(self, identity: bytes, data: dict[str, Any]) -> None:
        """On a thread of its own: a long text takes a while, and the streams must not wait."""
        if len(self._asked) >= MAX_ASKED:
            self._send(identity, m.ANSWER, [data["id"], None, m.error_to(QueueFullError("too many questions wait already; try again later"))])
            return
        future = self._worker.submit(self._inquire, Inquiry(data["id"], data["kind"], data["data"]))
        self._asked.append((identity, data["id"], future))
        future.add_done_callback(lambda _: self._waker())

    def _inquire(self, inquiry: Inquiry) -> dict[str, Any]:
        return self._client.inquire(inquiry).result()

    def _send_answers(self) -> None:
        for entry in [e for e in self._asked if e[2].done()]:
            self._asked.remove(entry)
            identity, request_id, future = entry
            error = future.exception()
            failure = error if error is None or isinstance(error, LLMKitError) else EngineError(f"the question could not be answered: {error!r}")
            self._send(identity, m.ANSWER, [request_id, future.result(), None] if failure is None else [request_id, None, m.error_to(failure)])

    def _send_vectors(self) -> None:
        for entry in [e for e in self._embedding if e[2].done()]:
            self._embedding.remove(entry)
            identity, request_id, future = entry
            error = future.exception()
            if error is not None:
                self._send(identity, m.EMBEDDED, [request_id, None, m.error_to(error if isinstance(error, Exception) else EngineError(repr(error)))])
            else:
                self._send(identity, m.EMBEDDED, [request_id, m.embeddings_to(future.result()), None])

    def _send_news(self) -> None:
        for identity, peer in self._peers.items():
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
        with contextlib.suppress(zmq.ZMQError):  # the peer is gone; it will be noticed as silent
            self._socket.send_multipart([identity, kind, m.pack(data)], zmq.NOBLOCK)

    def _excuse(self) -> None:
        """This thread was held up itself (a cell in C that kept the GIL, a stopped process): what the peers said meanwhile may still be on its way."""
        for peer in self._peers.values():
            peer.last_seen = time.monotonic()

    def _drop_silent(self) -> None:
        now = time.monotonic()
        for identity, peer in list(self._peers.items()):
            alive = peer.owner is not None and files.process_start_time(peer.owner[0]) == peer.owner[1]
            if now - peer.last_seen > PEER_TIMEOUT_S and not alive:
                del self._peers[identity]
                for request_id in peer.streams:
                    self._client.abort(request_id)

    def _abort_all(self) -> None:
        for peer in self._peers.values():
            for request_id in peer.streams:
                self._client.abort(request_id)
