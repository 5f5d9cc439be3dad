"""Prepares the requests of a bridge server on worker threads, before they reach the engine.

Parsing large requests, templates, tokenizing, grammars and writing large answers take time, so they
run on lanes: one queue per caller, and a long request delays nobody else's. All methods are for the
bridge thread unless marked otherwise. Knows no sockets: ``send`` does the sending.
"""

from __future__ import annotations

import contextlib
import logging
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from typing import Literal, Protocol, TypeVar

from llmkit.bridge import wire
from llmkit.bridge.inquiries import decode_inquiry, encode_answer
from llmkit.bridge.peers import Peer, Preparation
from llmkit.bridge.waker import Waker
from llmkit.errors import (
    DrainingError,
    EngineError,
    InvalidRequestError,
    LLMKitError,
    QueueFullError,
)
from llmkit.protocol import (
    Completion,
    EmbeddingRequest,
    Embeddings,
    FinishReason,
    GenerationRequest,
    Unload,
)
from llmkit.protocol.client import EngineClient
from llmkit.protocol.stream import Stream
from llmkit.system.lanes import Lanes

__all__ = ["Intake", "Send"]

logger = logging.getLogger("llmkit.bridge")

Asked = TypeVar("Asked", GenerationRequest, EmbeddingRequest)

MAX_PREPARING = 1024  # requests per caller being read, rendered and tokenized
MAX_ASKED = 64  # inquiries per caller
ABORTED = Completion("", FinishReason.ABORT)


class Send(Protocol):
    """Sends a message to a client."""

    def __call__(self, identity: bytes, kind: bytes, *frames: bytes) -> None: ...


