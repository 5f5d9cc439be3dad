"""An engine as it is, for `llmkit.attach`: the bridge's own messages, through the one pipeline.

Who calls, how much it may, and what it shares is the identity's to say, never the message's.
Tornado loop only; large bodies are read on a lane.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import secrets
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import msgspec
from pydantic import BaseModel, ConfigDict

from llmkit.bridge import over_http, wire
from llmkit.bridge.inquiries import decode_inquiry, encode_answer
from llmkit.errors import InvalidRequestError, ModelNotFoundError
from llmkit.gateway.access.identity import ADMIN, INFERENCE
from llmkit.gateway.directory import DEFAULT, EngineDirectory, Use
from llmkit.gateway.exchange import Exchange
from llmkit.gateway.failures import NO_RETRY, ApiError
from llmkit.gateway.ids import new_id
from llmkit.gateway.media.attached import check_all
from llmkit.gateway.ops.openapi import Query, Route
from llmkit.gateway.streams import close_all, merge, submit_all
from llmkit.gateway.vectors import embed
from llmkit.protocol import (
    Detokenize,
    EmbeddingRequest,
    GenerationRequest,
    Inquiry,
    ListRequests,
    ListSlots,
    ListSteps,
    Message,
    ModelDescription,
    Question,
    TokenizeChat,
    Unload,
)
from llmkit.protocol.client import EngineClient
from llmkit.protocol.speech import Facts, Lines

__all__ = ["EngineRoutes"]

Read = TypeVar("Read")
MAX_ID = 100  # characters of a client's own id that an engine sees
MODEL = Query("model", "A model's name, as in the bodies of other routes.")
LOOK = Query.choice("look", "Ask what the engine does instead.", *over_http.LOOKS)


class SubmitBody(BaseModel):
    """POST /engine/submit: a `GenerationRequest` as llmkit writes it."""

    model_config = ConfigDict(extra="allow")

    request_id: str
    prompt: str


class EngineEmbedBody(BaseModel):
    """POST /engine/embed: an `EmbeddingRequest` as llmkit writes it."""

    model_config = ConfigDict(extra="allow")

    request_id: str
    inputs: list[str]


class InquireBody(BaseModel):
    """POST /engine/inquire: a question, by its kind."""

    model_config = ConfigDict(extra="allow")

    request_id: str
    kind: str
    question: dict[str, Any]


class EngineRoutes:
    """`/engine` over the engines of a directory.

    Requests have ids of the gateway's own in the engine, since two callers may choose the same.
    Theirs is in it, so that each sees its own again where the engine shows what it does. Sound may
    last ``max_sound_s`` seconds.
    """

    def __init__(
        self,
        directory: EngineDirectory,
        on_use: Callable[[EngineClient], None] = lambda _: None,
        *,
        max_sound_s: float | None = None,
    ) -> None:
        self._directory, self._on_use = directory, on_use
        self._max_sound_s = math.inf if max_sound_s is None else max_sound_s
        self._secret = secrets.token_bytes(16)

    def routes(self) -> list[Route]:
        own: dict[str, Any] = {"dialect": "llmkit"}
        return [
            Route(
                "GET",
                "/engine",
                self.engine,
                "A model for llmkit.attach: description, state, counters",
                scope=INFERENCE,
                query=(MODEL, LOOK),
                **own,
            ),
            Route(
                "POST",
                "/engine/submit",
                self.submit,
                "A generation for llmkit.attach, as events",
                body=SubmitBody,
                query=(MODEL,),
                **own,
            ),
            Route(
                "POST",
                "/engine/embed",
                self.embed,
                "Vectors for llmkit.attach, as bytes",
                body=EngineEmbedBody,
                query=(MODEL,),
                **own,
            ),
            Route(
                "POST",
                "/engine/inquire",
                self.inquire,
                "A question about a model for llmkit.attach",
                body=InquireBody,
                query=(MODEL,),
                **own,
            ),
        ]

    async def engine(self, exchange: Exchange) -> None:
        """Loads nothing: it is asked for again and again by those who only look."""
        _greet(exchange)
        model, look = exchange.query("model") or DEFAULT, exchange.query("look")
        engine = self._find(model)
        if look is not None:
            if look not in over_http.LOOKS:
                known = ", ".join(over_http.LOOKS)
                raise InvalidRequestError(f"look: must be one of {known}.", "look")
            await self._answer(exchange, engine, new_id("look"), over_http.LOOKS[look]())
            return
        description = engine.description
        named = description.name if model == DEFAULT else model
        found = over_http.Engine(
            named,
            _shown(exchange, description),
            wire.VERSION,
            over_http.told().partition(" ")[2],
            engine.state,
            engine.stats(),
        )
        exchange.send_bytes(wire.encode(found))

    async def submit(self, exchange: Exchange) -> None:
        request, given = await self._read(exchange, _request)
        engine = await self._engine(exchange, "generate")
        exchange.given = given
        ids = wire.choice_ids(request.request_id, request.n)
        await _check_media(exchange, engine, request.messages or (), request.media)
        mine = self._allowed(exchange, engine.description, request)
        streams = submit_all(engine, exchange.owned(engine, [mine]))
        lines = Lines()
        try:
            updates = merge(streams)
            update = await anext(updates)
            await exchange.start_events(over_http.EVENT_STREAM)
            while True:
                self._on_use(engine)  # in use even while silent
                if update is None:
                    await exchange.send_text(": ping\n\n")
                else:
                    index, deltas, completion = update
                    if mine.hearing is not None and not exchange.record.heard_s:
                        heard = lines.read("".join(delta.text for delta in deltas))
                        facts = (event for event in heard if isinstance(event, Facts))
                        exchange.record.heard_s = next((f.duration for f in facts), 0.0)
                    events = wire.Events(
                        [wire.News.of(ids[index], deltas)] if deltas else [],
                        [] if completion is None else [wire.End.of(ids[index], completion)],
                    )
                    await exchange.send_text(over_http.event(events))
                try:
                    update = await anext(updates)
                except StopAsyncIteration:
                    break
            exchange.end_events("")
        finally:
            close_all(streams)

    async def embed(self, exchange: Exchange) -> None:
        request = await self._read(exchange, lambda data: wire.decode(data, EmbeddingRequest))
        if len(request.inputs) > over_http.MAX_TEXTS:
            raise InvalidRequestError(
                f"input: at most {over_http.MAX_TEXTS} texts at a time, not {len(request.inputs)}.",
                "input",
            )
        engine = await self._engine(exchange, "embed")
        for text in request.inputs:
            if isinstance(text, tuple):
                _check_tokens(engine.description, text, "input")
        mine = replace(
            request,
            request_id=self._id(exchange, request.request_id),
            caller=exchange.caller,
            weight=exchange.identity.allowance.weight,
        )
        made = await embed(engine, mine)
        body = over_http.pack(request.request_id, made)
        exchange.send_bytes(body, content_type="application/octet-stream")

    async def inquire(self, exchange: Exchange) -> None:
        inquiry = await self._read(exchange, decode_inquiry)
        question = inquiry.question
        if isinstance(question, Unload):
            message = "Over HTTP a model is unloaded by POST /admin/models/unload."
            raise ApiError(403, message, "permission_error", code="not_allowed", headers=NO_RETRY)
        engine = await self._engine(exchange, None)
        if isinstance(question, TokenizeChat):
            await _check_media(exchange, engine, question.messages, question.media)
        if isinstance(question, Detokenize):
            _check_tokens(engine.description, question.tokens, "tokens")
        await self._answer(exchange, engine, inquiry.request_id, question)

    async def _answer(
        self, exchange: Exchange, engine: EngineClient, request_id: str, question: Question[Any]
    ) -> None:
        inquiry = Inquiry(new_id("ask"), question, exchange.caller)
        found = await asyncio.wrap_future(engine.inquire(inquiry))
        answer = encode_answer(request_id, self._seen(exchange, question, found))
        exchange.send_bytes(wire.encode(answer))

    async def _read(self, exchange: Exchange, decode: Callable[[bytes], Read]) -> Read:
        """The message in a body. Raises `InvalidRequestError`."""
        _greet(exchange)
        assert exchange.reading is not None

        def read(data: bytes) -> Read:
            try:
                return decode(data)
            except (msgspec.MsgspecError, ValueError, TypeError, OverflowError) as error:
                if isinstance(error, InvalidRequestError):
                    raise
                raise InvalidRequestError(f"This is not an llmkit message: {error}") from None

        return await exchange.reading.message(exchange, read)

    async def _engine(self, exchange: Exchange, use: Use | None) -> EngineClient:
        """The engine that a request is for, which may have to be loaded."""
        model = exchange.query("model") or DEFAULT
        assert exchange.reading is not None
        await exchange.reading.admit(exchange, model)
        engine = self._find(model) if use is None else self._directory.lookup(model, use)
        self._on_use(engine)
        return engine

    def _find(self, model: str) -> EngineClient:
        """The default model is one that generates, if there is one."""
        try:
            return self._directory.lookup(model, "generate")
        except ModelNotFoundError:
            return self._directory.lookup(model)

    def _allowed(
        self, exchange: Exchange, model: ModelDescription, request: GenerationRequest
    ) -> GenerationRequest:
        """A request as its caller may make it. Raises `InvalidRequestError`, and `ApiError`."""
        if isinstance(request.prompt, tuple):
            _check_tokens(model, request.prompt, "prompt")
        mine = replace(request, request_id=self._id(exchange, request.request_id))
        if mine.hearing is not None:
            wanted = mine.hearing.max_s
            most = self._max_sound_s if wanted is None else min(wanted, self._max_sound_s)
            limit = most if math.isfinite(most) else None
            mine = replace(mine, hearing=replace(mine.hearing, max_s=limit))
        if ADMIN in exchange.identity.scopes:
            return mine
        for name, is_wanted in (
            ("keep_on_disk", request.keep_on_disk),
            ("resume", request.resume is not None),
        ):
            if is_wanted:
                message = f"{name} is for administrators of this server."
                raise ApiError(
                    403, message, "permission_error", name, code="not_allowed", headers=NO_RETRY
                )
        return replace(mine, priority=max(0, request.priority))

    def _tag(self, exchange: Exchange) -> str:
        """What the ids of a caller's requests begin with; nobody else can guess it."""
        digest = hashlib.blake2b(exchange.caller.encode(), key=self._secret, digest_size=6)
        return f"at-{digest.hexdigest()}-"

    def _id(self, exchange: Exchange, wanted: str) -> str:
        return f"{self._tag(exchange)}{secrets.token_hex(4)}-{wanted[:MAX_ID]}"

    def _seen(self, exchange: Exchange, question: Question[Any], found: Any) -> Any:
        """An answer without what is other callers'.

        How long those are, and how much a slot shares with another, is not shown either: it would
        tell whose prompts are like one's own.
        """
        tag, is_admin = self._tag(exchange), ADMIN in exchange.identity.scopes

        def own(request: str | None) -> str | None:
            if request is None or not request.startswith(tag):
                return request if is_admin else None
            return request[len(tag) :].partition("-")[2]

        match question:
            case ListRequests():
                rows = [r for r in found if is_admin or r.caller == exchange.caller]
                return tuple(replace(r, request=own(r.request) or r.request) for r in rows)
            case ListSlots():
                return tuple(
                    replace(s, request=own(s.request))
                    if is_admin
                    else replace(
                        s,
                        request=own(s.request),
                        tokens=s.tokens if own(s.request) is not None else 0,
                        shared=0,
                    )
                    for s in found
                )
            case ListSteps():
                return tuple(
                    replace(
                        step,
                        chunks=tuple(
                            replace(c, request=mine)
                            for c in step.chunks
                            if (mine := own(c.request)) is not None
                        ),
                    )
                    for step in found
                )
        return found


