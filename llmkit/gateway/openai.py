"""The OpenAI routes: models, chat completions, completions. Tornado loop only."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from llmkit.client import EngineClient
from llmkit.errors import EngineGoneError, ModelNotFoundError
from llmkit.gateway import objects
from llmkit.gateway.answers import read_all
from llmkit.gateway.chat import ChatChunks, ChatRequest, chat_object
from llmkit.gateway.engines import EngineDirectory
from llmkit.gateway.exchange import Exchange
from llmkit.gateway.logprobs import Offsets
from llmkit.gateway.schemas import CompletionRequest
from llmkit.gateway.streams import News, close_all, gather, merge, submit_all
from llmkit.types import Completion, Delta, Usage

__all__ = ["OpenAIRoutes"]


class OpenAIRoutes:
    """Routes over the engines of a directory. ``fingerprint`` goes into every reply; ``on_use`` hears of each engine that is used."""

    def __init__(self, directory: EngineDirectory, fingerprint: str, on_use: Callable[[EngineClient], None] = lambda _: None) -> None:
        self._directory = directory
        self._fingerprint = fingerprint
        self._on_use = on_use

    async def list_models(self, exchange: Exchange) -> None:
        data = [objects.model_object(e.model_id, e.client.description) for e in self._directory.entries()]
        gone = [{"id": name, "reason": reason} for name, reason in self._directory.gone.items() if "@" not in name]
        exchange.send_json({"object": "list", "data": data, **({"unavailable": gone} if gone else {})})

    async def get_model(self, exchange: Exchange) -> None:
        model = exchange.args[0]
        try:
            description = self._directory.lookup(model).description
        except EngineGoneError as error:  # here a model that is not there is not found, whatever it was
            raise ModelNotFoundError(str(error)) from error
        exchange.send_json(objects.model_object(model, description))

    async def chat_completions(self, exchange: Exchange) -> None:
        request = await exchange.read(ChatRequest)
        reply_id = objects.new_id("chatcmpl")
        engine = self._engine(request.model)
        head = self._head(reply_id, "chat.completion.chunk" if request.stream else "chat.completion", engine)
        streams = submit_all(engine, exchange.owned(request.requests(reply_id, engine.description)))
        try:
            readers = [request.reader(engine.description) for _ in streams]
            if not request.stream:
                answers = await read_all(streams, readers, lambda: self._on_use(engine))
                exchange.send_json(chat_object(head, answers, bool(request.logprobs)))
                return
            events = merge(streams)
            news = await anext(events)  # an error before the first byte still has its real status
            await self._start(exchange, head, request.include_usage)
            chunks = ChatChunks(readers)
            for i in range(len(streams)):
                await exchange.send_event(chunks.first(head, i))
            await self._relay(exchange, engine, head, news, events, request.include_usage, 1, chunks)
        finally:
            close_all(streams)

    async def completions(self, exchange: Exchange) -> None:
        request = await exchange.read(CompletionRequest)
        reply_id = objects.new_id("cmpl")
        engine = self._engine(request.model)
        head = self._head(reply_id, "text_completion", engine)
        num_prompts = len(request.prompts)
        streams = submit_all(engine, exchange.owned(request.requests(reply_id)))
        try:
            if not request.stream:
                done = await gather(streams, lambda: self._on_use(engine))
                exchange.send_json(objects.completion_object(head, request, done))
                return
            events = merge(streams)
            news = await anext(events)
            await self._start(exchange, head, request.include_usage)
            if request.echo:
                for i in range(len(streams)):
                    await exchange.send_event(objects.text_chunk(head, i, request.echo_text(i)))
            await self._relay(exchange, engine, head, news, events, request.include_usage, num_prompts, TextChunks())
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
            "system_fingerprint": self._fingerprint,
        }

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
        news: News | None,
        events: AsyncIterator[News | None],
        include_usage: bool,
        num_prompts: int,
        chunks: ChatChunks | TextChunks,
    ) -> None:
        """Pass events on until all streams have ended."""
        while True:
            self._on_use(engine)  # still at work, silent or not
            if news is None:
                await exchange.send_text(": ping\n\n")
            else:
                index, deltas, completion = news
                for chunk in chunks(head, index, deltas, completion):
                    await exchange.send_event(chunk)
            try:
                news = await anext(events)
            except StopAsyncIteration:
                break
        if include_usage:
            usage = objects.usage_object([usage for _, usage in sorted(chunks.usages.items())], num_prompts)
            await exchange.send_event({**head, "choices": [], "usage": usage})
        self._on_use(engine)
        exchange.end_events()


class TextChunks:
    """Chunks of text completions; keeps where in its text each choice is."""

    def __init__(self) -> None:
        self._offsets: dict[int, Offsets] = {}
        self.usages: dict[int, Usage] = {}

    def __call__(self, head: dict[str, Any], index: int, deltas: Sequence[Delta], completion: Completion | None) -> list[dict[str, Any]]:
        text = "".join(d.text for d in deltas)
        entries = [e for d in deltas for e in d.logprobs]
        chunks = []
        if text or entries:
            chunks.append(objects.text_chunk(head, index, text, None, entries, self._offsets.setdefault(index, Offsets())))
        if completion is not None:
            chunks.append(objects.text_chunk(head, index, "", completion.finish_reason))
            self.usages[index] = completion.usage
        return chunks
