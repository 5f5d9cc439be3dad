"""Conversations as JSON: exported, and read from files that may be anybody's. Pure."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from llmkit.errors import InvalidRequestError
from llmkit.protocol import ToolCall
from llmkit.store.conversation_records import (
    MAX_MESSAGES,
    NewMessage,
    StoredConversation,
    StoredMessage,
    checked_json,
)
from llmkit.store.media_parts import with_digests, with_files

__all__ = [
    "FORMAT",
    "ImportedConversation",
    "as_copy",
    "exported",
    "exported_message",
    "read",
    "thread",
]

FORMAT, VERSION = "llmkit-conversation", 1
SAVED_SESSION = "llmkit-session"  # what `Session.save` writes
Entry = tuple[str, str | None, NewMessage]  # key, key of the parent
NOTHING: Mapping[str, bytes] = {}


@dataclass(frozen=True, slots=True)
class ImportedConversation:
    """What a file holds: parents come before their children."""

    fields: dict[str, Any] = field(default_factory=dict)
    messages: list[Entry] = field(default_factory=list)
    head: str | None = None


def exported(
    conversation: StoredConversation,
    messages: list[StoredMessage],
    files: Mapping[str, bytes] = NOTHING,
) -> dict[str, Any]:
    """Implements `ConversationStore.export`; ``files`` are those of the messages, by digest."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "title": conversation.title,
        "model": conversation.model,
        "settings": conversation.settings,
        "pruning": conversation.pruning,
        "created_at": conversation.created_at,
        "updated_at": conversation.updated_at,
        "head": conversation.head,
        "messages": [exported_message(message, files) for message in messages],
    }


def exported_message(
    message: StoredMessage, files: Mapping[str, bytes] = NOTHING
) -> dict[str, Any]:
    """A message of an export, with its ``files`` in it."""
    data: dict[str, Any] = {
        "id": message.id,
        "parent": message.parent_id,
        "role": message.role,
        "content": with_files(message.content, files),
        "status": "partial" if message.status == "running" else message.status,
        "created_at": message.created_at,
    }
    for name in ("reasoning", "tool_call_id", "name", "finish_reason", "usage"):
        if (value := getattr(message, name)) is not None:
            data[name] = value
    if message.model:
        data["model"] = message.model
    if message.tool_calls:
        data["tool_calls"] = [call.as_json() for call in message.tool_calls]
    return data


def as_copy(message: StoredMessage) -> NewMessage:
    """A stored message, to be stored again."""
    return NewMessage(
        message.role,
        message.content,
        message.reasoning,
        message.tool_calls,
        message.tool_call_id,
        message.name,
        "partial" if message.status == "running" else message.status,
        message.finish_reason,
        message.model,
        message.usage,
        message.created_at,
    )


def read(data: Any) -> ImportedConversation:
    """The conversation of a file: ours, a saved `llm.session`, or a list of OpenAI's messages.

    Raises `InvalidRequestError`, naming the message, for wrong types, ids that come twice, unknown
    parents, cycles, and too much.
    """
    if isinstance(data, list):
        data = {"messages": data}
    if not isinstance(data, dict) or not isinstance(data.get("messages"), list):
        raise _wrong("it must be an object with a list of messages")
    kind = data.get("format", FORMAT)
    if kind not in (FORMAT, SAVED_SESSION) or data.get("version", VERSION) != VERSION:
        raise _wrong("its format or version is not known here")
    if len(data["messages"]) > MAX_MESSAGES:
        raise _wrong(f"it has more than {MAX_MESSAGES:,} messages")
    settings = data.get("sampling" if kind == SAVED_SESSION else "settings") or {}
    fields = {
        "title": data.get("title") or "",
        "model": data.get("model") or "",
        "settings": settings,
        "pruning": data.get("pruning") or "drop",
    }
    is_tree = any(isinstance(m, dict) and "parent" in m for m in data["messages"])
    entries = [_entry(i, m, is_tree) for i, m in enumerate(data["messages"])]
    ordered = _ordered(entries)
    head = data.get("head")
    if head is not None and not (isinstance(head, str) and any(e[0] == head for e in entries)):
        raise _wrong("its head is none of its messages")
    if head is None and ordered and "head" not in data:
        head = ordered[-1][0]
    return ImportedConversation(fields, ordered, head)


