"""Ollama's routes: its words to a `ChatRequest` (or plain completion), and lines of JSON back. Tornado loop only."""

from __future__ import annotations

import asyncio
import difflib
import json
import time
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from llmkit.chat.parsers.events import Call, Content, Event, Reasoning
from llmkit.client import EngineClient
from llmkit.errors import InvalidRequestError
from llmkit.gateway.answers import Answer
from llmkit.gateway.chat import ChatRequest, ToolBody
from llmkit.gateway.engines import EngineDirectory
from llmkit.gateway.exchange import Exchange
from llmkit.gateway.objects import new_id
from llmkit.gateway.schemas import Strict, validated
from llmkit.gateway.tolerance import unnoticed
from llmkit.gateway.vectors import embed, json_vectors, vectors_of, with_list
from llmkit.types import Completion, EmbeddingRequest, FinishReason, Inquiry, ModelDescription

__all__ = ["ChatBody", "EmbedBody", "GenerateBody", "OldEmbedBody", "OllamaRoutes", "ShowBody"]

SAME = (
    "temperature", "top_k", "top_p", "min_p", "typical_p", "seed", "stop", "repeat_penalty", "repeat_last_n", "presence_penalty", "frequency_penalty",
    "mirostat", "mirostat_tau", "mirostat_eta",
)  # fmt: skip
NDJSON = "application/x-ndjson"
WHOLE = ("top_k", "seed", "repeat_last_n", "num_ctx", "num_predict", "mirostat")
# What clients compare with: VS Code wants 0.6.4, Codex 0.13.4, Ollama's own tools 0.14.
OLLAMA_VERSION = "0.14.2"


class CalledFunction(Strict):
    name: str
    arguments: dict[str, Any] | str = Field(default_factory=dict)
    index: int | None = None


class CalledTool(Strict):
    function: CalledFunction
    id: str | None = None
    type: str | None = None


class OllamaMessage(Strict):
    role: Annotated[Literal["system", "developer", "user", "assistant", "tool"], BeforeValidator(lambda r: r.lower() if isinstance(r, str) else r)]
    content: str | None = None
    thinking: str | None = None
    tool_calls: list[CalledTool] | None = None
    tool_name: str | None = None
    tool_call_id: str | None = None
    images: Annotated[list[str], Field(max_length=0)] | None = None

    def message(self, place: int) -> dict[str, Any]:
        found: dict[str, Any] = {"role": self.role, "content": self.content or ""}
        if self.tool_calls:
            found["tool_calls"] = [
                {"id": c.id or f"call_{place}_{i}", "type": "function", "function": {"name": c.function.name, "arguments": _arguments(c.function.arguments)}}
                for i, c in enumerate(self.tool_calls)
            ]
        given = {"reasoning_content": self.thinking, "name": self.tool_name, "tool_call_id": self.tool_call_id}
        return {**found, **{k: v for k, v in given.items() if v is not None}}


def _arguments(given: dict[str, Any] | str) -> str:
    return given if isinstance(given, str) else json.dumps(given)


