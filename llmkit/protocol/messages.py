"""Chat messages, and the tools a model may call. Standard library only."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any, Literal

from llmkit.protocol.sampling import check

__all__ = ["INSTRUCTIONS", "MAX_DEPTH", "Media", "Message", "Part", "Tool", "ToolCall", "depth_of"]

MAX_DEPTH = 100  # deepest JSON nesting accepted
INSTRUCTIONS = ("system", "developer")  # roles of what is no part of a conversation's turns


@dataclass(frozen=True, slots=True)
class Tool:
    """A function a model may call; ``parameters`` is the JSON schema of its arguments."""

    name: str
    description: str = ""
    parameters: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check(
            isinstance(self.name, str)
            and re.fullmatch(r"[A-Za-z0-9_.-]{1,128}", self.name) is not None,
            "tools",
            f"need names of 1 to 128 characters a-z, A-Z, 0-9, _, . and -, not {self.name!r:.80}.",
        )
        check(isinstance(self.parameters, dict), "tools", "must give parameters as a JSON schema.")
        for place in ("$defs", "definitions"):
            check(
                isinstance(self.parameters.get(place, {}), dict),
                "tools",
                f"{self.name}: {place} must be an object.",
            )


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A tool call by a model; ``arguments`` is a JSON object as text, if the model wrote one."""

    call_id: str
    name: str
    arguments: str

    def as_json(self) -> dict[str, Any]:
        """The call as an object of OpenAI's chat."""
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": self.call_id, "type": "function", "function": function}

    def as_object(self) -> dict[str, Any]:
        """The arguments as an object; text that is not a JSON object is wrapped in one.

        >>> ToolCall("1", "ls", '{"path": "/"}').as_object()
        {'path': '/'}
        >>> ToolCall("1", "ls", '{"pa').as_object()
        {'arguments': '{"pa'}
        """
        try:
            value = json.loads(self.arguments or "{}")
            shallow = (
                self.arguments.count("[") + self.arguments.count("{") <= MAX_DEPTH
                or depth_of(value) <= MAX_DEPTH
            )
        except (ValueError, RecursionError):
            value, shallow = None, False
        return value if isinstance(value, dict) and shallow else {"arguments": self.arguments}


@dataclass(frozen=True, slots=True)
class Media:
    """An image or sound in a message, known by its content: ``digest`` is its SHA-256 in hex."""

    digest: str
    kind: Literal["image", "audio"]


Part = str | Media


@dataclass(frozen=True, slots=True)
class Message:
    """One chat message.

    ``role`` is system, developer, user, assistant or tool. ``content`` is text, or a tuple of
    parts if it holds more than text. An assistant message may hold ``tool_calls``; a tool message
    names by ``tool_call_id`` the call it answers.

    >>> Message("user", ("What is ", "this?")).content
    'What is this?'
    >>> Message("user", ("What is this?", Media("5d41", "image"))).text
    'What is this?'
    """

    role: str
    content: str | tuple[Part, ...] = ""
    name: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    reasoning_content: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.content, str):
            right = self.content is None or isinstance(self.content, list | tuple)
            check(right, "messages", "must have text or parts as content.")
            parts = tuple(self.content or ())
            check(
                all(isinstance(p, str | Media) for p in parts),
                "messages",
                "must have text or parts as content.",
            )
            plain = "".join(p for p in parts if isinstance(p, str))
            object.__setattr__(
                self, "content", parts if any(isinstance(p, Media) for p in parts) else plain
            )
        calls = () if self.tool_calls is None else self.tool_calls
        right = isinstance(calls, list | tuple) and all(isinstance(c, ToolCall) for c in calls)
        check(
            right,
            "messages",
            "must have ToolCall objects as tool_calls; only in a dict may they be dicts too.",
        )
        object.__setattr__(self, "tool_calls", tuple(calls))

    @property
    def text(self) -> str:
        """The text of the content, without images and sounds."""
        return (
            self.content
            if isinstance(self.content, str)
            else "".join(p for p in self.content if isinstance(p, str))
        )

    @property
    def parts(self) -> tuple[Part, ...]:
        """The content as parts; none if it is empty."""
        return (
            ((self.content,) if self.content else ())
            if isinstance(self.content, str)
            else self.content
        )

    @property
    def media(self) -> tuple[Media, ...]:
        """Images and sounds, in order."""
        return tuple(p for p in self.parts if isinstance(p, Media))


def depth_of(value: Any) -> int:
    """How deeply lists and objects are nested, computed without recursion."""
    deepest, level = 0, [value]
    while level:
        deepest += 1
        level = [
            v
            for x in level
            if isinstance(x, list | dict)
            for v in (x.values() if isinstance(x, dict) else x)
            if isinstance(v, list | dict)
        ]
    return deepest
