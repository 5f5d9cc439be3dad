"""OpenAI's routes for models, chat completions and completions. Tornado loop only."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from llmkit.errors import EngineGoneError, ModelNotFoundError
from llmkit.gateway.answers import read_all
from llmkit.gateway.directory import EngineDirectory
from llmkit.gateway.exchange import Exchange
from llmkit.gateway.ids import new_id
from llmkit.gateway.openai import objects
from llmkit.gateway.openai.chat import ChatChunks, ChatRequest, chat_object
from llmkit.gateway.openai.logprobs import Offsets
from llmkit.gateway.openai.schemas import CompletionRequest
from llmkit.gateway.streams import StreamUpdate, close_all, gather, merge, submit_all
from llmkit.protocol import Completion, Delta, Usage
from llmkit.protocol.client import EngineClient

__all__ = ["OpenAIRoutes"]


class OpenAIRoutes:
    """Routes over the engines of a directory.

    ``fingerprint`` goes into every reply; ``on_use`` is called with each engine in use.
    """

    def __init__(
        self,
        directory: EngineDirectory,
        fingerprint: str,
        on_use: Callable[[EngineClient], None] = lambda _: None,
    ) -> None:
        self._directory = directory
        self._fingerprint = fingerprint
        self._on_use = on_use

    async def list_models(self, exchange: Exchange) -> None:
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
        exchange.send_json(
            {"object": "list", "data": data, **({"unavailable": gone} if gone else {})}
        )

    async def get_model(self, exchange: Exchange) -> None:
        model = exchange.args[0]
        if model in self._directory.unloaded:
            exchange.send_json(objects.unloaded_object(model))
            return
        try:
            description = self._directory.lookup(model).description
        except EngineGoneError as error:  # on this route a missing model is always a 404
            raise ModelNotFoundError(str(error)) from error
        exchange.send_json(objects.model_object(model, description))

    async def chat_completions(self, exchange: Exchange) -> None:
        request = await exchange.read(ChatRequest)
        reply_id = new_id("chatcmpl")
        engine = self._engine(request.model)
        chat = request.chat(engine.description)
        head = self._head(
            reply_id, "chat.completion.chunk" if request.stream else "chat.completion", engine
        )
        streams = submit_all(engine, exchange.owned([chat.request(reply_id, engine.description)]))
        try:
            readers = [chat.reader(engine.description) for _ in streams]
            if not request.stream:
                answers = await read_all(streams, readers, lambda: self._on_use(engine))
                exchange.send_json(chat_object(head, answers, bool(request.logprobs)))
                return
            updates = merge(streams)
            update = await anext(updates)  # an error before the first byte keeps its HTTP status
            await self._start(exchange, head, request.include_usage)
            chunks = ChatChunks(readers)
            first = [chunks.first(head, i) for i in range(len(streams))]
            await exchange.send_text(as_events(first))
            await self._relay(
                exchange, engine, head, update, updates, request.include_usage, 1, chunks
            )
        finally:
            close_all(streams)

    async def completions(self, exchange: Exchange) -> None:
        request = await exchange.read(CompletionRequest)
        reply_id = new_id("cmpl")
        engine = self._engine(request.model)
        head = self._head(reply_id, "text_completion", engine)
        num_prompts = len(request.prompts)
        streams = submit_all(engine, exchange.owned(request.requests(reply_id)))
        try:
            if not request.stream:
                done = await gather(streams, lambda: self._on_use(engine))
                exchange.send_json(objects.completion_object(head, request, done))
                return
            updates = merge(streams)
            update = await anext(updates)
            await self._start(exchange, head, request.include_usage)
            if request.echo:
                for i in range(len(streams)):
                    await exchange.send_event(objects.text_chunk(head, i, request.echo_text(i)))
            await self._relay(
                exchange,
                engine,
                head,
                update,
                updates,
                request.include_usage,
                num_prompts,
                TextChunks(),
            )
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
        exchange.end_events()


def as_events(chunks: Sequence[str]) -> str:
    return "".join([f"data: {chunk}\n\n" for chunk in chunks])


class TextChunks:
    """The chunks of streamed completions as JSON; keeps the text offset of each choice."""

    def __init__(self) -> None:
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
        return [json.dumps(chunk) for chunk in chunks]
