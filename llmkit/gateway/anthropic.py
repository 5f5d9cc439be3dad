"""Anthropic's messages: their words to a `ChatRequest`, and events back. Tornado loop only."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from llmkit.chat.parsers.events import Call, Content, Event, Reasoning
from llmkit.client import EngineClient
from llmkit.errors import InvalidRequestError
from llmkit.gateway.answers import Answer, count_tokens
from llmkit.gateway.chat import ChatRequest
from llmkit.gateway.engines import EngineDirectory
from llmkit.gateway.exchange import Exchange
from llmkit.gateway.objects import new_id
from llmkit.gateway.schemas import Strict, validated
from llmkit.gateway.tolerance import unnoticed
from llmkit.types import Completion, FinishReason, ModelDescription

__all__ = ["AnthropicRoutes", "CountBody", "MessagesBody"]

Block = dict[str, Any]
UNKNOWN = ModelDescription("", "")


class Text(Strict):
    type: Literal["text"]
    text: str
    cache_control: Any = None  # prefixes are cached without being asked
    citations: list[Any] | None = None


class ToolUse(Strict):
    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]
    cache_control: Any = None
    caller: Any = None


class ToolReference(Strict):
    """What a search for tools found; the tool itself is offered anyway."""

    type: Literal["tool_reference"]
    tool_name: str

    @property
    def text(self) -> str:
        return self.tool_name


class SearchResult(Strict):
    type: Literal["search_result"]
    title: str
    source: str
    content: list[Text]
    citations: Any = None
    cache_control: Any = None

    @property
    def text(self) -> str:
        return f"{self.title} ({self.source})\n" + "".join(part.text for part in self.content)


class PlainSource(Strict):
    type: Literal["text"]
    media_type: str | None = None
    data: str


class Document(Strict):
    """A document that is plain text."""

    type: Literal["document"]
    source: PlainSource
    title: str | None = None
    context: str | None = None
    citations: Any = None
    cache_control: Any = None

    @property
    def text(self) -> str:
        return "\n".join(filter(None, (self.title, self.context, self.source.data)))


Readable = Annotated[Text | ToolReference | SearchResult | Document, Field(discriminator="type")]


class ToolResult(Strict):
    type: Literal["tool_result"]
    tool_use_id: str
    content: str | list[Readable] | None = None
    is_error: bool | None = None
    cache_control: Any = None


class Thinking(Strict):
    type: Literal["thinking"]
    thinking: str
    signature: str | None = None


class Turn(Strict):
    role: Literal["user", "assistant", "system"]
    content: str | list[Annotated[Text | ToolUse | ToolResult | Thinking | SearchResult | Document, Field(discriminator="type")]]

    def messages(self) -> list[dict[str, Any]]:
        """The same as OpenAI's messages: results of tools come first, each as a message."""
        if isinstance(self.content, str):
            return [{"role": self.role, "content": self.content}]
        results = [
            {"role": "tool", "tool_call_id": b.tool_use_id, "content": ("Error: " if b.is_error else "") + _text(b.content)}
            for b in self.content
            if isinstance(b, ToolResult)
        ]
        text = "".join(b.text for b in self.content if isinstance(b, Text | SearchResult | Document))
        calls = [
            {"id": b.id, "type": "function", "function": {"name": b.name, "arguments": json.dumps(b.input)}} for b in self.content if isinstance(b, ToolUse)
        ]
        thinking = "".join(b.thinking for b in self.content if isinstance(b, Thinking))
        own: dict[str, Any] = {"role": self.role, "content": text}
        if calls:
            own["tool_calls"] = calls
        if thinking:
            own["reasoning_content"] = thinking
        return [*results, *([own] if text or calls or not results else [])]


class ToolBody(Strict):
    name: str
    input_schema: dict[str, Any]
    description: str | None = None
    type: Literal["custom"] | None = None
    cache_control: Any = None
    strict: bool | None = None
    eager_input_streaming: bool | None = None


class Choice(Strict):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class ThinkingMode(Strict):
    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = None
    display: str | None = None


class OutputFormat(Strict):
    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")
    name: str | None = None


class OutputConfig(Strict):
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: OutputFormat | None = None


