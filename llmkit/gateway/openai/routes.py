"""OpenAI's routes for models, chat completions and completions. Tornado loop only."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from llmkit.errors import EngineGoneError, ModelNotFoundError
from llmkit.gateway.answers import read_all
from llmkit.gateway.conversations.recall import recalled
from llmkit.gateway.directory import EngineDirectory
from llmkit.gateway.exchange import Exchange
from llmkit.gateway.ids import new_id
from llmkit.gateway.media.attached import Attached
from llmkit.gateway.openai import objects
from llmkit.gateway.openai.chat import ChatChunks, ChatRequest, chat_object
from llmkit.gateway.openai.logprobs import Offsets
from llmkit.gateway.openai.schemas import CompletionRequest
from llmkit.gateway.streams import StreamUpdate, close_all, gather, merge, submit_all
from llmkit.protocol import Completion, Delta, Usage
from llmkit.protocol.client import EngineClient

__all__ = ["OpenAIRoutes"]

Timings = Callable[[Completion], dict[str, Any]]
Shape = Callable[[dict[str, Any]], dict[str, Any]]


class OpenAIRoutes:
    """Routes over the engines of a directory.

    ``fingerprint`` goes into every reply; ``on_use`` is called with each engine in use. ``timings``
    says how fast an answer was, for callers that ask.
    """

    def __init__(
        self,
        directory: EngineDirectory,
        fingerprint: str,
        on_use: Callable[[EngineClient], None] = lambda _: None,
        timings: Timings = lambda _: {},
    ) -> None:
        self._directory = directory
        self._fingerprint = fingerprint
        self._on_use = on_use
        self._timings = timings

    def listing(self) -> dict[str, Any]:
        """The models that the caller may use."""
        data = [
            objects.model_object(e.model_id, e.client.description)
            for e in self._directory.entries()
        ]
        data += [objects.unloaded_object(name) for name in self._directory.unloaded]
        gone = [
            {"id": name, "reason": reason}
            for name, reason in self._directory.gone.items()
            if "@" not in name
        ]
        return {"object": "list", "data": data, **({"unavailable": gone} if gone else {})}

    async def get_model(self, exchange: Exchange) -> None:
        exchange.send_json(self.model(exchange.args[0]))

    def model(self, model: str) -> dict[str, Any]:
        """One of the models. Raises `ModelNotFoundError`."""
        if model in self._directory.unloaded:
            return objects.unloaded_object(model)
        try:
            description = self._directory.lookup(model).description
        except EngineGoneError as error:  # on this route a missing model is always a 404
            raise ModelNotFoundError(str(error)) from error
        return objects.model_object(model, description)

    async def chat_completions(self, exchange: Exchange) -> None:
        request = await exchange.read(ChatRequest)
        reply_id = new_id("chatcmpl")
        engine = self._engine(request.model)
        attached = Attached(engine.description)
        chat = await attached.taken(exchange, request.chat(engine.description, attached))
        chat = await recalled(exchange, engine, chat, request.session_id)
        head = self._head(
            reply_id, "chat.completion.chunk" if request.stream else "chat.completion", engine
        )
        requests = [chat.request(reply_id, engine.description)]
        streams = submit_all(engine, exchange.owned(engine, requests))
        try:
            readers = [chat.reader(engine.description) for _ in streams]
            if not request.stream:
                answers = await read_all(streams, readers, lambda: self._on_use(engine))
                await chat.finished()
                answer = chat_object(head, answers, bool(request.logprobs))
                if request.timings_per_token:
                    answer["timings"] = self._timings(answers[0][1])
                exchange.send_json(answer)
                return
            updates = merge(streams)
            update = await anext(updates)  # an error before the first byte keeps its HTTP status
            await self._start(exchange, head, request.include_usage)
            chunks = ChatChunks(readers, self._timings if request.timings_per_token else None)
            first = [chunks.first(head, i) for i in range(len(streams))]
            await exchange.send_text(as_events(first))
            await self._relay(
                exchange, engine, head, update, updates, request.include_usage, 1, chunks
            )
            await chat.finished()
            exchange.end_events()
        finally:
            close_all(streams)

    async def completions(
        self,
        exchange: Exchange,
        schema: type[CompletionRequest] = CompletionRequest,
        shape: Shape = lambda sent: sent,
    ) -> None:
        """``shape`` makes of each object that is sent what callers of another route expect."""
        request = await exchange.read(schema)
        reply_id = new_id("cmpl")
        engine = self._engine(request.model)
        head = self._head(reply_id, "text_completion", engine)
        num_prompts = len(request.prompts)
        streams = submit_all(engine, exchange.owned(engine, request.requests(reply_id)))
        try:
            if not request.stream:
                done = await gather(streams, lambda: self._on_use(engine))
                answer = objects.completion_object(head, request, done)
                if request.timings_per_token:
                    answer["timings"] = self._timings(done[0])
                exchange.send_json(shape(answer))
                return
            updates = merge(streams)
            update = await anext(updates)
            await self._start(exchange, head, request.include_usage)
            if request.echo:
                for i in range(len(streams)):
                    echo = objects.text_chunk(head, i, request.echo_text(i))
                    await exchange.send_event(shape(echo))
            await self._relay(
                exchange,
                engine,
                head,
                update,
                updates,
                request.include_usage,
                num_prompts,
                TextChunks(shape, self._timings if request.timings_per_token else None),
            )
            exchange.end_events()
        finally:
            close_all(streams)

    def _engine(self, model: str) -> EngineClient:
        engine = self._directory.lookup(model, "generate")
        self._on_use(engine)
        return engine

    def _head(self, reply_id: str, kind: str, engine: EngineClient) -> dict[str, Any]:
        return {
            "id": reply_id,
            "object": kind,
            "created": int(time.time()),
            "model": engine.description.name,
            "system_fingerprint": self._fingerprint_of(engine),
        }

    def _fingerprint_of(self, engine: EngineClient) -> str:
        is_echo = engine.description.architecture == "echo"  # no model has answered
        return f"{self._fingerprint}-echo" if is_echo else self._fingerprint

    @staticmethod
    async def _start(exchange: Exchange, head: dict[str, Any], include_usage: bool) -> None:
        if include_usage:
            head["usage"] = None
        await exchange.start_events()

    async def _relay(
        self,
        exchange: Exchange,
        engine: EngineClient,
        head: dict[str, Any],
        update: StreamUpdate | None,
        updates: AsyncIterator[StreamUpdate | None],
        include_usage: bool,
        num_prompts: int,
        chunks: ChatChunks | TextChunks,
    ) -> None:
        """Forward chunks until all streams have ended."""
        while True:
            self._on_use(engine)  # in use even while silent
            if update is None:
                await exchange.send_text(": ping\n\n")
            else:
                index, deltas, completion = update
                text = as_events(chunks(head, index, deltas, completion))
                if text:
                    await exchange.send_text(text)
            try:
                update = await anext(updates)
            except StopAsyncIteration:
                break
        if include_usage:
            usage = objects.usage_object(
                [usage for _, usage in sorted(chunks.usages.items())], num_prompts
            )
            await exchange.send_event({**head, "choices": [], "usage": usage})
        self._on_use(engine)


def as_events(chunks: Sequence[str]) -> str:
    return "".join([f"data: {chunk}\n\n" for chunk in chunks])


class TextChunks:
    """The chunks of streamed completions as JSON; keeps the text offset of each choice.

    ``timings`` are added to the last one of each.
    """

    def __init__(self, shape: Shape, timings: Timings | None) -> None:
        self._shape, self._timings = shape, timings
        self._offsets: dict[int, Offsets] = {}
        self.usages: dict[int, Usage] = {}

    def __call__(
        self,
        head: dict[str, Any],
        index: int,
        deltas: Sequence[Delta],
        completion: Completion | None,
    ) -> list[str]:
        text = "".join(d.text for d in deltas)
        entries = [e for d in deltas for e in d.logprobs]
        chunks = []
        if text or entries:
            chunks.append(
                objects.text_chunk(
                    head, index, text, None, entries, self._offsets.setdefault(index, Offsets())
                )
            )
        if completion is not None:
            chunks.append(objects.text_chunk(head, index, "", completion.finish_reason))
            self.usages[index] = completion.usage
            if self._timings is not None:
                chunks[-1]["timings"] = self._timings(completion)
        return [json.dumps(self._shape(chunk)) for chunk in chunks]
