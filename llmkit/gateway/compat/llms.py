"""The routes of services with /api/llms: /api/generate, /api/chat, /api/completions.

Ollama's /api/generate and /api/chat have the same paths; `Llms.or_else` tells them apart by the
fields of a request. Tornado loop only.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from llmkit.chat.parsers.events import Content
from llmkit.gateway.answers import Answer
from llmkit.gateway.bodies import SessionId, Strict
from llmkit.gateway.chats import Chat, sampling_params
from llmkit.gateway.compat.llama_objects import stop_type
from llmkit.gateway.compat.streaming import json_event, stream_text
from llmkit.gateway.conversations.recall import recalled
from llmkit.gateway.directory import EngineDirectory
from llmkit.gateway.exchange import Exchange
from llmkit.gateway.ids import new_id
from llmkit.protocol import Completion, Message, ModelDescription
from llmkit.protocol.client import EngineClient

__all__ = ["Llms", "LlmsChatBody", "LlmsCompletionBody", "LlmsGenerateBody", "finish_reason"]

DEFAULT_MAX_TOKENS = 512
OWN_FIELDS = frozenset({"max_tokens", "temperature", "top_p"})  # Ollama has none at the top


class LlmsBody(Strict):
    """What all of them share."""

    model: str = "default"
    temperature: float | None = None
    top_p: float | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    stop: list[str] | None = None
    stream: bool = False  # as the path with /stream always does

    def chat(self, messages: list[Message]) -> Chat:
        sampling = sampling_params(
            {},
            temperature=self.temperature,
            top_p=self.top_p,
            max_tokens=DEFAULT_MAX_TOKENS if self.max_tokens is None else self.max_tokens,
            stop=tuple(self.stop or ()),
        )
        return Chat(messages=tuple(messages), sampling=sampling)


class LlmsGenerateBody(LlmsBody):
    """POST /api/generate, as services with /api/llms have it"""

    prompt: str
    part: ClassVar[str] = "text"  # what an event of a stream calls its text

    async def answer(self, engine: EngineClient, exchange: Exchange, on_use: OnUse) -> Answer:
        chat = self.chat([Message("user", self.prompt)])
        return Answer(engine, chat, new_id("llms"), exchange, on_use)


class LlmsMessage(Strict):
    role: Literal["system", "user", "assistant"]
    content: str


class LlmsChatBody(LlmsBody):
    """POST /api/chat, as services with /api/llms have it"""

    messages: Annotated[list[LlmsMessage], Field(min_length=1)]
    session_id: SessionId = None
    part: ClassVar[str] = "content"

    async def answer(self, engine: EngineClient, exchange: Exchange, on_use: OnUse) -> Answer:
        chat = self.chat([Message(m.role, m.content) for m in self.messages])
        chat = await recalled(exchange, engine, chat, self.session_id)
        return Answer(engine, chat, new_id("llms"), exchange, on_use)


class LlmsCompletionBody(LlmsBody):
    """POST /api/completions"""

    prompt: str
    suffix: str | None = None
    part: ClassVar[str] = "text"

    async def answer(self, engine: EngineClient, exchange: Exchange, on_use: OnUse) -> Answer:
        chat = self.chat([Message("user", self.prompt)])
        return Answer(
            engine,
            chat,
            new_id("llms"),
            exchange,
            on_use,
            prompt=self.prompt,
            suffix=self.suffix or None,
        )


OnUse = Callable[[EngineClient], None]
Body = LlmsGenerateBody | LlmsChatBody | LlmsCompletionBody
Run = Callable[[Exchange], Awaitable[None]]


class Llms:
    """Routes over the engines of a directory.

    ``dialect`` says whose the shared paths are: "ollama", "llms", or "auto".
    """

    def __init__(self, directory: EngineDirectory, on_use: OnUse, dialect: str = "auto") -> None:
        self._directory, self._on_use, self._dialect = directory, on_use, dialect

    async def models(self, exchange: Exchange) -> None:
        loaded = [
            _model(e.model_id, e.client.description)
            for e in self._directory.entries()
            if e.client.description.use == "generate" or e.client.description.ranks
        ]
        unloaded = [_model(name, None) for name in self._directory.unloaded]
        exchange.send_json([*loaded, *unloaded])

    def or_else(self, ollama: Run, own: Run) -> Run:
        """Runs Ollama's route or this one."""

        async def run(exchange: Exchange) -> None:
            is_own = self._dialect == "llms" or (
                self._dialect == "auto" and _is_own(await exchange.fields())
            )
            if is_own:
                exchange.dialect = "llms"
            await (own if is_own else ollama)(exchange)

        return run

    async def generate(self, exchange: Exchange) -> None:
        await self._answer(exchange, await exchange.read(LlmsGenerateBody))

    async def chat(self, exchange: Exchange) -> None:
        await self._answer(exchange, await exchange.read(LlmsChatBody))

    async def complete(self, exchange: Exchange) -> None:
        await self._answer(exchange, await exchange.read(LlmsCompletionBody))

    async def stream_generate(self, exchange: Exchange) -> None:
        await self._stream(exchange, await exchange.read(LlmsGenerateBody))

    async def stream_chat(self, exchange: Exchange) -> None:
        await self._stream(exchange, await exchange.read(LlmsChatBody))

    async def stream_complete(self, exchange: Exchange) -> None:
        await self._stream(exchange, await exchange.read(LlmsCompletionBody))

    def _engine(self, model: str) -> EngineClient:
        return self._directory.lookup(model, "generate")

    async def _answer(self, exchange: Exchange, body: Body) -> None:
        await (self._stream if body.stream else self._whole)(exchange, body)

    async def _whole(self, exchange: Exchange, body: Body) -> None:
        engine = self._engine(body.model)
        answer = await body.answer(engine, exchange, self._on_use)
        try:
            events, completion = await answer.whole()
        finally:
            answer.close()
        text = "".join(e.text for e in events if isinstance(e, Content))
        made: dict[str, Any] = (
            {"message": {"role": "assistant", "content": text}}
            if isinstance(body, LlmsChatBody)
            else {"text": text}
        )
        exchange.send_json(
            {
                **made,
                "model": engine.description.name,
                "tokens_generated": completion.usage.completion_tokens,
                "finish_reason": finish_reason(completion),
            }
        )

    async def _stream(self, exchange: Exchange, body: Body) -> None:
        answer = await body.answer(self._engine(body.model), exchange, self._on_use)
        try:
            await stream_text(exchange, answer, lambda text: json_event({body.part: text}))
        finally:
            answer.close()


def _is_own(fields: dict[str, Any]) -> bool:
    return "options" not in fields and not OWN_FIELDS.isdisjoint(fields)


def finish_reason(completion: Completion) -> str:
    """length, stop (a stop string) or eos."""
    return {"limit": "length", "word": "stop", "eos": "eos"}[stop_type(completion)]


def _model(name: str, model: ModelDescription | None) -> dict[str, Any]:
    size = None if model is None or not model.n_params else _size(model.n_params)
    return {
        "id": name,
        "name": name.rpartition("/")[2],
        "description": f"LLM model: {name} (GGUF{f' {model.quantization}' if model else ''})",
        **({"size": size} if size else {}),
        "capabilities": ["text-generation", "chat"],
    }


def _size(parameters: int) -> str:
    billions = parameters / 1e9
    return f"{billions:.1f}B".replace(".0B", "B") if billions >= 1 else f"{parameters / 1e6:.0f}M"
