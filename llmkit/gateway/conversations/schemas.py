"""The bodies of the routes of sessions. Pure."""

from __future__ import annotations

from abc import abstractmethod
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from llmkit.errors import InvalidRequestError
from llmkit.gateway.bodies import Strict
from llmkit.gateway.conversations.settings import TurnSettings
from llmkit.gateway.media.attached import Attached
from llmkit.gateway.media.parts import ImagePart, InputAudioPart
from llmkit.protocol import Media, ToolCall
from llmkit.store.conversation_records import MAX_TITLE, UNSET, NewMessage, Pruning, Unset

__all__ = [
    "ROOT",
    "ChangeBody",
    "EditBody",
    "ForkBody",
    "ImportBody",
    "RegenerateBody",
    "SendBody",
    "SessionBody",
    "TurnBody",
]

ROOT = "root"  # as a parent: none
Title = Annotated[str, Field(max_length=MAX_TITLE)]
Seconds = Annotated[float, Field(ge=0, le=1e10)]  # 0 is never


class TextPart(Strict):
    type: Literal["text"] = "text"
    text: str


class FunctionCall(Strict):
    name: str
    arguments: str = "{}"


class CallBody(Strict):
    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class MediaPart(Strict):
    """A picture or sound that one of the caller's sessions has already."""

    type: Literal["media"]
    digest: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    kind: Literal["image", "audio"]

    def part(self, attached: Attached) -> Media:
        return Media(self.digest, self.kind)


Content = str | list[TextPart | ImagePart | InputAudioPart | MediaPart]


def _stored(content: Content | None, attached: Attached) -> str | list[dict[str, Any]]:
    """Content as it is stored: a text, or parts that name their files by digest."""
    if content is None or isinstance(content, str):
        return content or ""
    made: list[dict[str, Any]] = []
    for part in content:
        if isinstance(part, TextPart):
            made.append({"type": "text", "text": part.text})
        else:
            media = part.part(attached)
            made.append({"type": "media", "digest": media.digest, "kind": media.kind})
    return made


class MessageBody(Strict):
    """A message to be stored, in OpenAI's form."""

    role: Literal["system", "developer", "user", "assistant", "tool"] = "user"
    content: Content | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None  # another name for reasoning
    name: str | None = None
    tool_calls: list[CallBody] | None = None
    tool_call_id: str | None = None

    def new(self, attached: Attached) -> NewMessage:
        """The message as the store keeps it, with what is ``attached``.

        Raises `InvalidRequestError`.
        """
        if self.role == "tool" and not self.tool_call_id:
            raise InvalidRequestError("a tool message needs a tool_call_id.", "messages")
        if self.content is None and not self.tool_calls:
            raise InvalidRequestError("a message needs content.", "messages")
        calls = [
            ToolCall(c.id, c.function.name, c.function.arguments) for c in self.tool_calls or ()
        ]
        return NewMessage(
            self.role,
            _stored(self.content, attached),
            reasoning=self.reasoning or self.reasoning_content,
            tool_calls=tuple(calls),
            tool_call_id=self.tool_call_id,
            name=self.name,
            media=attached.files,
        )


class TurnBody(Strict):
    """What every turn may say. ``settings`` go over the session's, for this turn."""

    model: str | None = None
    settings: TurnSettings | None = None
    stream: bool = False

    @abstractmethod
    def new(self, attached: Attached) -> list[NewMessage]:
        """The messages that are to be stored with it."""


class SendBody(TurnBody):
    """POST /v1/sessions/{session_id}/messages"""

    content: Content | None = None
    message: MessageBody | None = None
    messages: list[MessageBody] | None = None
    parent: str | None = None
    branch: bool = False
    reply: bool = True

    def new(self, attached: Attached) -> list[NewMessage]:
        """The messages to be stored. Raises `InvalidRequestError`."""
        given = [
            x for x in (self.content, self.message, self.messages) if x is not None and x != []
        ]
        if len(given) != 1:
            raise InvalidRequestError(
                "give exactly one of content, message and messages.", "content"
            )
        if self.message is not None:
            return [self.message.new(attached)]
        if self.messages is not None:
            return [message.new(attached) for message in self.messages]
        return [NewMessage("user", _stored(self.content, attached), media=attached.files)]

    @property
    def parent_id(self) -> str | Unset | None:
        """What it follows: None is nothing, UNSET the head."""
        return UNSET if self.parent is None else None if self.parent == ROOT else self.parent


class EditBody(TurnBody):
    """PATCH /v1/sessions/{session_id}/messages/{message_id}"""

    content: Content
    reply: bool = True

    def new(self, attached: Attached) -> list[NewMessage]:
        """The message in place of the old one, but for what that keeps."""
        return [NewMessage("user", _stored(self.content, attached), media=attached.files)]


class RegenerateBody(TurnBody):
    """POST /v1/sessions/{session_id}/messages/{message_id}/regenerate"""

    def new(self, attached: Attached) -> list[NewMessage]:
        return []


class SessionBody(Strict):
    """POST /v1/sessions"""

    title: Title = ""
    model: str = ""
    settings: TurnSettings | None = None
    pruning: Pruning = "drop"
    system: str | None = None
    messages: list[MessageBody] | None = None
    ttl_s: Seconds | None = None

    uses_model: ClassVar[bool] = False

    def new(self, attached: Attached) -> list[NewMessage]:
        system = [NewMessage("system", self.system)] if self.system else []
        return [*system, *(message.new(attached) for message in self.messages or ())]


class ChangeBody(Strict):
    """PATCH /v1/sessions/{session_id}"""

    title: Title | None = None
    model: str | None = None
    settings: TurnSettings | None = None
    pruning: Pruning | None = None
    head: str | None = None
    ttl_s: Seconds | None = None
    version: int | None = None

    uses_model: ClassVar[bool] = False


class ForkBody(Strict):
    """POST /v1/sessions/{session_id}/fork"""

    message: str | None = None


class ImportBody(BaseModel):
    """POST /v1/sessions/import: what an export gave, or OpenAI's ``messages``.

    An export as Markdown is sent as ``markdown``.
    """

    model_config = ConfigDict(extra="allow")
    max_counts: ClassVar[dict[str, int]] = {  # of as many messages as a session may hold
        "lists and objects": 400_000,
        "commas": 1_500_000,
        "fields": 1_500_000,
    }

    markdown: str | None = None
