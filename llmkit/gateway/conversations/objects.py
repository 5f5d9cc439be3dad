"""Sessions and messages as JSON objects. Pure."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from llmkit.store.conversation_records import StoredConversation, StoredMessage

__all__ = ["Object", "encoded", "message_object", "session_object"]

Object = dict[str, Any]


def session_object(session: StoredConversation, running: Sequence[str] = ()) -> Object:
    """``running`` are the ids of its turns under way."""
    return {
        "id": session.id,
        "object": "session",
        "title": session.title,
        "model": session.model,
        "settings": session.settings,
        "pruning": session.pruning,
        "head": session.head,
        "version": session.version,
        "created_at": int(session.created_at),
        "updated_at": int(session.updated_at),
        "num_messages": session.num_messages,
        "expires_at": None if session.expires_at is None else int(session.expires_at),
        "running": list(running),
    }


def message_object(message: StoredMessage) -> Object:
    calls = [call.as_json() for call in message.tool_calls]
    return {
        "id": message.id,
        "object": "session.message",
        "session": message.conversation_id,
        "parent": message.parent_id,
        "role": message.role,
        "content": message.content,
        "reasoning": message.reasoning,
        "tool_calls": calls,
        "tool_call_id": message.tool_call_id,
        "name": message.name,
        "status": message.status,
        "finish_reason": message.finish_reason,
        "model": message.model,
        "usage": message.usage,
        "created_at": int(message.created_at),
    }


def encoded(value: Any) -> bytes:
    """It as JSON. Takes as long as it is: a large one is not for the event loop."""
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "replace")