def _entry(number: int, message: Any, is_tree: bool) -> Entry:
    if not isinstance(message, dict):
        raise _wrong(f"message {number} must be an object")
    parent = message.get("parent") if is_tree else (str(number - 1) if number else None)
    key = message.get("id") if is_tree else str(number)
    if not isinstance(key, str) or not key or len(key) > 256:
        raise _wrong(f"message {number} needs a string as its id")
    if parent is not None and not isinstance(parent, str):
        raise _wrong(f"the parent of message {number} must be an id or null")
    try:
        return key, parent, _message(message)
    except InvalidRequestError as error:
        raise _wrong(f"message {number}: {str(error).removesuffix('.')}") from None


def _message(data: Mapping[str, Any]) -> NewMessage:
    role, content, status = data.get("role"), data.get("content"), data.get("status")
    if not isinstance(role, str):
        raise InvalidRequestError("its role must be a string.", "messages")
    if status not in (None, "complete", "partial", "running"):
        raise InvalidRequestError("its status is complete or partial.", "messages")
    usage, created_at = data.get("usage"), data.get("created_at")
    if usage is not None and not isinstance(usage, dict):
        raise InvalidRequestError("its usage must be an object.", "messages")
    is_time = isinstance(created_at, int | float) and not isinstance(created_at, bool)
    if created_at is not None and not (is_time and abs(created_at) < 1e12):
        raise InvalidRequestError("its created_at must be in seconds.", "messages")
    model = data.get("model") or ""
    if not isinstance(model, str) or len(model) > 1000:
        raise InvalidRequestError("its model must be a short text.", "messages")
    reason = data.get("finish_reason")
    if isinstance(reason, str) and len(reason) > 64:
        raise InvalidRequestError("its finish_reason must be a short text.", "messages")
    files: dict[str, bytes] = {}
    return NewMessage(
        role,
        "" if content is None else with_digests(content, files),
        data.get("reasoning", data.get("reasoning_content")),
        _calls(data.get("tool_calls")),
        data.get("tool_call_id"),
        data.get("name"),
        "partial" if status in ("partial", "running") else "complete",
        reason,
        model,
        None if usage is None else checked_json(usage, "usage", 10_000),
        None if created_at is None or not math.isfinite(created_at) else float(created_at),
        files,
    )


def _calls(calls: Any) -> tuple[ToolCall, ...]:
    if calls is None:
        return ()
    read = []
    for call in calls if isinstance(calls, list) else [None]:
        call = call if isinstance(call, dict) else {}
        function = call.get("function")
        function = function if isinstance(function, dict) else {}
        name, arguments = function.get("name"), function.get("arguments", "")
        if isinstance(arguments, dict):
            arguments = json.dumps(arguments)
        if not isinstance(name, str) or not isinstance(arguments, str):
            raise InvalidRequestError(
                "its tool_calls must be a list of calls with a function's name and arguments.",
                "messages",
            )
        read.append(ToolCall(str(call.get("id") or ""), name, arguments))
    return tuple(read)


def _ordered(entries: list[Entry]) -> list[Entry]:
    """Parents before children, else in the order of the file."""
    known = {key: parent for key, parent, _ in entries}
    if len(known) != len(entries):
        raise _wrong("two messages have the same id")
    stranger = next((p for _, p, _ in entries if p is not None and p not in known), None)
    if stranger is not None:
        raise _wrong(f"there is no message {stranger!r:.60}, which another names as its parent")
    done: set[str] = set()
    ordered: list[Entry] = []
    by_key = {entry[0]: entry for entry in entries}
    for entry in entries:
        waiting: list[Entry] = []  # it and its ancestors that are not yet placed
        on_way: set[str] = set()
        key: str | None = entry[0]
        while key is not None and key not in done:
            if key in on_way:
                raise _wrong(f"the message {key!r:.60} is its own ancestor")
            on_way.add(key)
            waiting.append(by_key[key])
            key = known[key]
        ordered += reversed(waiting)
        done |= on_way
    return ordered


def thread(data: ImportedConversation) -> list[NewMessage]:
    """The messages from the root to the head."""
    by_key = {key: (parent, message) for key, parent, message in data.messages}
    path: list[NewMessage] = []
    key = data.head
    while key is not None:
        parent, message = by_key[key]
        path.append(message)
        key = parent
    return path[::-1]


def _wrong(what: str) -> InvalidRequestError:
    return InvalidRequestError(f"the conversation cannot be imported: {what}.", "messages")