class Body(Strict):
    """What chat and generate take."""

    model: str
    stream: bool = True
    format: Literal["", "json"] | dict[str, Any] | None = None
    options: dict[str, Any] = Field(default_factory=dict)
    keep_alive: str | int | float | None = None  # models stay until they are unloaded where they were loaded
    think: bool | Literal["low", "medium", "high", "max"] | None = None

    def asked(self, model: ModelDescription, ignore: Callable[[str], None] = unnoticed) -> dict[str, Any]:
        """Options in OpenAI's words; what ``model`` cannot honour, and what changes no answer, is given to ``ignore``. Raises `InvalidRequestError`."""
        found: dict[str, Any] = {"model": self.model}
        for name, value in self.options.items():
            if isinstance(value, float) and value.is_integer() and name in WHOLE:
                value = int(value)  # JavaScript's numbers
            whole = isinstance(value, int) and not isinstance(value, bool)
            if value is None or (name in ("seed", "num_predict") and whole and value < 0):
                continue  # not given; a fresh seed; no limit
            if name == "num_ctx":
                if not whole or value <= 0:
                    raise InvalidRequestError("options.num_ctx must be a number of tokens.", "options")
                if value > model.n_ctx:  # a prompt that does not fit is refused all the same
                    ignore("options.num_ctx")
            elif name == "num_predict":
                if not whole or value == 0:
                    raise InvalidRequestError("options.num_predict must be a number of tokens, or negative for no limit.", "options")
                found["max_tokens"] = value
            elif name == "repeat_last_n" and whole and value < 0:
                found[name] = model.n_ctx
            elif name in SAME:
                found[name] = value
            else:
                near = difflib.get_close_matches(name[:60], (*SAME, "num_ctx", "num_predict"), n=1)
                hint = f" Did you mean {near[0]}?" if near else ""
                raise InvalidRequestError(f"options.{name:.60}: not an option that a running model can honour.{hint}", "options")
        if self.format == "json":
            found["response_format"] = {"type": "json_object"}
        elif isinstance(self.format, dict):
            found["json_schema"] = self.format
        if self.think is not None and (model.reasoning or self.think):
            effort = "none" if self.think is False else self.think if isinstance(self.think, str) else "medium"
            found["reasoning_effort"] = "xhigh" if effort == "max" else effort
        return {k: v for k, v in found.items() if v is not None}


class ChatBody(Body):
    """POST /api/chat"""

    messages: list[OllamaMessage] = Field(default_factory=list)
    tools: list[ToolBody] | None = None

    def request(self, model: ModelDescription, ignore: Callable[[str], None] = unnoticed) -> ChatRequest:
        tools: dict[str, Any] = {"tools": [t.model_dump() for t in self.tools]} if self.tools else {}
        if self.messages[-1].role == "assistant" and not self.messages[-1].tool_calls:  # the beginning of the reply
            tools["continue_final_message"] = True
        return validated(ChatRequest, {**self.asked(model, ignore), "messages": [m.message(i) for i, m in enumerate(self.messages)], **tools})


class GenerateBody(Body):
    """POST /api/generate"""

    prompt: str = ""
    suffix: str | None = None
    system: str | None = None
    raw: bool = False

    def request(self, model: ModelDescription, ignore: Callable[[str], None] = unnoticed) -> ChatRequest:
        system = [{"role": "system", "content": self.system}] if self.system else []
        return validated(ChatRequest, {**self.asked(model, ignore), "messages": [*system, {"role": "user", "content": self.prompt}]})


class EmbedBody(Strict):
    """POST /api/embed"""

    model: str
    input: str | list[str]
    truncate: bool = True
    dimensions: Annotated[int, Field(ge=1)] | None = None
    keep_alive: str | int | float | None = None
    options: dict[str, Any] = Field(default_factory=dict)


class OldEmbedBody(Strict):
    """POST /api/embeddings"""

    model: str
    prompt: str
    keep_alive: str | int | float | None = None
    options: dict[str, Any] = Field(default_factory=dict)


class ShowBody(Strict):
    """POST /api/show"""

    model: str | None = None
    name: str | None = None
    verbose: bool = False


