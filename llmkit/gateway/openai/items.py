"""The schemas of the input items of OpenAI's responses. Pure."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from llmkit.gateway.bodies import Strict
from llmkit.gateway.media.parts import InputAudioPart
from llmkit.gateway.openai.parts import InputImagePart, RefusalPart

__all__ = ["InputItem", "ItemReference"]


class ItemTextPart(Strict):
    type: Literal["input_text", "output_text", "text"]
    text: str
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


class ReasoningPart(Strict):
    type: Literal["reasoning_text", "text"]
    text: str


ItemPart = Annotated[
    ItemTextPart | RefusalPart | InputImagePart | InputAudioPart, Field(discriminator="type")
]


class MessageItem(Strict):
    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[ItemPart]
    id: str | None = None
    status: str | None = None
    phase: str | None = None


class CallItem(Strict):
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    id: str | None = None
    status: str | None = None
    namespace: str | None = None


class CustomCallItem(Strict):
    """A call of a tool whose input is free text."""

    type: Literal["custom_tool_call"]
    call_id: str
    name: str
    input: str
    id: str | None = None
    status: str | None = None
    namespace: str | None = None


class ShellCallItem(Strict):
    type: Literal["local_shell_call"]
    action: dict[str, Any]
    call_id: str | None = None
    id: str | None = None
    status: str | None = None


class OutputItem(Strict):
    type: Literal["function_call_output", "custom_tool_call_output", "local_shell_call_output"]
    output: str | list[ItemPart]
    call_id: str | None = None
    id: str | None = None
    status: str | None = None
    name: str | None = None
    namespace: str | None = None


class ItemReference(Strict):
    """Stands for an item of a stored response."""

    type: Literal["item_reference"] = "item_reference"
    id: str


def _kind(item: Any) -> str:
    """The type of an input item; a message may omit it."""
    if isinstance(item, dict) and "type" not in item and "role" not in item and "id" in item:
        return "item_reference"
    kind = (
        item.get("type", "message") if isinstance(item, dict) else getattr(item, "type", "message")
    )
    return kind if isinstance(kind, str) else "message"


class ReasoningItem(Strict):
    type: Literal["reasoning"]
    id: str | None = None
    summary: list[Any] = Field(default_factory=list)
    content: list[ReasoningPart] | None = None
    encrypted_content: None = None
    status: str | None = None


InputItem = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[CallItem, Tag("function_call")]
    | Annotated[CustomCallItem, Tag("custom_tool_call")]
    | Annotated[ShellCallItem, Tag("local_shell_call")]
    | Annotated[OutputItem, Tag("function_call_output")]
    | Annotated[OutputItem, Tag("custom_tool_call_output")]
    | Annotated[OutputItem, Tag("local_shell_call_output")]
    | Annotated[ReasoningItem, Tag("reasoning")]
    | Annotated[ItemReference, Tag("item_reference")],
    Discriminator(_kind),
]
