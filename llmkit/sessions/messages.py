"""Messages from what people and files have: texts, OpenAI's dicts, other libraries' objects. Pure.

Files keep messages in the form of these dicts too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from llmkit.errors import InvalidRequestError
from llmkit.media.addresses import as_part, decoded
from llmkit.protocol import Media, Message, ToolCall
from llmkit.protocol.messages import Part

__all__ = ["NOTHING", "Messages", "as_messages", "from_json", "to_json", "with_media"]

Messages = str | Message | dict[str, Any] | Sequence[Message | dict[str, Any]]

NOTHING: Mapping[str, bytes] = {}
KEPT = ("role", "content", "name", "tool_call_id", "reasoning_content")
KNOWN = (*KEPT, "tool_calls")
# Keys of other libraries' messages: accepted, mostly ignored.
ALSO = ("refusal", "annotations", "audio", "function_call", "parsed", "reasoning", "thinking")


def as_messages(messages: Messages, files: dict[str, bytes] | None = None) -> tuple[Message, ...]:
    """Messages from a text, a message or a list of messages.

    A message is a `Message`, an OpenAI dict (its content may be a list of parts), or an object with
    ``model_dump``. Pictures and sounds in it are added to ``files``; without them, there may be
    none. Raises `InvalidRequestError`.

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
            message = _from_dict(message, files)
        if not isinstance(message, Message) or not isinstance(message.role, str):
            raise InvalidRequestError(
                "each message needs a role and a text: {'role': 'user', 'content': '…'}.",
                "messages",
            )
        converted.append(message)
    return tuple(converted)


def with_media(
    messages: Sequence[Message], files: dict[str, bytes], images: Any = (), sounds: Any = ()
) -> tuple[Message, ...]:
    """The messages with pictures and sounds before the text of the last one of the user.

    Their files are added to ``files``. Raises `InvalidRequestError`.
    """
    if _is_nothing(images) and _is_nothing(sounds):
        return tuple(messages)
    from llmkit.media.given import attached  # needs numpy

    parts = attached(files, images, sounds)
    place = next((i for i in reversed(range(len(messages))) if messages[i].role == "user"), None)
    if place is None:
        raise InvalidRequestError("there is no user message to attach the images to.", "images")
    said = messages[place]
    told = replace(said, content=(*parts, *said.parts))
    return (*messages[:place], told, *messages[place + 1 :])


def _is_nothing(given: Any) -> bool:
    return given is None or (isinstance(given, list | tuple) and not given)


def _from_dict(message: dict[str, Any], files: dict[str, bytes] | None) -> Message:
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
    kept = {k: v for k, v in fields_.items() if k in KNOWN}
    return from_json(kept | {"content": _content(content, files)})


def _content(content: Any, files: dict[str, bytes] | None) -> Any:
    """Content with its parts as ours. Raises `InvalidRequestError` for what is none."""
    if not isinstance(content, list | tuple):
        return content
    return tuple(_part(part, files) for part in content)


def _part(part: Any, files: dict[str, bytes] | None) -> Part:
    if isinstance(part, str | Media):
        return part
    if isinstance(part, dict):
        text = part.get("text", part.get("refusal"))
        if isinstance(text, str):
            return text
    if files is not None:
        from llmkit.media.given import attached  # needs numpy

        match part:
            case {"type": "image_url", "image_url": str(url) | {"url": str(url)}}:
                low = isinstance(part["image_url"], dict) and part["image_url"].get("detail")
                return attached(files, images=[_low(url) if low == "low" else url])[0]
            case {"type": "input_image", "image_url": str(url)}:
                return attached(files, images=[url])[0]
            case {"type": "image", "image": picture}:
                return attached(files, images=[picture])[0]
            case {"type": "input_audio", "input_audio": {"data": str(data)}}:
                return attached(files, sounds=[decoded(data)])[0]
            case dict():
                pass
            case _:
                return attached(files, images=[part])[0]
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    supported = "only text is" if files is None else "text, image_url and input_audio are"
    raise InvalidRequestError(
        f"messages: {supported} supported, not parts of type {kind!r:.40}.", "messages"
    )


def _low(url: str) -> bytes:
    """A picture that is to be looked at in low detail."""
    from llmkit.media.given import picture_file
    from llmkit.media.pictures import LOW_SIDE, reduced

    return reduced(picture_file(url), LOW_SIDE)


def to_json(message: Message, files: Mapping[str, bytes] = NOTHING) -> dict[str, Any]:
    """A message for a file, with the arguments of its calls as the model wrote them, and its
    pictures and sounds in it."""
    data: dict[str, Any] = {k: v for k in KEPT if (v := getattr(message, k)) is not None}
    if message.media:
        data["content"] = [
            {"type": "text", "text": part}
            if isinstance(part, str)
            else as_part(part.kind, files.get(part.digest))
            for part in message.parts
        ]
    if message.tool_calls:
        data["tool_calls"] = [call.as_json() for call in message.tool_calls]
    return data


def from_json(data: dict[str, Any], files: dict[str, bytes] | None = None) -> Message:
    """The message that `to_json` wrote; its pictures and sounds are added to ``files``.

    Raises `InvalidRequestError` for wrong values, and TypeError or ValueError for other keys.
    """
    fields_ = dict(data)
    if files is not None:
        fields_["content"] = _content(fields_.get("content"), files)
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