class OllamaRoutes:
    """`/api/…` over the engines of a directory."""

    def __init__(self, directory: EngineDirectory, on_use: Callable[[EngineClient], None]) -> None:
        self._directory = directory
        self._on_use = on_use

    def _engine(self, model: str, use: Literal["generate", "embed"] | None = "generate") -> EngineClient:
        return self._directory.lookup(model.removesuffix(":latest"), use)

    async def chat(self, exchange: Exchange) -> None:
        body = await exchange.read(ChatBody)
        engine = self._engine(body.model)
        if not body.messages:  # how Ollama's clients load a model
            exchange.send_json(
                {"model": body.model, "created_at": _now(), "message": {"role": "assistant", "content": ""}, "done": True, "done_reason": "load"}
            )
            return
        await self._answer(
            exchange, body, engine, body.request(engine.description, exchange.ignore), lambda m: {"message": {"role": "assistant", "content": "", **m}}
        )

    async def generate(self, exchange: Exchange) -> None:
        body = await exchange.read(GenerateBody)
        engine = self._engine(body.model)
        if body.raw and (body.system is not None or body.think is not None):
            raise InvalidRequestError("raw leaves the template out, so there is no place for system or think.", "raw")
        if body.suffix is not None and (body.system is not None or body.think is not None):
            raise InvalidRequestError("suffix asks for the middle of a text; there is no place for system or think.", "suffix")
        if not body.prompt and body.suffix is None:
            exchange.send_json({"model": body.model, "created_at": _now(), "response": "", "done": True, "done_reason": "load"})
            return

        def named(message: dict[str, Any]) -> dict[str, Any]:
            thinking = {"thinking": message["thinking"]} if "thinking" in message else {}
            return {"response": message.get("content", ""), **thinking}

        await self._answer(
            exchange,
            body,
            engine,
            body.request(engine.description, exchange.ignore),
            named,
            prompt=body.prompt if body.raw or body.suffix is not None else None,
            suffix=body.suffix,
        )

    async def _answer(
        self,
        exchange: Exchange,
        body: Body,
        engine: EngineClient,
        request: ChatRequest,
        named: Callable[[dict[str, Any]], Any],
        prompt: str | None = None,
        suffix: str | None = None,
    ) -> None:
        began = time.perf_counter()
        answer = Answer(engine, request, new_id("ollama"), exchange, self._on_use, prompt=prompt, suffix=suffix)
        try:
            if body.stream:
                await self._stream(exchange, answer.news(), body.model, named, began)
                return
            events, completion = await answer.whole()
            exchange.send_json({**_line(body.model, named(_message(events))), **_ending(completion, began)})
        finally:
            answer.close()

    @staticmethod
    async def _stream(exchange: Exchange, news: AsyncIterator[Any], model: str, named: Callable[[dict[str, Any]], Any], began: float) -> None:
        entry = await anext(news)  # an error before the first byte still has its real status
        await exchange.start_events(NDJSON)
        num_calls = 0
        while not isinstance(entry, Completion):
            for event in entry or ():
                await exchange.send_line({**_line(model, named(_message([event], num_calls))), "done": False})
                num_calls += isinstance(event, Call)
            entry = await anext(news)
        await exchange.send_line({**_line(model, named({})), **_ending(entry, began)})
        exchange.end_events("")

    async def embed(self, exchange: Exchange) -> None:
        body = await exchange.read(EmbedBody)
        began = time.perf_counter()
        engine = self._engine(body.model, "embed")
        self._on_use(engine)
        if body.dimensions is not None and body.dimensions > engine.description.embedding_size > 0:
            raise InvalidRequestError(f"dimensions: the vectors have {engine.description.embedding_size}; {body.dimensions} is more.", "dimensions")
        texts = [body.input] if isinstance(body.input, str) else body.input
        inputs = tuple([await self._cut(engine, text, exchange.caller) if body.truncate else text for text in texts])
        found = await embed(engine, EmbeddingRequest(new_id("embd"), inputs, caller=exchange.caller))
        vectors = await asyncio.to_thread(vectors_of, found, body.dimensions)
        times = {"total_duration": _ns(time.perf_counter() - began), "load_duration": 0, "prompt_eval_count": sum(found.num_tokens)}
        listed = await asyncio.to_thread(json_vectors, vectors)
        exchange.send_bytes(with_list({"model": body.model, **times}, "embeddings", listed))

    @staticmethod
    async def _cut(engine: EngineClient, text: str, caller: str) -> str | tuple[int, ...]:
        """As much of a text as the model reads."""
        n_ctx = engine.description.n_ctx
        if len(text) <= n_ctx:  # a token has a character at least, but for the two around a text
            return text
        asked = Inquiry(new_id("cut"), "tokenize", {"text": text, "parse_special": False}, caller)
        tokens = (await asyncio.wrap_future(engine.inquire(asked)))["tokens"]
        return text if len(tokens) <= n_ctx else (*tokens[: n_ctx - 1], tokens[-1])

    async def embeddings(self, exchange: Exchange) -> None:
        """The older form: one text, one vector."""
        body = await exchange.read(OldEmbedBody)
        engine = self._engine(body.model, "embed")
        self._on_use(engine)
        found = await embed(engine, EmbeddingRequest(new_id("embd"), (await self._cut(engine, body.prompt, exchange.caller),), caller=exchange.caller))
        exchange.send_json({"embedding": vectors_of(found, None)[0].tolist()})

    async def tags(self, exchange: Exchange) -> None:
        exchange.send_json({"models": [_tag(e.model_id, e.client.description) for e in self._directory.entries()]})

    async def ps(self, exchange: Exchange) -> None:
        entries = self._directory.entries()
        far = datetime(9999, 1, 1, tzinfo=UTC).isoformat()  # until somebody unloads them
        exchange.send_json({"models": [{**_tag(e.model_id, e.client.description), "expires_at": far, **_sizes(e.client.description)} for e in entries]})

    async def show(self, exchange: Exchange) -> None:
        body = await exchange.read(ShowBody)
        name = body.model or body.name
        if not name:
            raise InvalidRequestError("model is missing.", "model")
        engine = self._engine(name, None)
        info = await asyncio.wrap_future(engine.inquire(Inquiry(new_id("show"), "info", {}, exchange.caller)))
        model = engine.description
        embeds = bool(model.embedding_size)
        able = ["embedding"] if embeds else ["completion", "tools", *(["thinking"] if model.reasoning else [])]
        facts = {
            "general.architecture": model.architecture,
            "general.parameter_count": model.n_params,
            f"{model.architecture}.context_length": model.n_ctx,  # clients take it for what they may use
            **({f"{model.architecture}.embedding_length": model.embedding_size} if embeds else {}),
        }
        exchange.send_json(
            {
                "modelfile": f"FROM {name}",
                "parameters": f"num_ctx {model.n_ctx}",
                "template": info["chat_template"] or "",
                "details": _details(model),
                "model_info": facts,
                "capabilities": able,
            }
        )

    async def version(self, exchange: Exchange) -> None:
        exchange.send_json({"version": OLLAMA_VERSION})