def _request(data: bytes) -> tuple[GenerationRequest, frozenset[str]]:
    return wire.decode_request(data), over_http.given(data)


async def _check_media(
    exchange: Exchange, engine: EngineClient, messages: Sequence[Message], media: dict[str, bytes]
) -> None:
    """Raises `InvalidRequestError` for files that the model does not take, or that are others."""
    if not media and not any(message.media for message in messages):
        return
    assert exchange.reading is not None
    check = partial(check_all, engine.description, messages, media)
    await exchange.reading.aside(exchange, check)


def _greet(exchange: Exchange) -> None:
    """Say the version, and compare the client's. Raises `ApiError`."""
    exchange.set_header(over_http.WIRE, over_http.told())
    header = exchange.header(over_http.WIRE)
    why = None if header is None else over_http.stranger(header)
    if why is not None:
        raise ApiError(400, f"This cannot work: {why}.", code="other_version", headers=NO_RETRY)


def _shown(exchange: Exchange, description: ModelDescription) -> ModelDescription:
    """A description without the server's folders, which are for administrators."""
    adapters = tuple((exchange.shown_path(path), scale) for path, scale in description.adapters)
    return replace(description, path=exchange.shown_path(description.path), adapters=adapters)


def _check_tokens(model: ModelDescription, tokens: Sequence[int], param: str) -> None:
    """Raises `InvalidRequestError` for what is no token of a model."""
    most = model.n_vocab or 1 << 31
    for token in (min(tokens), max(tokens)) if tokens else ():  # there may be a million
        if not 0 <= token < most:
            raise InvalidRequestError(
                f"{param}: token id {token!r:.30} is out of range (0–{most - 1}).", param
            )
