"""Anthropic's requests: the schemas, and their translation to a chat. Pure."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from llmkit.errors import InvalidRequestError
from llmkit.gateway.bodies import SessionId, Strict
from llmkit.gateway.chats import Chat, Effort, NamedTool, ToolChoice, sampling_params
from llmkit.gateway.media.attached import Attached
from llmkit.gateway.tolerance import unnoticed
from llmkit.protocol import (
    Grammar,
    Media,
    Message,
    ModelDescription,
    SamplingParams,
    Tool,
    ToolCall,
)
from llmkit.protocol.messages import Part

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

    def call(self) -> ToolCall:
        return ToolCall(self.id, self.name, json.dumps(self.input))


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


class Base64Source(Strict):
    type: Literal["base64"]
    media_type: str | None = None  # the file itself says what it is
    data: str


class UrlSource(Strict):
    type: Literal["url"]
    url: str


class FileSource(Strict):
    type: Literal["file"]
    file_id: str


class ImageBlock(Strict):
    type: Literal["image"]
    source: Annotated[Base64Source | UrlSource | FileSource, Field(discriminator="type")]
    cache_control: Any = None

    def media(self, attached: Attached) -> Media:
        match self.source:
            case Base64Source(data=data):
                return attached.image(data, is_url=False)
            case UrlSource(url=url):
                return attached.image(url, is_url=True)
        raise InvalidRequestError(
            "messages: there are no uploaded files here; send a picture as base64.", "messages"
        )


ResultBlock = Annotated[
    TextBlock | ToolReferenceBlock | SearchResultBlock | DocumentBlock | ImageBlock,
    Field(discriminator="type"),
]


class ToolResultBlock(Strict):
    type: Literal["tool_result"]
    tool_use_id: str
    content: str | list[ResultBlock] | None = None
    is_error: bool | None = None
    cache_control: Any = None

    def message(self, attached: Attached) -> Message:
        said = ("Error: ",) if self.is_error else ()
        content = (*said, *_parts(self.content, attached))
        return Message("tool", content, tool_call_id=self.tool_use_id)


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
                | DocumentBlock
                | ImageBlock,
                Field(discriminator="type"),
            ]
        ]
    )

    def messages(self, attached: Attached) -> list[Message]:
        """As our messages: first one for each tool result, then one of the rest."""
        if isinstance(self.content, str):
            return [Message(self.role, self.content)]
        results = [b.message(attached) for b in self.content if isinstance(b, ToolResultBlock)]
        shown = TextBlock | SearchResultBlock | DocumentBlock | ImageBlock
        told = _parts([b for b in self.content if isinstance(b, shown)], attached)
        calls = tuple(b.call() for b in self.content if isinstance(b, ToolUseBlock))
        thinking = "".join(b.thinking for b in self.content if isinstance(b, ThinkingBlock))
        if results and not any(told) and not calls:
            return results
        rest = Message(self.role, told, tool_calls=calls, reasoning_content=thinking or None)
        return [*results, rest]


class CustomTool(Strict):
    name: str
    input_schema: dict[str, Any]
    description: str | None = None
    type: Literal["custom"] | None = None
    cache_control: Any = None
    strict: bool | None = None
    eager_input_streaming: bool | None = None

    def tool(self) -> Tool:
        return Tool(self.name, self.description or "", self.input_schema)


class AnthropicToolChoice(Strict):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None

    def choice(self) -> ToolChoice:
        if self.type != "tool":
            return "required" if self.type == "any" else self.type
        if not self.name:
            raise InvalidRequestError("tool_choice: name is missing.", "tool_choice")
        return NamedTool(self.name)


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
    tool_choice: AnthropicToolChoice | None = None
    thinking: ThinkingMode | None = None
    cache_control: Any = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = None  # the old name of output_config.format

    def chat(
        self,
        model: ModelDescription,
        attached: Attached,
        ignore: Callable[[str], None] = unnoticed,
    ) -> Chat:
        """The chat that it asks for. Raises `InvalidRequestError`.

        What it holds beside text is noted in ``attached``. What ``model`` cannot honour and does
        not change the answer is passed to ``ignore``.
        """
        system = [Message("system", _text(self.system))] if self.system else []
        told = [m for message in self.messages for m in message.messages(attached)]
        messages = [*system, *told]
        last, choice = messages[-1], self.tool_choice
        thinking = self.thinking.type if self.thinking is not None else None
        return Chat(
            messages=tuple(messages),
            sampling=self._sampling(),
            tools=tuple(tool.tool() for tool in self.tools or ()),
            tool_choice="auto" if choice is None else choice.choice(),
            parallel_calls=choice is None or not choice.disable_parallel_tool_use,
            reasoning_effort=self._effort(model, ignore),
            # The model itself decides whether to reason.
            template_options={"enable_thinking": True} if thinking == "adaptive" else {},
            continue_final=last.role == "assistant" and not last.tool_calls,  # a prefill
        )

    def _effort(self, model: ModelDescription, ignore: Callable[[str], None]) -> Effort | None:
        effort: Effort | None = None
        match self.thinking:
            case ThinkingMode(type="disabled"):
                effort = "none"
            case ThinkingMode(type="enabled") if model.reasoning:
                effort = "medium"
            case ThinkingMode(type="enabled"):
                ignore("thinking")
        wanted = self.output_config.effort if self.output_config is not None else None
        if wanted is not None and model.reasoning and effort is None:
            return "xhigh" if wanted == "max" else wanted
        if wanted is not None:
            ignore("output_config.effort")
        return effort

    def _sampling(self) -> SamplingParams:
        return sampling_params({}, grammar=self._grammar())

    def _grammar(self) -> Grammar | None:
        """The format of the answer."""
        config = self.output_config.format if self.output_config is not None else None
        form = config or self.output_format
        if form is None:
            return None
        origin = "output_format" if config is None else "output_config.format"
        return Grammar("json_schema", json.dumps(form.schema_), origin=origin)


class MessagesBody(CountBody):
    """POST /v1/messages"""

    max_tokens: Annotated[int, Field(ge=1)]
    session_id: SessionId = None
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    temperature: Annotated[float, Field(ge=0, le=1)] | None = None
    top_p: float | None = None
    top_k: int | None = None
    metadata: dict[str, Any] | None = None
    service_tier: Literal["auto", "standard_only"] | None = None

    def _sampling(self) -> SamplingParams:
        return sampling_params(
            {"stop": "stop_sequences"},
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            stop=self.stop_sequences,
            grammar=self._grammar(),
        )


def _text(content: str | Sequence[TextBlock]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)


def _parts(
    content: str
    | Sequence[TextBlock | ToolReferenceBlock | SearchResultBlock | DocumentBlock | ImageBlock]
    | None,
    attached: Attached,
) -> tuple[Part, ...]:
    if isinstance(content, str):
        return (content,)
    return tuple(b.media(attached) if isinstance(b, ImageBlock) else b.text for b in content or ())