class Intake:
    """Hands requests to ``client``; their streams go to the `Peer`, single answers to ``send``.

    ``is_connected`` tells whether a peer is still there.
    """

    def __init__(
        self,
        client: EngineClient,
        waker: Waker,
        send: Send,
        is_connected: Callable[[Peer], bool],
    ) -> None:
        self._client = client
        self._waker = waker
        self._send = send
        self._is_connected = is_connected
        self._lanes = Lanes(2, "llmkit-prepare")
        self._notes: deque[Callable[[], None]] = deque()  # from the lanes, for the bridge thread
        self.unloading: Literal["", "begun", "done"] = ""  # because a client asked for it
        self.draining = False  # nothing new is begun

    def settle(self) -> None:
        """Do what the lanes have left for the bridge thread."""
        while self._notes:
            note = self._notes.popleft()
            try:
                note()
            except Exception:  # one request's fault must not end the bridge
                logger.exception("a request of the bridge failed")

    def close(self) -> None:
        self._lanes.close()

    def submit(
        self,
        peer: Peer,
        request_id: str,
        n: int,
        caller: str,
        payload: bytes,
        sound: bytes = b"",
    ) -> None:
        ids = wire.choice_ids(request_id, n)
        if self.draining:
            return self._refuse(peer, ids, None, _draining())
        if any(i in peer.preparing or i in peer.streams for i in ids):
            raise InvalidRequestError(f"the id {request_id!r} is in use.")
        preparation = Preparation(set(ids))

        def work() -> None:
            if not preparation.ids:
                self._later(lambda: self._refuse(peer, ids, ABORTED))
                return
            try:
                request = wire.together(_weighed(peer, wire.decode_request(payload)), sound)
                if (request.request_id, request.n) != (request_id, n):
                    raise InvalidRequestError("the request and its header differ.")
                streams = (
                    [self._client.submit(request)]
                    if request.n == 1
                    else self._client.submit_choices(request)
                )
            except BaseException as error:  # even a library's panic must reach the caller
                failure = (
                    error
                    if isinstance(error, LLMKitError)
                    else EngineError(f"the request could not be read: {error!r:.500}")
                )
                if preparation.ids:
                    self._later(lambda: self._refuse(peer, ids, None, failure))
                else:
                    self._later(lambda: self._refuse(peer, ids, ABORTED))
                return
            self._later(lambda: self._submitted(peer, preparation, streams))

        try:
            peer.preparing.update(dict.fromkeys(ids, preparation))
            preparation.future = self._prepare(peer, caller, MAX_PREPARING, work)
        except QueueFullError as error:
            self._refuse(peer, ids, None, error)

    def embed(self, peer: Peer, request_id: str, caller: str, payload: bytes) -> None:
        if self.draining:
            failure = wire.Failure.of(_draining())
            return self._answer(peer, wire.Embedded(request_id, failure=failure))
        preparation = peer.asking[request_id] = Preparation({request_id})

        def work() -> None:
            try:
                future = self._client.embed(_weighed(peer, wire.decode(payload, EmbeddingRequest)))
            except BaseException as error:  # even a library's panic must reach the caller
                self._answer(peer, wire.Embedded(request_id, failure=_failure(error)))
                return
            future.add_done_callback(lambda f: self._embedded(peer, request_id, caller, f))
            if not preparation.ids and not future.cancel():  # aborted in the meantime
                self._client.abort(request_id)

        try:
            preparation.future = self._prepare(peer, caller, MAX_PREPARING, work)
        except QueueFullError as error:
            self._answer(peer, wire.Embedded(request_id, failure=_failure(error)))

    def inquire(self, peer: Peer, request_id: str, caller: str, payload: bytes) -> None:
        preparation = peer.asking[request_id] = Preparation({request_id})

        def work() -> None:
            try:
                inquiry = decode_inquiry(payload)
                if isinstance(inquiry.question, Unload):
                    self._unload(peer, request_id)
                    return
                found = self._client.inquire(inquiry).result()
                self._answer(peer, encode_answer(request_id, found))
            except BaseException as error:  # even a library's panic must reach the caller
                self._answer(peer, wire.Answer(request_id, failure=_failure(error)))

        try:
            preparation.future = self._prepare(peer, f"? {caller}", MAX_ASKED, work)
        except QueueFullError as error:
            self._answer(peer, wire.Answer(request_id, failure=_failure(error)))

    def _unload(self, peer: Peer, request_id: str) -> None:
        """Free the memory, then answer; the bridge ends after that.

        Others who ask meanwhile learn from its goodbye.
        """
        if self.unloading:
            return
        self.unloading = "begun"
        try:
            self._client.close()
            answer = encode_answer(request_id, True)
        except BaseException as error:
            answer = wire.Answer(request_id, failure=_failure(error))
        self._answer(peer, answer)
        self._later(self._unloaded)

    def _unloaded(self) -> None:
        self.unloading = "done"

    def abort(self, peer: Peer, request_id: str) -> None:
        preparation = peer.preparing.get(request_id)
        if preparation is not None:
            preparation.ids.discard(request_id)
            if (
                not preparation.ids
                and preparation.future is not None
                and preparation.future.cancel()
            ):
                self._refuse(
                    peer, [i for i, p in peer.preparing.items() if p is preparation], ABORTED
                )
            else:
                self._client.abort(request_id)  # it may still be read
        elif request_id in peer.streams:
            self._client.abort(request_id)
        elif request_id in peer.asking:
            self._stop_asking(peer, request_id)

    def _stop_asking(self, peer: Peer, request_id: str) -> None:
        """Skip vectors or an inquiry that nobody waits for any more."""
        preparation = peer.asking[request_id]
        preparation.ids.clear()
        if preparation.future is not None and preparation.future.cancel():
            self._answer(peer, wire.Answer(request_id, failure=_failure(_aborted())))
        else:
            self._client.abort(request_id)

    def abort_all(self, peer: Peer) -> None:
        """End everything that a peer has running."""
        for preparation in peer.preparing.values():
            preparation.ids.clear()
            if preparation.future is not None:
                preparation.future.cancel()
        for request_id in list(peer.asking):
            self._stop_asking(peer, request_id)
        for request_id in (*peer.preparing, *peer.streams):
            self._client.abort(request_id)

    def _prepare(
        self, peer: Peer, caller: str, most: int, work: Callable[[], None]
    ) -> Future[None]:
        """Run ``work`` on a lane, after the caller's earlier work. Raises `QueueFullError`."""
        busy = peer.num_preparing.get(caller, 0)
        if busy >= most:
            raise QueueFullError(
                f"{busy} requests of this caller are already being read; try again later"
            )
        peer.num_preparing[caller] = busy + 1
        future = self._lanes.submit(_lane(peer, caller), work)

        def done() -> None:
            peer.num_preparing[caller] -= 1
            if not peer.num_preparing[caller]:
                del peer.num_preparing[caller]

        future.add_done_callback(lambda _: self._later(done))
        return future

    def _later(self, note: Callable[[], None]) -> None:
        """From any thread: have the bridge thread run ``note`` soon."""
        self._notes.append(note)
        self._waker()

    def _refuse(
        self,
        peer: Peer,
        ids: list[str],
        completion: Completion | None,
        failure: Exception | None = None,
    ) -> None:
        for request_id in ids:
            peer.preparing.pop(request_id, None)
        ends = [wire.End.of(i, completion, failure) for i in ids]
        self._send(peer.identity, wire.EVENTS, wire.pack(wire.Events(ends=ends)))

    def _submitted(self, peer: Peer, preparation: Preparation, streams: list[Stream]) -> None:
        alive = self._is_connected(peer)
        for stream in streams:
            peer.preparing.pop(stream.request_id, None)
            peer.streams[stream.request_id] = stream
            stream.listen(self._waker)
            if not alive or stream.request_id not in preparation.ids:
                self._client.abort(stream.request_id)

    def _embedded(
        self, peer: Peer, request_id: str, caller: str, future: Future[Embeddings]
    ) -> None:
        """On the engine's thread, so the megabytes of vectors are packed on a lane."""

        def work() -> None:
            error = _aborted() if future.cancelled() else future.exception()
            if error is not None:
                self._answer(peer, wire.Embedded(request_id, failure=_failure(error)))
            else:
                made = future.result()
                embedded = wire.Embedded(request_id, made.size, made.num_tokens)
                self._answer(peer, embedded, made.data)

        with contextlib.suppress(RuntimeError):  # closed in the meantime
            self._lanes.submit(_lane(peer, caller), work)

    def _answer(self, peer: Peer, answer: wire.Answer | wire.Embedded, *data: bytes) -> None:
        """From any thread: answer a request that has a single answer."""
        kind = wire.ANSWER if isinstance(answer, wire.Answer) else wire.EMBEDDED
        try:
            frames = [wire.encode(answer), *data]
        except Exception as error:
            failure = _failure(EngineError(f"this answer cannot be sent: {error!r:.300}"))
            frames = [wire.encode(type(answer)(answer.id, failure=failure))]

        def send() -> None:
            peer.asking.pop(answer.id, None)
            self._send(peer.identity, kind, *frames)

        self._later(send)


def _weighed(peer: Peer, request: Asked) -> Asked:
    """The request, with no more than the usual weight unless its peer knows its callers."""
    return request if peer.weighs or request.weight <= 1 else replace(request, weight=1.0)


def _draining() -> DrainingError:
    return DrainingError("this engine ends soon and takes nothing new; ask another")


def _aborted() -> EngineError:
    return EngineError("this request was aborted")


def _lane(peer: Peer, caller: str) -> str:
    return f"{peer.identity.hex()} {caller}"


def _failure(error: BaseException) -> wire.Failure:
    """An error for the other end; foreign ones become an `EngineError`."""
    known = isinstance(error, LLMKitError)
    return wire.Failure.of(
        error if known else EngineError(f"this could not be answered: {error!r:.500}")
    )
