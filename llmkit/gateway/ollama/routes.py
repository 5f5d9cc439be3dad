"""Ollama's routes: chat, generate, embeddings and the lists of models. Tornado loop only."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from typing import Any, Literal

from llmkit.chat.parsers.events import Call
from llmkit.errors import InvalidRequestError
from llmkit.gateway.answers import Answer, AnswerUpdate
from llmkit.gateway.chats import Chat
from llmkit.gateway.conversations.recall import recalled
from llmkit.gateway.directory import EngineDirectory
from llmkit.gateway.exchange import Exchange
from llmkit.gateway.ids import new_id
from llmkit.gateway.media.attached import Attached
from llmkit.gateway.ollama.durations import read_keep_alive
from llmkit.gateway.ollama.objects import (
    NDJSON,
    answer_line,
    ending,
    loaded_line,
    message_fields,
    model_details,
    model_entry,
    model_sizes,
    nanoseconds,
)
from llmkit.gateway.ollama.schemas import (
    ChatBody,
    EmbedBody,
    GenerateBody,
    GenerationBody,
    OldEmbedBody,
    ShowBody,
)
from llmkit.gateway.vectors import embed, json_vectors, vectors_of, with_list
from llmkit.protocol import (
    Completion,
    DescribeVocabulary,
    EmbeddingRequest,
    Inquiry,
    ModelDescription,
    Tokenize,
)
from llmkit.protocol.client import EngineClient

__all__ = ["OLLAMA_VERSION", "OllamaRoutes"]

# Clients require a minimum: VS Code 0.6.4, Codex 0.13.4, Ollama's own tools 0.14.
OLLAMA_VERSION = "0.14.2"
SENSES = {"image": "vision", "audio": "audio"}  # what Ollama calls the kinds of inputs


class OllamaRoutes:
    """`/api/…` over the engines of a directory."""

    def __init__(self, directory: EngineDirectory, on_use: Callable[[EngineClient], None]) -> None:
        self._directory = directory
        self._on_use = on_use

    def _engine(
        self, model: str, use: Literal["generate", "embed"] | None = "generate"
    ) -> EngineClient:
        return self._directory.lookup(model.removesuffix(":latest"), use)

    async def chat(self, exchange: Exchange) -> None:
        body = await exchange.read(ChatBody)
        ends = _keep(exchange, body)
        if not body.messages:
            if not ends:
                self._engine(body.model)
            empty = {"message": {"role": "assistant", "content": ""}}
            exchange.send_json(loaded_line(body.model, empty, ends=ends))
            return
        engine = self._engine(body.model)
        attached = Attached(engine.description)
        chat = body.chat(engine.description, attached, exchange.ignore)
        chat = await attached.taken(exchange, chat)
        await self._answer(
            exchange,
            body,
            engine,
            await recalled(exchange, engine, chat, body.session_id),
            lambda fields: {"message": {"role": "assistant", "content": "", **fields}},
        )

    async def generate(self, exchange: Exchange) -> None:
        body = await exchange.read(GenerateBody)
        ends = _keep(exchange, body)
        if body.raw and (body.system is not None or body.think is not None):
            raise InvalidRequestError(
                "raw uses no template, so it cannot be combined with system or think.", "raw"
            )
        if body.suffix is not None and (body.system is not None or body.think is not None):
            raise InvalidRequestError(
                "suffix uses no template, so it cannot be combined with system or think.",
                "suffix",
            )
        if body.images and (body.raw or body.suffix is not None):
            raise InvalidRequestError(
                "images need a chat template, so they cannot be combined with raw or suffix.",
                "images",
            )
        if not body.is_asked:
            if not ends:
                self._engine(body.model)
            exchange.send_json(loaded_line(body.model, {"response": ""}, ends=ends))
            return
        engine = self._engine(body.model)
        attached = Attached(engine.description, "images")
        chat = body.chat(engine.description, attached, exchange.ignore)
        chat = await attached.taken(exchange, chat)

        def shape(fields: dict[str, Any]) -> dict[str, Any]:
            thinking = {"thinking": fields["thinking"]} if "thinking" in fields else {}
            return {"response": fields.get("content", ""), **thinking}

        await self._answer(
            exchange,
            body,
            engine,
            chat,
            shape,
            prompt=body.prompt if body.raw or body.suffix is not None else None,
            suffix=body.suffix,
        )

    async def _answer(
        self,
        exchange: Exchange,
        body: GenerationBody,
        engine: EngineClient,
        chat: Chat,
        shape: Callable[[dict[str, Any]], dict[str, Any]],
        prompt: str | None = None,
        suffix: str | None = None,
    ) -> None:
        """Answer in lines, or whole. ``shape`` puts message fields where the endpoint has them."""
        started = time.perf_counter()
        answer = Answer(
            engine, chat, new_id("ollama"), exchange, self._on_use, prompt=prompt, suffix=suffix
        )
        try:
            if body.stream:
                await self._stream(exchange, answer.updates(), body.model, shape, started)
                return
            events, completion = await answer.whole()
            line = answer_line(body.model, shape(message_fields(events)))
            exchange.send_json({**line, **ending(completion, started)})
        finally:
            answer.close()

    @staticmethod
    async def _stream(
        exchange: Exchange,
        updates: AsyncIterator[AnswerUpdate],
        model: str,
        shape: Callable[[dict[str, Any]], dict[str, Any]],
        started: float,
    ) -> None:
        update = await anext(updates)  # an error before the first byte keeps its HTTP status
        await exchange.start_events(NDJSON)
        num_calls = 0
        while not isinstance(update, Completion):
            for event in update or ():
                line = answer_line(model, shape(message_fields([event], num_calls)))
                await exchange.send_line({**line, "done": False})
                num_calls += isinstance(event, Call)
            update = await anext(updates)
        await exchange.send_line({**answer_line(model, shape({})), **ending(update, started)})
        exchange.end_events("")

    async def embed(self, exchange: Exchange) -> None:
        body = await exchange.read(EmbedBody)
        _keep(exchange, body)
        started = time.perf_counter()
        engine = self._engine(body.model, "embed")
        self._on_use(engine)
        size = engine.description.embedding_size
        if body.dimensions is not None and body.dimensions > size > 0:
            raise InvalidRequestError(
                f"dimensions must be at most {size}, not {body.dimensions}.", "dimensions"
            )
        texts = [body.input] if isinstance(body.input, str) else body.input
        inputs = tuple(
            [
                await self._truncated(engine, text, exchange.caller) if body.truncate else text
                for text in texts
            ]
        )
        embeddings = await embed(
            engine, EmbeddingRequest(new_id("embd"), inputs, caller=exchange.caller)
        )
        vectors = await asyncio.to_thread(vectors_of, embeddings, body.dimensions)
        times = {
            "total_duration": nanoseconds(time.perf_counter() - started),
            "load_duration": 0,
            "prompt_eval_count": sum(embeddings.num_tokens),
        }
        listed = await asyncio.to_thread(json_vectors, vectors)
        exchange.send_bytes(with_list({"model": body.model, **times}, "embeddings", listed))

    @staticmethod
    async def _truncated(engine: EngineClient, text: str, caller: str) -> str | tuple[int, ...]:
        """As much of a text as fits the context."""
        n_ctx = engine.description.n_ctx
        if len(text) <= n_ctx:  # a token has at least a character, but for the two at the ends
            return text
        inquiry = Inquiry(new_id("cut"), Tokenize(text, parse_special=False), caller)
        tokens = (await asyncio.wrap_future(engine.inquire(inquiry))).tokens
        return text if len(tokens) <= n_ctx else (*tokens[: n_ctx - 1], tokens[-1])

    async def embeddings(self, exchange: Exchange) -> None:
        """The older form: one text, one vector."""
        body = await exchange.read(OldEmbedBody)
        _keep(exchange, body)
        engine = self._engine(body.model, "embed")
        self._on_use(engine)
        text = await self._truncated(engine, body.prompt, exchange.caller)
        embeddings = await embed(
            engine, EmbeddingRequest(new_id("embd"), (text,), caller=exchange.caller)
        )
        exchange.send_json({"embedding": vectors_of(embeddings)[0].tolist()})

    async def tags(self, exchange: Exchange) -> None:
        models = [
            model_entry(e.model_id, e.client.description)
            for e in self._directory.entries()
            # For others Ollama has no routes.
            if e.client.description.use in ("generate", "embed")
        ]
        models += [
            model_entry(name, ModelDescription(name, "")) for name in self._directory.unloaded
        ]
        exchange.send_json({"models": models})

    async def ps(self, exchange: Exchange) -> None:
        never = datetime(9999, 1, 1, tzinfo=UTC).isoformat()
        models = [
            {
                **model_entry(e.model_id, e.client.description),
                "expires_at": never,
                **model_sizes(e.client.description),
            }
            for e in self._directory.entries()
        ]
        exchange.send_json({"models": models})

    async def show(self, exchange: Exchange) -> None:
        body = await exchange.read(ShowBody)
        name = body.model or body.name
        if not name:
            raise InvalidRequestError("model is missing.", "model")
        engine = self._engine(name, None)
        info = await asyncio.wrap_future(
            engine.inquire(Inquiry(new_id("show"), DescribeVocabulary(), exchange.caller))
        )
        model = engine.description
        embeds = bool(model.embedding_size)
        if model.use == "draw":
            capabilities = ["image"]
        elif model.ranks or model.use not in ("generate", "embed"):  # Ollama has no word for them
            capabilities = []
        elif embeds:
            capabilities = ["embedding"]
        else:
            capabilities = ["completion", "tools", *(["thinking"] if model.reasoning else [])]
            capabilities += [SENSES[kind] for kind in model.senses if kind in SENSES]
        facts = {
            "general.architecture": model.architecture,
            "general.parameter_count": model.n_params,
            # Clients take it for the context they can use, so not the training context.
            f"{model.architecture}.context_length": model.n_ctx,
            **({f"{model.architecture}.embedding_length": model.embedding_size} if embeds else {}),
        }
        exchange.send_json(
            {
                "modelfile": f"FROM {name}",
                "parameters": f"num_ctx {model.n_ctx}",
                "template": info.chat_template or "",
                "details": model_details(model),
                "model_info": facts,
                "capabilities": capabilities,
            }
        )

    async def version(self, exchange: Exchange) -> None:
        exchange.send_json({"version": OLLAMA_VERSION})


def _keep(exchange: Exchange, body: GenerationBody | EmbedBody | OldEmbedBody) -> bool:
    """Pass on how long the model is to stay; whether it goes at once."""
    if body.keep_alive is None:
        return False
    seconds = read_keep_alive(body.keep_alive)
    if exchange.keeper is None:  # whoever loaded it unloads it
        exchange.ignore("keep_alive")
        return False
    return exchange.keeper.keep(exchange, body.model.removesuffix(":latest"), seconds) and not (
        seconds is None or seconds > 0
    )