class CountBody(Strict):
    """POST /v1/messages/count_tokens"""

    model: str = "default"
    messages: Annotated[list[Turn], Field(min_length=1)]
    system: str | list[Text] | None = None
    tools: list[ToolBody] | None = None
    tool_choice: Choice | None = None
    thinking: ThinkingMode | None = None
    cache_control: Any = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = None  # as it was called before

    def chat(self, model: ModelDescription = UNKNOWN, ignore: Callable[[str], None] = unnoticed, **more: Any) -> ChatRequest:
        """The same as OpenAI's request; what ``model`` cannot honour, and what changes no answer, is given to ``ignore``."""
        system = [{"role": "system", "content": _text(self.system)}] if self.system else []
        asked: dict[str, Any] = {"model": self.model, "messages": [*system, *(m for turn in self.messages for m in turn.messages())], **more}
        if self.tools:
            asked["tools"] = [
                {"type": "function", "function": {"name": t.name, "description": t.description or "", "parameters": t.input_schema}} for t in self.tools
            ]
        if self.tool_choice is not None:
            choice = self.tool_choice
            if choice.type == "tool" and not choice.name:
                raise InvalidRequestError("tool_choice: the type tool needs a name.", "tool_choice")
            named = {"type": "function", "function": {"name": choice.name}}
            asked["tool_choice"] = {"auto": "auto", "any": "required", "none": "none", "tool": named}[choice.type]
            if choice.disable_parallel_tool_use:
                asked["parallel_tool_calls"] = False
        if self.thinking is not None:
            if self.thinking.type == "adaptive":
                asked["chat_template_kwargs"] = {"enable_thinking": True}  # whether to reason is the model's own choice
            elif self.thinking.type == "disabled" or model.reasoning:
                asked["reasoning_effort"] = "none" if self.thinking.type == "disabled" else "medium"
            else:
                ignore("thinking")
        self._shape(asked, model, ignore)
        if self.messages[-1].role == "assistant" and asked["messages"][-1]["role"] == "assistant" and not asked["messages"][-1].get("tool_calls"):
            asked["continue_final_message"] = True  # the beginning of the reply
        return validated(ChatRequest, asked)

    def _shape(self, asked: dict[str, Any], model: ModelDescription, ignore: Callable[[str], None]) -> None:
        """What the answer is to look like, and how much is to be thought."""
        config = self.output_config or OutputConfig()
        form = config.format or self.output_format
        if form is not None:
            asked["response_format"] = {"type": "json_schema", "json_schema": {"name": form.name or "answer", "schema": form.schema_}}
        if config.effort is not None and model.reasoning and "reasoning_effort" not in asked:
            asked["reasoning_effort"] = "xhigh" if config.effort == "max" else config.effort
        elif config.effort is not None:
            ignore("output_config.effort")


class MessagesBody(CountBody):
    """POST /v1/messages"""

    max_tokens: Annotated[int, Field(ge=1)]
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    temperature: Annotated[float, Field(ge=0, le=1)] | None = None
    top_p: float | None = None
    top_k: int | None = None
    metadata: dict[str, Any] | None = None
    service_tier: Literal["auto", "standard_only"] | None = None

    def request(self, model: ModelDescription = UNKNOWN, ignore: Callable[[str], None] = unnoticed) -> ChatRequest:
        given = {"max_tokens": self.max_tokens, "temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        return self.chat(model, ignore, **{k: v for k, v in given.items() if v is not None}, **({"stop": self.stop_sequences} if self.stop_sequences else {}))


def _text(content: str | Sequence[Text | ToolReference | SearchResult | Document] | None) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content or [])


