"""Conversations as data: what the store gives and takes, and how much of it. Pure."""

from __future__ import annotations

import json
import math
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from llmkit.errors import InvalidRequestError
from llmkit.media.addresses import as_part
from llmkit.protocol import MAX_DEPTH, Completion, Media, Message, ToolCall, depth_of

__all__ = [
    "MAX_CHARS",
    "MAX_MESSAGES",
    "MAX_MESSAGE_CHARS",
    "MAX_OWNER_CHARS",
    "MAX_TITLE",
    "PRUNINGS",
    "ROLES",
    "UNDER_WAY",
    "UNSET",
    "NewMessage",
    "Pruning",
    "Status",
    "StoredConversation",
    "StoredMessage",
    "Unset",
    "checked_fields",
    "checked_json",
    "digests_of",
    "is_session_id",
    "new_id",
    "said_in",
    "storable",
    "usage_of",
]

Status = Literal["complete", "partial", "running"]
Pruning = Literal["drop", "summarise", "stop"]
Content = str | list[dict[str, Any]]
ROLES = ("system", "developer", "user", "assistant", "tool")
PRUNINGS: tuple[Pruning, ...] = ("drop", "summarise", "stop")
MAX_MESSAGE_CHARS = 4 << 20
MAX_CHARS, MAX_MESSAGES = 64 << 20, 100_000  # of one conversation
MAX_OWNER_CHARS = 256 << 20  # of all of an owner's
MAX_SETTINGS, MAX_TITLE, MAX_MODEL = 1 << 20, 1000, 1000
MAX_TTL_S = 100 * 365 * 86_400.0
SESSION_ID = re.compile(r"sess_[0-9a-f]{24}")
KINDS = {"image_url": "image", "input_audio": "audio"}
UNSTORABLE = re.compile("[\0\ud800-\udfff]")  # what a database's UTF-8 cannot hold


# What a `ConflictError` begins with, before it says what to do.
UNDER_WAY = "Another answer is being written at this point of the session."


class Unset:
    """The default of what may also be None."""

    def __repr__(self) -> str:
        return "UNSET"


UNSET = Unset()


def new_id(prefix: str) -> str:
    """A new id: the prefix, an underscore and 24 random hexadecimal digits."""
    return f"{prefix}_{secrets.token_hex(12)}"


def is_session_id(text: str) -> bool:
    """Whether it is a conversation's id; any other name is a title.

    >>> is_session_id(new_id("sess")), is_session_id("sess_garden")
    (True, False)
    """
    return SESSION_ID.fullmatch(text) is not None


@dataclass(frozen=True, slots=True)
class NewMessage:
    """A message to be stored.

    ``content`` is text, or a list of OpenAI's parts; ``media`` has files that it holds, by digest,
    and perhaps others. Raises `InvalidRequestError` for a wrong role
    or type, and for more than `MAX_MESSAGE_CHARS`.
    """

    role: str
    content: Content = ""
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    name: str | None = None
    status: Status = "complete"
    finish_reason: str | None = None
    model: str = ""
    usage: dict[str, Any] | None = None
    created_at: float | None = None  # None: now
    media: Mapping[str, bytes] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def of(cls, message: Message, **more: Any) -> NewMessage:
        """A message of a chat; ``more`` are other fields, such as ``model`` and ``media``."""
        return cls(
            message.role,
            _content_of(message),
            message.reasoning_content,
            message.tool_calls,
            message.tool_call_id,
            message.name,
            **more,
        )

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise InvalidRequestError(
                f"a message's role must be one of {', '.join(ROLES)}, not {self.role!r:.40}.",
                "messages",
            )
        for name in ("reasoning", "tool_call_id", "name", "finish_reason"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise InvalidRequestError(f"a message's {name} must be a string.", "messages")
        if not isinstance(self.tool_calls, tuple) or not all(
            isinstance(c, ToolCall) for c in self.tool_calls
        ):
            raise InvalidRequestError("tool_calls must be a list of calls.", "messages")
        if not isinstance(self.content, str):
            _check_parts(self.content)
        # An answer may repeat what was asked.
        limit = MAX_MESSAGE_CHARS * (2 if self.role == "assistant" else 1)
        if self.size > limit:
            raise InvalidRequestError(
                f"a message of {self.size:,} characters is too long for a session; the limit is "
                f"{limit:,}.",
                "messages",
            )

    @property
    def digests(self) -> list[str]:
        """What pictures and sounds its content holds."""
        return digests_of(self.content)

    @property
    def size(self) -> int:
        """Characters of all of it."""
        content = self.content if isinstance(self.content, str) else json.dumps(self.content)
        calls = sum(len(c.call_id) + len(c.name) + len(c.arguments) for c in self.tool_calls)
        names = len(self.name or "") + len(self.tool_call_id or "")
        return len(content) + len(self.reasoning or "") + calls + names


@dataclass(frozen=True, slots=True)
class StoredMessage:
    """A message of a stored conversation. ``number`` counts up in the order of being stored.

    An answer is ``running`` while it is written, and ``partial`` if it was cut off. ``created_at``
    is in seconds since the epoch.
    """

    id: str
    conversation_id: str
    parent_id: str | None
    number: int
    role: str
    content: Content
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    name: str | None = None
    status: Status = "complete"
    finish_reason: str | None = None
    model: str = ""
    usage: dict[str, Any] | None = None
    created_at: float = 0.0

    @property
    def message(self) -> Message:
        """As a chat message, with words in place of parts that no model can be told."""
        return Message(
            self.role,
            self.content if isinstance(self.content, str) else _parts(self.content),
            self.name,
            self.tool_calls,
            self.tool_call_id,
            self.reasoning,
        )

    @property
    def text(self) -> str:
        """The text of its content."""
        if isinstance(self.content, str):
            return self.content
        return "".join(said_in(part) or "" for part in self.content)

    @property
    def digests(self) -> list[str]:
        """What pictures and sounds its content holds."""
        return digests_of(self.content)

    @property
    def size(self) -> int:
        """Characters of its texts, about what it costs to keep."""
        calls = sum(len(c.call_id) + len(c.name) + len(c.arguments) for c in self.tool_calls)
        names = len(self.name or "") + len(self.tool_call_id or "")
        return len(self.text) + len(self.reasoning or "") + calls + names


@dataclass(frozen=True, slots=True)
class StoredConversation:
    """A conversation without its messages; they are a tree, and ``head`` is the leaf shown.

    ``version`` counts its changes. ``ttl_s``: it is deleted so long after its last use; None never.
    Times are in seconds since the epoch. ``num_messages`` counts those of all branches.
    """

    id: str
    owner: str
    title: str
    model: str
    settings: dict[str, Any]
    pruning: Pruning
    head: str | None
    version: int
    created_at: float
    updated_at: float
    used_at: float
    ttl_s: float | None
    expires_at: float | None
    num_messages: int


def digests_of(content: Content) -> list[str]:
    """What pictures and sounds a content holds."""
    if isinstance(content, str):
        return []
    found = (part.get("digest") for part in content if part.get("type") == "media")
    return [digest for digest in found if isinstance(digest, str)]


def usage_of(done: Completion) -> dict[str, Any]:
    """What is stored of an answer's cost: counts of tokens, and their speed."""
    usage, speed = done.usage, done.decode_tok_s
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "cached_tokens": usage.cached_tokens,
        "reasoning_tokens": usage.reasoning_tokens,
        "tokens_per_s": None if math.isnan(speed) else round(speed, 2),
    }


