"""Messages and tools as chat templates read them: the dicts that Hugging Face defined. Pure."""

from __future__ import annotations

from typing import Any

from llmkit.protocol import Message, Part, Tool

__all__ = ["message_dict", "tool_dict"]


def message_dict(message: Message) -> dict[str, Any]:
    """A message; arguments of calls are objects.

    >>> message_dict(Message("user", "hi"))
    {'role': 'user', 'content': 'hi'}
    """
    content = message.content
    entry: dict[str, Any] = {
        "role": message.role,
        "content": content if isinstance(content, str) else [_part(p) for p in content],
    }
    entry.update(
        (key, value)
        for key in ("name", "tool_call_id", "reasoning_content")
        if (value := getattr(message, key))
    )
    if message.tool_calls:
        entry["tool_calls"] = [
            {
                "id": c.call_id,
                "type": "function",
                "function": {"name": c.name, "arguments": c.as_object()},
            }
            for c in message.tool_calls
        ]
    return entry


def _part(part: Part) -> dict[str, Any]:
    return {"type": "text", "text": part} if isinstance(part, str) else {"type": part.kind}


def tool_dict(tool: Tool) -> dict[str, Any]:
    """A tool.

    >>> tool_dict(Tool("now", parameters={"type": "object"}))
    {'type': 'function', 'function': {'name': 'now', 'parameters': {'type': 'object'}}}
    """
    described = {"description": tool.description} if tool.description else {}
    return {
        "type": "function",
        "function": {"name": tool.name, **described, "parameters": tool.parameters},
    }