class AnthropicRoutes:
    """`/v1/messages` over the engines of a directory."""

    def __init__(self, directory: EngineDirectory, on_use: Callable[[EngineClient], None]) -> None:
        self._directory = directory
        self._on_use = on_use

    async def count_tokens(self, exchange: Exchange) -> None:
        body = await exchange.read(CountBody)
        engine = self._directory.lookup(body.model, "generate")
        exchange.send_json({"input_tokens": await count_tokens(engine, body.chat(engine.description, exchange.ignore), new_id("count"), exchange.caller)})

    async def messages(self, exchange: Exchange) -> None:
        body = await exchange.read(MessagesBody)
        engine = self._directory.lookup(body.model, "generate")
        request, reply_id = body.request(engine.description, exchange.ignore), new_id("msg").replace("-", "_")
        head = {"id": reply_id, "type": "message", "role": "assistant", "model": engine.description.name}
        num_prompt = await count_tokens(engine, request, f"{reply_id}-count", exchange.caller) if body.stream else 0
        answer = Answer(engine, request, reply_id, exchange, self._on_use)
        try:
            if body.stream:
                await self._stream(exchange, answer, head, num_prompt)
                return
            events, completion = await answer.whole()
            content = [block for block in _blocks(events)]
            exchange.send_json({**head, "content": content, **_end(completion, any(isinstance(e, Call) for e in events)), "usage": _usage(completion)})
        finally:
            answer.close()

    @staticmethod
    async def _stream(exchange: Exchange, answer: Answer, head: dict[str, Any], num_prompt: int) -> None:
        news = answer.news()
        first = await anext(news)  # an error before the first byte still has its real status
        await exchange.start_events()
        usage = {"input_tokens": num_prompt, "output_tokens": 0}
        begun = {**head, "content": [], "stop_reason": None, "stop_sequence": None, "usage": usage}
        await exchange.send_named_event({"type": "message_start", "message": begun})
        blocks = BlockStream()
        has_calls = False
        entry: Any = first
        while True:
            if entry is None:
                await exchange.send_named_event({"type": "ping"})
            elif isinstance(entry, Completion):
                break
            else:
                has_calls = has_calls or any(isinstance(e, Call) for e in entry)
                for event in blocks.events(entry):
                    await exchange.send_named_event(event)
            entry = await anext(news)
        for event in blocks.close():
            await exchange.send_named_event(event)
        await exchange.send_named_event({"type": "message_delta", "delta": _end(entry, has_calls), "usage": _usage(entry)})
        await exchange.send_named_event({"type": "message_stop"})
        exchange.end_events("")


class BlockStream:
    """Events as content blocks: neighbours of a kind are one block."""

    def __init__(self) -> None:
        self._index = -1
        self._open: str | None = None

    def events(self, entries: list[Event]) -> list[Block]:
        found: list[Block] = []
        for entry in entries:
            match entry:
                case Content():
                    found += self._turn("text", {"type": "text", "text": ""})
                    found.append(self._delta({"type": "text_delta", "text": entry.text}))
                case Reasoning():
                    found += self._turn("thinking", {"type": "thinking", "thinking": "", "signature": ""})
                    found.append(self._delta({"type": "thinking_delta", "thinking": entry.text}))
                case Call():
                    found += self._turn(None, {"type": "tool_use", "id": _tool_id(entry), "name": entry.name, "input": {}})
                    found.append(self._delta({"type": "input_json_delta", "partial_json": entry.arguments}))
        return found

    def _turn(self, kind: str | None, block: Block) -> list[Block]:
        """Begin a block, unless one of its kind is open."""
        if kind is not None and self._open == kind:
            return []
        found = self.close()
        self._index += 1
        self._open = kind or "tool_use"
        return [*found, {"type": "content_block_start", "index": self._index, "content_block": block}]

    def _delta(self, delta: Block) -> Block:
        return {"type": "content_block_delta", "index": self._index, "delta": delta}

    def close(self) -> list[Block]:
        if self._open is None:
            return []
        self._open = None
        return [{"type": "content_block_stop", "index": self._index}]


def _tool_id(call: Call) -> str:
    return call.call_id.replace("call_", "toolu_")


def _blocks(events: list[Event]) -> list[Block]:
    blocks: list[Block] = []
    for event in events:
        match event:
            case Content():
                if blocks and blocks[-1]["type"] == "text":
                    blocks[-1]["text"] += event.text
                else:
                    blocks.append({"type": "text", "text": event.text})
            case Reasoning():
                if blocks and blocks[-1]["type"] == "thinking":
                    blocks[-1]["thinking"] += event.text
                else:
                    blocks.append({"type": "thinking", "thinking": event.text, "signature": ""})
            case Call():
                blocks.append({"type": "tool_use", "id": _tool_id(event), "name": event.name, "input": json.loads(event.arguments)})
    return blocks


def _end(completion: Completion, has_calls: bool) -> dict[str, Any]:
    if completion.finish_reason is FinishReason.LENGTH:
        return {"stop_reason": "max_tokens", "stop_sequence": None}
    if completion.stop is not None:
        return {"stop_reason": "stop_sequence", "stop_sequence": completion.stop}
    return {"stop_reason": "tool_use" if has_calls else "end_turn", "stop_sequence": None}


def _usage(completion: Completion) -> dict[str, int]:
    usage = completion.usage
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_read_input_tokens": usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "output_tokens": usage.completion_tokens,
    }
