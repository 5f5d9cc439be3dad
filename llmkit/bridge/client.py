"""The other end of the bridge: an `EngineClient` for a model in another process. One thread for each engine reads and writes the socket."""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import threading
import time
from concurrent.futures import Future
from typing import Any

import zmq

from llmkit.bridge import messages as m
from llmkit.bridge.connection import Connection, process_start_time
from llmkit.bridge.server import Waker
from llmkit.errors import ContextLengthError, EngineGoneError, InvalidRequestError
from llmkit.stream import Channel, Stream
from llmkit.types import MAX_CHARS_PER_TOKEN, Delta, EmbeddingRequest, Embeddings, EngineStats, GenerationRequest, Inquiry, ModelDescription

__all__ = ["BridgeClient", "check_size"]

logger = logging.getLogger("llmkit.bridge")

PING_S = 0.5


def check_size(request: GenerationRequest, n_ctx: int) -> None:
    """Refuse what cannot fit the context before it travels. Raises `ContextLengthError`."""
    if request.messages is None:
        size = len(request.prompt or ()) + len(request.suffix or "")
        tokens = size if isinstance(request.prompt, tuple) else size // MAX_CHARS_PER_TOKEN
    else:  # each message and each call is a token at least
        size = sum(len(msg.content) + sum(len(c.arguments) for c in msg.tool_calls) for msg in request.messages)
        tokens = max(size // MAX_CHARS_PER_TOKEN, len(request.messages) + sum(len(msg.tool_calls) for msg in request.messages))
    if tokens >= n_ctx:
        raise ContextLengthError(tokens, n_ctx, "prompt" if request.messages is None else "messages")


class BridgeClient:
    """Reaches the engine of a `Connection`.

    An engine that holds the interpreter (a cell in C that keeps the GIL) only delays the answer: it counts as gone when its process is gone or said
    goodbye, and then every request ends with `EngineGoneError`. It asks the same of the other end, which is told what process this is.
    """

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self._pid = os.getpid()
        self._description = connection.model
        self._stats = EngineStats(num_slots=connection.model.n_slots)
        self._channels: dict[str, Channel] = {}
        self._futures: dict[str, Future[Any]] = {}
        self._lock = threading.Lock()
        self._gone: str | None = None
        self._closed = False
        self._greeting = False
        self._started: float | None = None  # this process, in the system's own unit
        self._outbox: queue.SimpleQueue[tuple[bytes, list[bytes]]] = queue.SimpleQueue()
        self._waker = Waker()
        self._thread = threading.Thread(target=self._run, name="llmkit-bridge-client", daemon=True)
        self._thread.start()

    @property
    def description(self) -> ModelDescription:
        return self._description

    @property
    def gone(self) -> str | None:
        """Why the engine cannot be reached any more; None while it can."""
        return self._gone

    def submit(self, request: GenerationRequest) -> Stream:
        return self.submit_choices(request)[0]

    def submit_choices(self, request: GenerationRequest) -> list[Stream]:
        check_size(request, self._description.n_ctx)
        channels = [Channel(choice, self.abort) for choice in m.choice_ids(request.request_id, request.n)]
        data = m.request_to(request)
        self._check_process()
        with self._lock:
            if self._gone is not None:
                raise EngineGoneError(self._gone)
            self._channels.update((c.request_id, c) for c in channels)
            try:
                self._post(m.SUBMIT, data)
            except BaseException:
                for channel in channels:
                    del self._channels[channel.request_id]
                raise
        return [Stream(channel) for channel in channels]

    def embed(self, request: EmbeddingRequest) -> Future[Embeddings]:
        n_ctx = self._description.n_ctx
        for text in request.inputs:
            size = len(text) // MAX_CHARS_PER_TOKEN if isinstance(text, str) else len(text)
            if n_ctx and size > n_ctx:
                raise ContextLengthError(size, n_ctx, "input")
        return self._expect(request.request_id, m.EMBED, m.embedding_request_to(request))

    def inquire(self, inquiry: Inquiry) -> Future[dict[str, Any]]:
        return self._expect(inquiry.request_id, m.INQUIRE, {"id": inquiry.request_id, "kind": inquiry.kind, "data": inquiry.data, "caller": inquiry.caller})

    def _expect(self, request_id: str, kind: bytes, data: Any) -> Future[Any]:
        """Send what has one answer."""
        future: Future[Any] = Future()
        self._check_process()
        with self._lock:
            if self._gone is not None:
                raise EngineGoneError(self._gone)
            self._futures[request_id] = future
            try:
                self._post(kind, data)
            except BaseException:
                del self._futures[request_id]
                raise
        return future

    def _check_process(self) -> None:
        if self._pid != os.getpid():
            raise EngineGoneError("this connection was made in the parent process before a fork; load or attach the model again here.")

    def abort(self, request_id: str) -> None:
        if self._gone is None:
            self._post(m.ABORT, {"id": request_id})

    def stats(self) -> EngineStats:
        return self._stats

    def close(self) -> None:
        """Disconnect; the model stays loaded where it is."""
        if self._pid != os.getpid():
            return
        self._closed = True
        self._waker()
        if threading.current_thread() is not self._thread:
            self._thread.join(2)

    def _post(self, kind: bytes, data: Any) -> None:
        request_id = data.get("id", "")
        try:
            frames = [m.pack(data)]  # here, so that what cannot be packed fails its caller alone
            if kind in (m.SUBMIT, m.EMBED, m.INQUIRE):
                frames.append(m.pack({"id": request_id, "caller": data.get("caller", ""), "n": data.get("n", 1)}))
            self._outbox.put((kind, frames))
        except (RecursionError, ValueError, TypeError) as error:
            raise InvalidRequestError(f"this request cannot be sent to the engine: {error}") from None
        self._waker()

    # -- bridge client thread

    def _run(self) -> None:
        context = zmq.Context()
        sock = context.socket(zmq.DEALER)
        try:
            self._talk(sock)
        finally:  # whatever happens, nobody may wait forever
            self._lose("the connection to the engine was closed")
            sock.close()
            context.term()
            self._waker.close()

    def _talk(self, sock: zmq.Socket[bytes]) -> None:
        sock.setsockopt(zmq.LINGER, 100)
        sock.setsockopt(zmq.SNDHWM, 0)  # nothing is dropped while a busy kernel does not read; requests are bounded at the gateway
        if self.connection.server_key:
            public, secret = zmq.curve_keypair()
            sock.setsockopt(zmq.CURVE_SERVERKEY, self.connection.server_key.encode())
            sock.setsockopt(zmq.CURVE_PUBLICKEY, public)
            sock.setsockopt(zmq.CURVE_SECRETKEY, secret)
        sock.connect(self.connection.address)
        poller = zmq.Poller()
        poller.register(sock, zmq.POLLIN)
        poller.register(self._waker.fileno, zmq.POLLIN)
        self._greet(sock)
        next_ping = 0.0
        while not self._closed and self._gone is None:
            now = time.monotonic()
            if now >= next_ping:
                next_ping = now + PING_S
                self._send(sock, m.PING, {})
                if not self.connection.is_alive:
                    self._receive_all(sock)  # its last words
                    self._lose(
                        f"the process with the model {self._description.name!r} (pid {self.connection.pid}) has ended: killed or restarted. Load it again."
                    )
                    break
            events = dict(poller.poll(max(0, int((next_ping - now) * 1000))))
            if self._waker.fileno in events:
                self._waker.clear()
            if sock in events:
                self._receive_all(sock)
            self._send_outbox(sock)

    def _send_outbox(self, sock: zmq.Socket[bytes]) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                kind, frames = self._outbox.get_nowait()
                with contextlib.suppress(zmq.Again):
                    sock.send_multipart([kind, *frames], zmq.NOBLOCK)

    def _greet(self, sock: zmq.Socket[bytes]) -> None:
        self._greeting = True
        with contextlib.suppress(OSError):
            self._started = self._started or process_start_time(os.getpid())
        owner = [os.getpid(), self._started] if self._started else None
        self._send(sock, m.HELLO, {"key": self.connection.key, "owner": owner, "version": m.VERSION})

    @staticmethod
    def _send(sock: zmq.Socket[bytes], kind: bytes, data: Any) -> None:
        with contextlib.suppress(zmq.Again):
            sock.send_multipart([kind, m.pack(data)], zmq.NOBLOCK)

    def _receive_all(self, sock: zmq.Socket[bytes]) -> None:
        with contextlib.suppress(zmq.Again):
            while True:
                kind, payload, *_ = sock.recv_multipart(zmq.NOBLOCK)
                try:
                    self._handle(sock, kind, m.unpack(payload))
                except Exception:  # what one message says wrongly must not end all streams
                    logger.exception("a message of the engine (%r) could not be read", kind)

    def _handle(self, sock: zmq.Socket[bytes], kind: bytes, data: Any) -> None:
        if kind == m.EVENTS:
            self._deliver(*data)
        elif kind == m.EMBEDDED:
            request_id, vectors, failure = data
            self._deliver_answer(request_id, None if vectors is None else m.embeddings_from(vectors), failure)
        elif kind == m.ANSWER:
            self._deliver_answer(*data)
        elif kind == m.PONG:
            self._stats = m.stats_from(data)
        elif kind == m.WELCOME:
            self._greeting = False
            self._description = m.description_from(data["description"])
        elif kind == m.GOODBYE:
            self._lose(f"the model {self._description.name!r} is no longer served: {data['reason']}. Load it again.")
        elif kind == m.DENIED and data.get("key"):
            self._lose("the engine refused the key of its connection file")
        elif kind == m.DENIED and not self._greeting:  # while greeting, it answers what we sent before
            # We were silent for too long (a stopped process, a sleeping laptop) and our requests were aborted; begin again.
            self._fail_all(EngineGoneError("the connection to the engine was lost for a while and this request was aborted; send it again"))
            self._greet(sock)

    def _deliver_answer(self, request_id: str, found: Any, failure: dict[str, Any] | None) -> None:
        future = self._futures.pop(request_id, None)
        if future is None or not future.set_running_or_notify_cancel():
            return
        if found is not None:
            future.set_result(found)
        else:
            future.set_exception(m.error_from(failure) if failure else EngineGoneError("the engine ended this request without a result"))

    def _deliver(self, deltas: list[list[Any]], ends: list[list[Any]]) -> None:
        touched: list[Channel] = []
        for request_id, text, num_tokens, logprobs in deltas:
            channel = self._channels.get(request_id)
            if channel is not None:
                channel.push(Delta(text, num_tokens, m.logprobs_from(logprobs)))
                touched.append(channel)
        for request_id, completion, failure in ends:
            channel = self._channels.pop(request_id, None)
            if channel is None:
                continue
            error = m.error_from(failure) if failure else None
            if completion is None:
                channel.fail(error or EngineGoneError("the engine ended this request without a result"))
            else:
                channel.finish(m.completion_from(completion, request_id, "".join(channel.text_parts), tuple(channel.logprobs)), error)
            touched.append(channel)
        for channel in dict.fromkeys(touched):
            channel.wake()

    def _lose(self, reason: str) -> None:
        with self._lock:
            if self._gone is None:
                self._gone = reason
        self._fail_all(EngineGoneError(self._gone or reason))

    def _fail_all(self, error: Exception) -> None:
        with self._lock:
            channels, futures = list(self._channels.values()), list(self._futures.values())
            self._channels.clear()
            self._futures.clear()
        for future in futures:
            if future.set_running_or_notify_cancel():
                future.set_exception(error)
        for channel in channels:
            channel.fail(error)
        for channel in channels:
            channel.wake()
