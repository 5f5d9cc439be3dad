"""Anthropic's requests: the schemas, and their translation to a chat. Pure."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from llmkit.errors import InvalidRequestError
from llmkit.gateway.bodies import UNKNOWN, Strict, validated
from llmkit.gateway.openai.chat import ChatRequest
from llmkit.gateway.tolerance import unnoticed
from llmkit.protocol import ModelDescription

__all__ = ["CountBody", "MessagesBody"]


class TextBlock(Strict):
    type: Literal["text"]
    text: str
    cache_control: Any = None  # prefixes are cached without it
    citations: list[Any] | None = None


class ToolUseBlock(Strict):
    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]
    cache_control: Any = None
    caller: Any = None


class ToolReferenceBlock(Strict):
    """A tool found by a tool search; the tool is in the request anyway."""

    type: Literal["tool_reference"]
    tool_name: str

    @property
    def text(self) -> str:
        return self.tool_name


class SearchResultBlock(Strict):
    type: Literal["search_result"]
    title: str
    source: str
    content: list[TextBlock]
    citations: Any = None
    cache_control: Any = None

    @property
    def text(self) -> str:
        return f"{self.title} ({self.source})\n" + "".join(part.text for part in self.content)


class PlainTextSource(Strict):
    type: Literal["text"]
    media_type: str | None = None
    data: str


class DocumentBlock(Strict):
    """A plain-text document."""

    type: Literal["document"]
    source: PlainTextSource
    title: str | None = None
    context: str | None = None
    citations: Any = None
    cache_control: Any = None

    @property
    def text(self) -> str:
        return "\n".join(filter(None, (self.title, self.context, self.source.data)))


ResultBlock = Annotated[
    TextBlock | ToolReferenceBlock | SearchResultBlock | DocumentBlock, Field(discriminator="type")
]


class ToolResultBlock(Strict):
    type: Literal["tool_result"]
    tool_use_id: str
    content: str | list[ResultBlock] | None = None
    is_error: bool | None = None
    cache_control: Any = None


class ThinkingBlock(Strict):
    type: Literal["thinking"]
    thinking: str
    signature: str | None = None


class AnthropicMessage(Strict):
    role: Literal["user", "assistant", "system"]
    content: (
        str
        | list[
            Annotated[
                TextBlock
                | ToolUseBlock
                | ToolResultBlock
                | ThinkingBlock
                | SearchResultBlock
                | DocumentBlock,
                Field(discriminator="type"),
            ]
        ]
    )

    def messages(self) -> list[dict[str, Any]]:
        """The same as OpenAI's messages: first a message for each tool result, then the rest."""
        if isinstance(self.content, str):
            return [{"role": self.role, "content": self.content}]
        results = [
            {
                "role": "tool",
                "tool_call_id": b.tool_use_id,
                "content": ("Error: " if b.is_error else "") + _text(b.content),
            }
            for b in self.content
            if isinstance(b, ToolResultBlock)
        ]
        text = "".join(
            b.text
            for b in self.content
            if isinstance(b, TextBlock | SearchResultBlock | DocumentBlock)
        )
        calls = [
            {
                "id": b.id,
                "type": "function",
                "function": {"name": b.name, "arguments": json.dumps(b.input)},
            }
            for b in self.content
            if isinstance(b, ToolUseBlock)
        ]
        thinking = "".join(b.thinking for b in self.content if isinstance(b, ThinkingBlock))
        message: dict[str, Any] = {"role": self.role, "content": text}
        if calls:
            message["tool_calls"] = calls
        if thinking:
            message["reasoning_content"] = thinking
        return [*results, *([message] if text or calls or not results else [])]


class CustomTool(Strict):
    name: str
    input_schema: dict[str, Any]
    description: str | None = None
    type: Literal["custom"] | None = None
    cache_control: Any = None
    strict: bool | None = None
    eager_input_streaming: bool | None = None


class ToolChoice(Strict):
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
    messages: Annotated[list[AnthropicMessage], Field(min_length=1)]
    system: str | list[TextBlock] | None = None
    tools: list[CustomTool] | None = None
    tool_choice: ToolChoice | None = None
    thinking: ThinkingMode | None = None
    cache_control: Any = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = None  # the old name of output_config.format

    def chat(
        self,
        model: ModelDescription = UNKNOWN,
        ignore: Callable[[str], None] = unnoticed,
        **more: Any,
    ) -> ChatRequest:
        """The equivalent of OpenAI's request, with the fields in ``more``.

        What ``model`` cannot honour and does not change the answer is passed to ``ignore``.
        """
        system = [{"role": "system", "content": _text(self.system)}] if self.system else []
        fields: dict[str, Any] = {
            "model": self.model,
            "messages": [*system, *(m for message in self.messages for m in message.messages())],
            **more,
        }
        if self.tools:
            fields["tools"] = [
                {
                    "type": "function",
                    "function": {
                        "name": t.name,
                        "description": t.description or "",
                        "parameters": t.input_schema,
                    },
                }
                for t in self.tools
            ]
        if self.tool_choice is not None:
            choice = self.tool_choice
            if choice.type == "tool" and not choice.name:
                raise InvalidRequestError("tool_choice: name is missing.", "tool_choice")
            named = {"type": "function", "function": {"name": choice.name}}
            fields["tool_choice"] = {
                "auto": "auto",
                "any": "required",
                "none": "none",
                "tool": named,
            }[choice.type]
            if choice.disable_parallel_tool_use:
                fields["parallel_tool_calls"] = False
        if self.thinking is not None:
            if self.thinking.type == "adaptive":  # the model itself decides whether to reason
                fields["chat_template_kwargs"] = {"enable_thinking": True}
            elif self.thinking.type == "disabled" or model.reasoning:
                is_disabled = self.thinking.type == "disabled"
                fields["reasoning_effort"] = "none" if is_disabled else "medium"
            else:
                ignore("thinking")
        self._add_output_config(fields, model, ignore)
        if (
            self.messages[-1].role == "assistant"
            and fields["messages"][-1]["role"] == "assistant"
            and not fields["messages"][-1].get("tool_calls")
        ):
            fields["continue_final_message"] = True  # the reply's prefill
        return validated(ChatRequest, fields)

    def _add_output_config(
        self, fields: dict[str, Any], model: ModelDescription, ignore: Callable[[str], None]
    ) -> None:
        """The format of the answer, and the effort spent on it."""
        config = self.output_config or OutputConfig()
        form = config.format or self.output_format
        if form is not None:
            fields["response_format"] = {
                "type": "json_schema",
                "json_schema": {"name": form.name or "answer", "schema": form.schema_},
            }
        if config.effort is not None and model.reasoning and "reasoning_effort" not in fields:
            fields["reasoning_effort"] = "xhigh" if config.effort == "max" else config.effort
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

    def request(
        self, model: ModelDescription = UNKNOWN, ignore: Callable[[str], None] = unnoticed
    ) -> ChatRequest:
        sampling = {
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
        }
        return self.chat(
            model,
            ignore,
            **{k: v for k, v in sampling.items() if v is not None},
            **({"stop": self.stop_sequences} if self.stop_sequences else {}),
        )


def _text(
    content: str
    | Sequence[TextBlock | ToolReferenceBlock | SearchResultBlock | DocumentBlock]
    | None,
) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content or [])