def _message(events: list[Event], num_calls: int = 0) -> dict[str, Any]:
    """Events as the fields of a message, after so many calls; none where there is nothing."""
    found: dict[str, Any] = {}
    for event in events:
        match event:
            case Content():
                found["content"] = found.get("content", "") + event.text
            case Reasoning():
                found["thinking"] = found.get("thinking", "") + event.text
            case Call():
                calls = found.setdefault("tool_calls", [])
                calls.append({"id": event.call_id, "function": {"index": num_calls + len(calls), "name": event.name, "arguments": json.loads(event.arguments)}})
    return found


def _line(model: str, named: dict[str, Any]) -> dict[str, Any]:
    return {"model": model, "created_at": _now(), **named}


def _ending(completion: Completion, began: float) -> dict[str, Any]:
    metrics, usage = completion.metrics, completion.usage
    return {
        "done": True,
        "done_reason": "length" if completion.finish_reason is FinishReason.LENGTH else "stop",
        "total_duration": _ns(time.perf_counter() - began),
        "load_duration": 0,
        "prompt_eval_count": usage.prompt_tokens,
        "prompt_eval_duration": _ns(max(metrics.ttft_s - metrics.queue_s, 0.0)),
        "eval_count": usage.completion_tokens,
        "eval_duration": _ns(metrics.decode_s),
    }


def _now() -> str:
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")


def _ns(seconds: float) -> int:
    return int(seconds * 1e9)


def _tag(model_id: str, model: ModelDescription) -> dict[str, Any]:
    at = datetime.fromtimestamp(model.created, UTC).isoformat()
    return {"name": model_id, "model": model_id, "modified_at": at, "size": model.weights_bytes, "digest": "", "details": _details(model)}


def _sizes(model: ModelDescription) -> dict[str, int]:
    whole = model.weights_bytes + model.kv_bytes
    return {"size": whole, "size_vram": whole if model.device == "gpu" else 0, "context_length": model.n_ctx}


def _details(model: ModelDescription) -> dict[str, Any]:
    return {
        "parent_model": "",
        "format": "gguf",
        "family": model.architecture,
        "families": [model.architecture],
        "parameter_size": f"{model.n_params / 1e6:.0f}M" if model.n_params < 1e9 else f"{model.n_params / 1e9:.1f}B",
        "quantization_level": model.quantization,
    }