def storable(text: str) -> str:
    """A text without what no database holds: NUL and halves of surrogate pairs become U+FFFD."""
    return UNSTORABLE.sub("\ufffd", text)


def checked_json(value: Any, param: str, limit: int = MAX_SETTINGS) -> Any:
    """A value that JSON can hold, not too large or deep. Raises `InvalidRequestError`."""
    try:
        text = json.dumps(value, allow_nan=False)
        deep = depth_of(value) > MAX_DEPTH
    except (TypeError, ValueError, RecursionError):
        raise InvalidRequestError(f"{param} must be JSON.", param) from None
    if len(text) > limit or deep:
        raise InvalidRequestError(
            f"{param} is too large: {limit:,} characters and {MAX_DEPTH} levels are the limit.",
            param,
        )
    return value


def checked_fields(fields: dict[str, Any]) -> dict[str, Any]:
    """The columns of fields. Raises `InvalidRequestError` naming the field."""
    values = dict(fields)
    for name, most in (("title", MAX_TITLE), ("model", MAX_MODEL)):
        if name in values:
            values[name] = storable(_text(values[name], name))
            if len(values[name]) > most:
                raise InvalidRequestError(f"{name} may have {most:,} characters at most.", name)
    if "title" in values:
        values["title"] = " ".join(values["title"].split())
    if "settings" in values:
        _check_settings(values["settings"])
    if "pruning" in values and values["pruning"] not in PRUNINGS:
        raise InvalidRequestError(f"pruning must be one of {', '.join(PRUNINGS)}.", "pruning")
    ttl_s = values.get("ttl_s")
    if ttl_s is not None and not (
        isinstance(ttl_s, int | float)
        and not isinstance(ttl_s, bool)
        and math.isfinite(ttl_s)
        and 0 < ttl_s <= MAX_TTL_S
    ):
        raise InvalidRequestError("ttl_s must be a number of seconds above 0, or null.", "ttl_s")
    return values


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise InvalidRequestError(f"{name} must be a string.", name)
    return value


def _check_settings(settings: Mapping[str, Any]) -> None:
    """Raises `InvalidRequestError` unless it is an object of JSON."""
    if not isinstance(settings, dict) or not all(isinstance(k, str) for k in settings):
        raise InvalidRequestError("settings must be an object.", "settings")
    checked_json(settings, "settings")


def _content_of(message: Message) -> Content:
    if isinstance(message.content, str):
        return message.content
    return [
        {"type": "text", "text": part}
        if isinstance(part, str)
        else {"type": "media", "digest": part.digest, "kind": part.kind}
        for part in message.content
    ]


def _check_parts(content: Any) -> None:
    if not isinstance(content, list) or not all(
        isinstance(part, dict) and isinstance(part.get("type"), str) for part in content
    ):
        raise InvalidRequestError(
            "a message's content must be a string, or a list of parts with a type.", "messages"
        )
    checked_json(content, "messages", MAX_MESSAGE_CHARS)


def said_in(part: Mapping[str, Any]) -> str | None:
    """The text of a part; None of one that has none.

    >>> said_in({"type": "refusal", "refusal": "No."})
    'No.'
    """
    text = part.get("refusal" if part["type"] == "refusal" else "text")
    return text if isinstance(text, str) else None


def _parts(content: list[dict[str, Any]]) -> tuple[str | Media, ...]:
    parts: list[str | Media] = []
    for part in content:
        if part["type"] == "media":
            kind = part.get("kind")
            parts.append(Media(str(part.get("digest")), "audio" if kind == "audio" else "image"))
        elif (text := said_in(part)) is not None:
            parts.append(text)
        elif part["type"] in KINDS:  # an address, which nobody fetches
            parts.append(as_part(KINDS[part["type"]], None)["text"])
        else:
            parts.append(f"(a part of type {part['type']:.40})")
    return tuple(parts)
