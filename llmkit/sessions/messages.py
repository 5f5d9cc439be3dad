"""Messages from what people and files have: texts, OpenAI's dicts, other libraries' objects. Pure.

Files keep messages in the form of these dicts too.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from llmkit.errors import InvalidRequestError
from llmkit.protocol import Message, ToolCall

__all__ = ["Messages", "as_messages", "from_json", "to_json"]

Messages = str | Message | dict[str, Any] | Sequence[Message | dict[str, Any]]

KEPT = ("role", "content", "name", "tool_call_id", "reasoning_content")
KNOWN = (*KEPT, "tool_calls")
# Keys of other libraries' messages: accepted, mostly ignored.
ALSO = ("refusal", "annotations", "audio", "function_call", "parsed", "reasoning", "thinking")


def as_messages(messages: Messages) -> tuple[Message, ...]:
    """Messages from a text, a message or a list of messages.

    A message is a `Message`, an OpenAI dict (its content may be a list of parts), or an object with
    ``model_dump``. Raises `InvalidRequestError`.

    >>> as_messages({"role": "user", "content": [{"type": "text", "text": "hi"}]})[0].content
    'hi'
    """
    if isinstance(messages, str):
        return (Message("user", messages),)
    if isinstance(messages, Message | dict) or hasattr(messages, "model_dump"):
        messages = [messages]  # type: ignore[list-item]
    converted = []
    for message in messages:
        if hasattr(message, "model_dump"):
            message = message.model_dump()
        if isinstance(message, dict):
            message = _from_dict(message)
        if not isinstance(message, Message) or not isinstance(message.role, str):
            raise InvalidRequestError(
                "each message needs a role and a text: {'role': 'user', 'content': '…'}.",
                "messages",
            )
        converted.append(message)
    return tuple(converted)


def _from_dict(message: dict[str, Any]) -> Message:
    fields_ = {k: v for k, v in message.items() if v is not None}
    unknown = next((k for k in fields_ if k not in KNOWN and k not in ALSO), None)
    if (
        unknown is not None
        or "role" not in fields_
        or ("content" not in fields_ and fields_["role"] != "assistant")
    ):
        raise InvalidRequestError(
            "a message needs the keys role and content (and may have name)."
            + (f" {unknown!r} is not one of the keys." if unknown is not None else ""),
            "messages",
        )
    fields_.setdefault("reasoning_content", fields_.get("reasoning") or fields_.get("thinking"))
    content = fields_.get("content", fields_.get("refusal") or "")
    return from_json({k: v for k, v in fields_.items() if k in KNOWN} | {"content": _text(content)})


def _text(content: Any) -> Any:
    """Content in parts, joined. Raises `InvalidRequestError` for a part that is not text."""
    if not isinstance(content, list | tuple):
        return content
    texts = []
    for part in content:
        text = (
            part
            if isinstance(part, str)
            else part.get("text", part.get("refusal"))
            if isinstance(part, dict)
            else None
        )
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise InvalidRequestError(
                f"messages: only text is supported, not parts of type {kind!r:.40}.", "messages"
            )
        texts.append(text)
    return "".join(texts)


def to_json(message: Message) -> dict[str, Any]:
    """A message for a file, with the arguments of its calls as the model wrote them."""
    data: dict[str, Any] = {k: v for k in KEPT if (v := getattr(message, k)) is not None}
    if message.tool_calls:
        data["tool_calls"] = [call.as_json() for call in message.tool_calls]
    return data


def from_json(data: dict[str, Any]) -> Message:
    """The message that `to_json` wrote.

    Raises `InvalidRequestError` for wrong values, and TypeError or ValueError for other keys.
    """
    fields_ = dict(data)
    calls = fields_.get("tool_calls")
    if isinstance(calls, list | tuple):
        fields_["tool_calls"] = tuple(_call(c) if isinstance(c, dict) else c for c in calls)
    return Message(**fields_)


def _call(call: dict[str, Any]) -> ToolCall:
    """A call of OpenAI's form.

    What a model wrote is not judged: an old call that was cut off must not spoil what follows.
    """
    function = call.get("function")
    if not isinstance(function, dict):
        raise InvalidRequestError(
            "messages: tool_calls must hold an id and a function with name and arguments.",
            "messages",
        )
    arguments = function.get("arguments") or "{}"
    return ToolCall(
        str(call.get("id") or ""),
        str(function.get("name") or ""),
        arguments if isinstance(arguments, str) else json.dumps(arguments),
    )
