"""The other end of the bridge: an `EngineClient` for a model in another process.

One thread reads and writes the sockets of all of them (`llmkit.bridge.loop`).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from llmkit.bridge import inquiries, wire
from llmkit.bridge.connection import Connection
from llmkit.bridge.curve import CurveKeys
from llmkit.bridge.line import EngineLine
from llmkit.errors import (
    ContextLengthError,
    DrainingError,
    EngineError,
    EngineGoneError,
    InvalidRequestError,
)
from llmkit.protocol import (
    MAX_CHARS_PER_TOKEN,
    EmbeddingRequest,
    Embeddings,
    EngineState,
    EngineStats,
    GenerationRequest,
    Inquiry,
    ModelDescription,
    Origin,
    check_drawing,
    check_size,
)
from llmkit.protocol.stream import Channel, Stream

__all__ = ["BridgeClient"]

Answer = TypeVar("Answer")

CLOSE_S = 2.0


class BridgeClient:
    """Reaches the engine of a `Connection`.

    A busy kernel (a cell in C code that holds the GIL) only delays answers. The engine is gone when
    its process has ended or said goodbye; then every request ends with `EngineGoneError`. The other
    end treats us the same: the greeting names our process. With ``keys`` the engine is one of
    another host, which is gone when the connection is: at once when its process was killed, after
    four seconds when its host is lost. Only with ``weighs`` may requests have weights above 1: for
    gateways, which know their callers. ``again`` is what to do when it has ended.
    """

    def __init__(
        self,
        connection: Connection,
        *,
        weighs: bool = False,
        keys: CurveKeys | None = None,
        again: str = "Load it again.",
    ) -> None:
        self.connection = connection
        self._pid = os.getpid()
        self._description = connection.model
        self._stats = EngineStats(num_slots=connection.model.n_slots)
        self._channels: dict[str, Channel] = {}
        self._futures: dict[str, tuple[Future[Any], EmbeddingRequest | Inquiry[Any]]] = {}
        self._lock = threading.Lock()
        self._gone: str | None = None
        self._draining: str | None = None
        self._is_blameless = False
        self._version = wire.VERSION  # until it says its own
        self._has_answered = False
        self._again = again
        self._line = EngineLine(connection, self, weighs=weighs, keys=keys, again=again)
        self._line.begin()

    @property
    def description(self) -> ModelDescription:
        return self._description

    @property
    def state(self) -> EngineState:
        if self._gone is None and self._draining is not None:
            return EngineState("draining", self._draining)
        return EngineState.gone_for(
            self._gone, blameless=self._is_blameless or self._draining is not None
        )

    @property
    def has_answered(self) -> bool:
        """Whether the engine has ever answered a greeting."""
        return self._has_answered

    @property
    def version(self) -> int:
        """Of the wire, that the engine speaks."""
        return self._version

    @property
    def origin(self) -> Origin:
        return self.connection.origin

    def submit(self, request: GenerationRequest) -> Stream:
        return self.submit_choices(request)[0]

    def submit_choices(self, request: GenerationRequest) -> list[Stream]:
        self._check_taking()
        check_size(request, self._description.n_ctx)
        check_drawing(request, self._description.inputs)
        channels = [
            Channel(choice, self.abort, keeps_text=request.keeps_text)
            for choice in wire.choice_ids(request.request_id, request.n)
        ]
        self._check_process()
        with self._lock:
            if self._gone is not None:
                raise EngineGoneError(self._gone)
            self._channels.update((c.request_id, c) for c in channels)
            try:
                self._post(wire.SUBMIT, request, request.n)
            except BaseException:
                for channel in channels:
                    del self._channels[channel.request_id]
                raise
        return [Stream(channel) for channel in channels]

    def embed(self, request: EmbeddingRequest) -> Future[Embeddings]:
        self._check_taking()
        n_ctx = self._description.n_ctx
        for text in request.inputs:
            size = len(text) // MAX_CHARS_PER_TOKEN if isinstance(text, str) else len(text)
            if n_ctx and size > n_ctx:
                raise ContextLengthError(size, n_ctx, "input")
        return self._expect(wire.EMBED, request)

    def inquire(self, inquiry: Inquiry[Answer]) -> Future[Answer]:
        return self._expect(wire.INQUIRE, inquiry)

    def _expect(self, kind: bytes, request: EmbeddingRequest | Inquiry[Any]) -> Future[Any]:
        """Send a request that has a single answer."""
        request_id = request.request_id
        future: Future[Any] = Future()
        future.add_done_callback(lambda f: self._forget(request_id) if f.cancelled() else None)
        self._check_process()
        with self._lock:
            if self._gone is not None:
                raise EngineGoneError(self._gone)
            self._futures[request_id] = future, request
            try:
                self._post(kind, request)
            except BaseException:
                del self._futures[request_id]
                raise
        return future

    def _forget(self, request_id: str) -> None:
        """Nobody waits for this answer any more."""
        if self._futures.pop(request_id, None) is not None:
            self.abort(request_id)

    def _check_taking(self) -> None:
        if self.state.phase == "draining":
            raise DrainingError(f"{self._draining}; ask another")

    def _check_process(self) -> None:
        if self._pid != os.getpid():
            raise EngineGoneError(
                "this connection was made in the parent process before a fork; "
                "load or attach the model again here."
            )

    def abort(self, request_id: str) -> None:
        if self._gone is None:
            self._line.post(wire.ABORT, [wire.encode(wire.Name(request_id))])

    def stats(self) -> EngineStats:
        return self._stats

    def close(self) -> None:
        """Disconnect; the model stays loaded where it is."""
        if self._pid != os.getpid():
            return
        self._line.close(CLOSE_S)

    def _post(
        self, kind: bytes, request: GenerationRequest | EmbeddingRequest | Inquiry[Any], n: int = 1
    ) -> None:
        try:  # encoded here: what cannot be sent fails its caller alone
            about = wire.encode(wire.About(request.request_id, request.caller, n))
            sound = b""
            if isinstance(request, GenerationRequest):
                request, sound = wire.apart(request)
            body = (
                inquiries.encode_inquiry(request)
                if isinstance(request, Inquiry)
                else wire.encode_request(request)
            )
            self._line.post(kind, [body, about, sound] if sound else [body, about])
        except UnicodeEncodeError:
            raise InvalidRequestError(
                "the text is not valid Unicode: it contains half of a surrogate pair."
            ) from None
        except (RecursionError, ValueError, TypeError) as error:
            raise InvalidRequestError(
                f"this request cannot be sent to the engine: {error}"
            ) from None

    @property
    def is_gone(self) -> bool:
        """Whether the engine is gone."""
        return self._gone is not None

    def receive(self, kind: bytes, body: bytes, data: bytes) -> None:
        """Take in a message of the engine. The loop's thread."""
        if kind == wire.EVENTS:
            self._deliver(wire.unpack(body, kind))
        elif kind == wire.PONG:
            self._stats = wire.unpack(body, kind)
        elif kind == wire.EMBEDDED:
            made = wire.decode(body, wire.Embedded)
            self._deliver_answer(made.id, made.failure, lambda _: made.embeddings(data))
        elif kind == wire.ANSWER:
            answer = wire.decode(body, wire.Answer)
            found = bytes(answer.found)
            self._deliver_answer(
                answer.id,
                answer.failure,
                lambda inquiry: inquiries.decode_answer(found, inquiry.question),
            )
        elif kind == wire.DRAINING:
            left = wire.decode(body, wire.Draining).seconds_left
            self._draining = (
                f"the model {self._description.name!r} takes nothing new and ends "
                f"in {left:.0f} s at most"
            )
        elif kind == wire.WELCOME:
            welcome = wire.decode(body, wire.Welcome)
            self._line.greeting = False
            self._description, self._version = welcome.description, welcome.version
            self._has_answered = True
            why = wire.stranger(welcome.version, welcome.llmkit)
            if why is not None:
                self.lose(f"the model {self._description.name!r} cannot be used: {why}.")
        elif kind == wire.GOODBYE:
            goodbye = wire.decode(body, wire.Goodbye)
            self.lose(
                f"the model {self._description.name!r} is no longer served: "
                f"{goodbye.reason}. {self._again}",
                blameless=not goodbye.failed,
            )
        elif kind == wire.DENIED and wire.decode(body, wire.Denied).key:
            self.lose("the engine refused the key of its connection file")
        elif kind == wire.DENIED and not self._line.greeting:
            # We were silent for too long (a stopped process, a sleeping laptop) and our requests
            # were aborted; start over. (While we greet, it answers what we sent before.)
            self._fail_all(
                EngineGoneError(
                    "the connection to the engine was lost for a while and this request was "
                    "aborted; send it again"
                )
            )
            self._line.greet()

    def _deliver_answer(
        self, request_id: str, failure: wire.Failure | None, read: Callable[[Any], Any]
    ) -> None:
        """Resolve a future; ``read`` makes the result, given its request."""
        future, request = self._futures.pop(request_id, (None, None))
        if future is None or not future.set_running_or_notify_cancel():
            return
        if failure is not None:
            error = failure.error()
            if isinstance(error, EngineGoneError):
                self._has_failed(error)
            future.set_exception(error)
        else:
            try:
                future.set_result(read(request))
            except Exception as error:  # the other end is another version
                future.set_exception(EngineError(f"the answer could not be read: {error}"))

    def _deliver(self, events: wire.Events) -> None:
        touched: list[Channel] = []
        for news in events.news:
            channel = self._channels.get(news.id)
            if channel is not None:
                channel.push(news.delta())
                touched.append(channel)
        for end in events.ends:
            channel = self._channels.pop(end.id, None)
            if channel is None:
                continue
            error = end.failure.error() if end.failure else None
            if isinstance(error, EngineGoneError):
                self._has_failed(error)
            completion = end.completion("".join(channel.text_parts), tuple(channel.logprobs))
            if completion is None:
                channel.fail(
                    error or EngineGoneError("the engine ended this request without a result")
                )
            else:
                channel.finish(completion, error)
            touched.append(channel)
        for channel in dict.fromkeys(touched):
            channel.wake()

    def _has_failed(self, error: EngineGoneError) -> None:
        """The engine says that it has ended by itself: known before anybody hears of it, and goes
        elsewhere."""
        with self._lock:
            self._gone = self._gone or str(error)

    def lose(self, reason: str, *, blameless: bool = False) -> None:
        """The engine is gone; everything that waits for it fails."""
        with self._lock:
            if self._gone is None:
                self._is_blameless = blameless
                self._gone = reason
        self._fail_all(EngineGoneError(self._gone or reason))

    def _fail_all(self, error: Exception) -> None:
        with self._lock:
            channels = list(self._channels.values())
            futures = [future for future, _ in self._futures.values()]
            self._channels.clear()
            self._futures.clear()
        for future in futures:
            if future.set_running_or_notify_cancel():
                future.set_exception(error)
        for channel in channels:
            channel.fail(error)
        for channel in channels:
            channel.wake()
