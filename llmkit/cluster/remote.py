"""A model behind a gateway, over HTTP: the third `EngineClient`.

One thread for each handle, with a loop that has the connections. A server that goes away fails what
runs there; what is asked once it is back works again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from dataclasses import replace
from typing import Any, TypeVar
from urllib.parse import quote

import msgspec

from llmkit.bridge import inquiries, over_http, wire
from llmkit.cluster.address import Address
from llmkit.cluster.link import Link, Reply
from llmkit.cluster.refusals import another_server, error_of, no_gateway, refusal, said_in
from llmkit.cluster.room import Room
from llmkit.cluster.submission import Submission
from llmkit.errors import EngineError, EngineGoneError, InvalidRequestError
from llmkit.protocol import (
    READY,
    EmbeddingRequest,
    Embeddings,
    EngineState,
    EngineStats,
    GenerationRequest,
    Inquiry,
    ListRequests,
    ModelDescription,
    Origin,
    Unload,
    check_drawing,
    check_size,
)
from llmkit.protocol.stream import Channel, Stream

__all__ = ["RemoteEngine"]

logger = logging.getLogger("llmkit.cluster")

Answer = TypeVar("Answer")
Work = Callable[[], Coroutine[Any, Any, Any]]

LOOK_S, LOOKED_S = 0.5, 3.0  # how often counters are asked for, and how long after a look
FRESH_S = 0.5  # the first look waits so long for them


class RemoteEngine:
    """The engine behind a gateway's address; ``model`` is a name there, or "default".

    Loads the model there if need be. Raises `EngineGoneError` when there is no gateway,
    `AccessError` when the key is refused, and what the gateway raises.
    """

    def __init__(self, address: Address, model: str = "default") -> None:
        self.address, self._model = address, model
        self._pid = os.getpid()
        self._description = ModelDescription(model, "")
        self._stats, self._state = EngineStats(), READY
        self._gone: str | None = None
        self._is_attached = False  # an llmkit was there
        self._submissions: dict[str, Submission] = {}  # by the ids of their answers
        self._futures: dict[Future[Any], str] = {}
        self._works: dict[str, set[asyncio.Task[Any]]] = {}  # of the futures, by request
        self._looked_at = self._refreshed_at = 0.0
        self._looking: asyncio.Task[None] | None = None
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="llmkit-remote", daemon=True)
        self._thread.start()
        try:
            self._expect(model, self._attach).result()
        except BaseException:
            self.close()
            raise

    @property
    def description(self) -> ModelDescription:
        return self._description

    @property
    def state(self) -> EngineState:
        return self._state if self._gone is None else EngineState.gone_for(self._gone)

    @property
    def origin(self) -> Origin:
        return Origin("url", host=self.address.netloc, url=self.address.base)

    def submit(self, request: GenerationRequest) -> Stream:
        return self.submit_choices(request)[0]

    def submit_choices(self, request: GenerationRequest) -> list[Stream]:
        check_size(request, self._description.n_ctx)
        check_drawing(request, self._description.inputs)
        body = _encoded(lambda: wire.encode_request(request))
        ids = wire.choice_ids(request.request_id, request.n)
        submission = Submission(
            body, [Channel(each, self.abort, keeps_text=request.keeps_text) for each in ids]
        )
        self._check()
        for channel in submission.channels:
            self._submissions[channel.request_id] = submission
        try:
            self._soon(self._begin, submission)
        except BaseException:
            self._forget(submission)
            raise
        return [Stream(channel) for channel in submission.channels]

    def embed(self, request: EmbeddingRequest) -> Future[Embeddings]:
        bodies = [
            _encoded(lambda part=part: wire.encode(part))  # type: ignore[misc]
            for part in _parts(request)
        ]

        async def work() -> Embeddings:
            made = [over_http.unpack(await self._post("embed", body)) for body in bodies]
            if len(made) == 1:
                return made[0]
            return Embeddings(
                b"".join(each.data for each in made),
                made[0].size,
                tuple(n for each in made for n in each.num_tokens),
            )

        return self._expect(request.request_id, work)

    def inquire(self, inquiry: Inquiry[Answer]) -> Future[Answer]:
        question = inquiry.question
        if isinstance(question, Unload):
            raise InvalidRequestError(
                f"the model is {self.address.base}'s, which unloads it; unload() lets go here."
            )
        look = over_http.look_of(question)
        body = None if look else _encoded(lambda: inquiries.encode_inquiry(inquiry))

        async def work() -> Answer:
            if body is None:
                found = await self._get(f"&look={look}")
            else:
                found = await self._post("inquire", body)
            answer = self._read(found, wire.Answer)
            return inquiries.decode_answer(bytes(answer.found), question)

        return self._expect(inquiry.request_id, work)

    def abort(self, request_id: str) -> None:
        if self._pid == os.getpid():
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(self._abort, request_id)

    def stats(self) -> EngineStats:
        """The latest snapshot: polled while somebody looks, and for a few seconds more."""
        is_first = time.monotonic() - self._refreshed_at > 2 * LOOK_S
        self._looked_at = time.monotonic()
        if self._gone is None and self._pid == os.getpid() and is_first:
            with contextlib.suppress(Exception):  # whoever asks for tokens learns the reason
                looked = self._expect("", self._look)
                if threading.current_thread() is not self._thread:
                    looked.result(FRESH_S)
        return self._stats

    def close(self) -> None:
        """Disconnect; the model stays loaded where it is."""
        if self._pid != os.getpid():
            return
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._stop.set)
        if threading.current_thread() is not self._thread:
            self._thread.join(2)

    def _check(self) -> None:
        if self._pid != os.getpid():
            raise EngineGoneError(
                "this connection was made in the parent process before a fork; "
                "attach the model again here."
            )
        if self._gone is not None:
            raise EngineGoneError(self._gone)

    def _soon(self, call: Callable[..., object], *args: Any) -> None:
        """Have the loop call something. What ends the loop ends what waits for it, too."""
        try:
            self._loop.call_soon_threadsafe(call, *args)
        except RuntimeError:
            raise EngineGoneError(self._gone or "the connection was closed") from None
        self._check()

    def _expect(self, request_id: str, work: Work) -> Future[Any]:
        """The result of some work on the loop; cancelling it ends the work."""
        future: Future[Any] = Future()
        self._check()
        self._futures[future] = request_id
        try:
            self._soon(self._begin_work, future, request_id, work)
        except BaseException:
            self._futures.pop(future, None)
            raise
        return future

    def _run(self) -> None:
        reason = "the connection was closed; attach the model again"
        try:
            with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
                runner.run(self._serve())
        except Exception as error:
            logger.exception("the connection to %s failed", self.address.base)
            reason = f"the connection to {self.address.base} failed: {error!r:.200}"
        finally:  # whatever happens, no request may wait forever
            self._gone = reason
            for submission in list(self._submissions.values()):
                submission.fail(EngineGoneError(reason))
            for future in list(self._futures):
                if future.set_running_or_notify_cancel():
                    future.set_exception(EngineGoneError(reason))

    async def _serve(self) -> None:
        self._link = Link(self.address)
        self._room = Room(self.address)
        try:
            await self._stop.wait()
        finally:
            self._link.close()

    def _begin(self, submission: Submission) -> None:
        if submission.is_over:
            self._forget(submission)
        else:
            submission.task = self._loop.create_task(self._stream(submission))

    async def _stream(self, submission: Submission) -> None:
        try:
            await self._room.ask(lambda: self._ask(submission))
            submission.fail(EngineGoneError("the server ended this request without a result"))
        except asyncio.CancelledError:
            if self._stop.is_set():
                submission.fail(EngineGoneError("the connection was closed"))
        except Exception as error:
            submission.fail(error)
        finally:
            self._forget(submission)

    def _forget(self, submission: Submission) -> None:
        for channel in submission.channels:
            self._submissions.pop(channel.request_id, None)

    async def _ask(self, submission: Submission) -> Reply:
        def take(data: bytes) -> None:
            if data.startswith(b"{"):
                submission.fail(error_of(said_in(data)))
                return
            if not submission.is_begun:
                self._room.served += 1
            submission.deliver(over_http.unpack_event(data))

        try:
            return await self._link.send("POST", self._path("submit"), submission.body, take)
        finally:
            self._room.served -= submission.is_begun

    def _begin_work(self, future: Future[Any], request_id: str, work: Work) -> None:
        task = self._loop.create_task(work())
        tasks = self._works.setdefault(request_id, set())
        tasks.add(task)

        def ended(_: object) -> None:
            tasks.discard(task)
            if not tasks:
                self._works.pop(request_id, None)
            aborted = EngineError("this request was aborted")
            error = aborted if task.cancelled() else task.exception()
            if self._futures.pop(future, None) is None or not future.set_running_or_notify_cancel():
                return
            if error is None:
                future.set_result(task.result())
            else:
                future.set_exception(error)

        def cancelled(given: Future[Any]) -> None:
            if given.cancelled():
                with contextlib.suppress(RuntimeError):
                    self._loop.call_soon_threadsafe(task.cancel)

        task.add_done_callback(ended)
        future.add_done_callback(cancelled)

    def _abort(self, request_id: str) -> None:
        submission = self._submissions.pop(request_id, None)
        if submission is not None and submission.abort(request_id) and submission.task is not None:
            submission.task.cancel()
        for task in self._works.get(request_id, ()):
            task.cancel()

    async def _attach(self) -> None:
        reply = await self._link.send("GET", self._path())
        if said_in(reply.body).get("code") != "model_unavailable":
            self._learn(self._checked(reply))
            return
        # It may have to be loaded, which a look does not do. Every engine answers this.
        question: Inquiry[Any] = Inquiry("attach", ListRequests())
        await self._post("inquire", inquiries.encode_inquiry(question))
        await self._refresh()

    async def _look(self) -> None:
        """Ask for the counters; again and again as long as somebody looks."""
        if self._looking is None or self._looking.done():
            self._looking = self._loop.create_task(self._keep_looking())
        await self._refreshed()

    async def _keep_looking(self) -> None:
        while time.monotonic() - self._looked_at < LOOKED_S:
            await asyncio.sleep(LOOK_S)
            await self._refreshed()

    async def _refreshed(self) -> None:
        try:
            await self._refresh()
        except Exception:  # whoever asks for tokens learns the reason
            self._refreshed_at = time.monotonic()
            self._stats = replace(self._stats, num_running=0, num_waiting=0)

    async def _refresh(self) -> None:
        self._learn(await self._get())

    def _learn(self, body: bytes) -> None:
        found = self._read(body, over_http.Engine)
        why = wire.stranger(found.version, found.llmkit)
        if why is not None:
            raise EngineGoneError(f"{self.address.base} cannot be used: {why}.")
        self._is_attached = True
        self._model, self._description = found.model, found.description
        self._state, self._stats = found.state, found.stats
        if found.state.is_gone:  # another engine may take its place there
            self._state = EngineState("loading", found.state.reason)
        self._refreshed_at = time.monotonic()

    def _path(self, route: str = "") -> str:
        return f"/engine{'/' if route else ''}{route}?model={quote(self._model, safe='')}"

    async def _get(self, more: str = "") -> bytes:
        return self._checked(await self._link.send("GET", self._path() + more))

    def _checked(self, reply: Reply) -> bytes:
        if reply.status != 200:
            attaching = not self._is_attached
            raise refusal(
                self.address, reply.status, reply.headers, reply.body, attaching=attaching
            )
        return reply.body

    async def _post(self, route: str, body: bytes) -> bytes:
        reply = await self._room.ask(lambda: self._link.send("POST", self._path(route), body))
        return reply.body

    def _read(self, body: bytes, kind: type[Answer]) -> Answer:
        try:
            return wire.decode(body, kind)
        except (msgspec.MsgspecError, ValueError):
            other = another_server if self._is_attached else no_gateway
            raise other(self.address, f"it answers {body[:40]!r}") from None


def _parts(request: EmbeddingRequest) -> list[EmbeddingRequest]:
    """A request as several, none too long for a gateway."""
    most, inputs = over_http.MAX_TEXTS, request.inputs
    return [replace(request, inputs=inputs[i : i + most]) for i in range(0, len(inputs), most)]


def _encoded(encode: Callable[[], bytes]) -> bytes:
    """A message, made where its request is: what cannot be sent fails its caller alone."""
    try:
        return encode()
    except UnicodeEncodeError:
        raise InvalidRequestError(
            "the text is not valid Unicode: it contains half of a surrogate pair."
        ) from None
    except (RecursionError, ValueError, TypeError, OverflowError) as error:
        raise InvalidRequestError(f"this request cannot be sent to the engine: {error}") from None
