"""Conversations as Markdown, for people and back. Pure.

A message is a heading with a mark that no reader shows, and its text. A line of a text that looks
like such a heading gets a backslash in front, which Markdown does not show either.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from llmkit.errors import InvalidRequestError
from llmkit.store.conversation_formats import FORMAT
from llmkit.store.conversation_records import ROLES, StoredConversation, StoredMessage

__all__ = ["about_markdown", "from_markdown", "message_markdown", "to_markdown"]

MARK = re.compile(r"#{1,3} .*<!-- llmkit (\{.*\}) -->\s*")
HEADING = re.compile(r"#{1,3} .*<!-- llmkit ")
ESCAPED = re.compile(r"\\+(?=#{1,3} .*<!-- llmkit )")
PLAIN = re.compile(r"#{1,3} +(\w+):?\s*")  # headings of people
KEPT = ("tool_call_id", "name", "finish_reason")
FENCE = "```"


def to_markdown(conversation: StoredConversation, path: Sequence[StoredMessage]) -> str:
    """A title, then the messages of a path. Raises `InvalidRequestError` for parts but text.

    `from_markdown` reads it back: messages with reasoning and calls, title, model and settings.
    """
    return "\n".join([about_markdown(conversation), *(message_markdown(m) for m in path)])


def about_markdown(conversation: StoredConversation) -> str:
    """The title, with what is known of a conversation beside its messages."""
    about = {
        "format": FORMAT,
        "model": conversation.model,
        "settings": conversation.settings,
        "pruning": conversation.pruning,
        "title": conversation.title,
    }
    return _heading(1, _one_line(conversation.title) or "Conversation", about) + "\n"


def message_markdown(message: StoredMessage) -> str:
    """One message. Raises `InvalidRequestError` for parts but text."""
    mark: dict[str, Any] = {"role": message.role}
    mark |= {k: v for k in KEPT if (v := getattr(message, k)) is not None}
    if message.status != "complete":
        mark["status"] = "partial"
    blocks = [_heading(2, message.role.capitalize(), mark), ""]
    if message.reasoning is not None:
        blocks += [_heading(3, "Reasoning", {"part": "reasoning"}), ""]
        blocks += [_escaped(message.reasoning), ""]
        blocks += [_heading(3, "Answer", {"part": "content"}), ""]
    blocks += [_escaped(message.text), ""]
    for call in message.tool_calls:
        part = {"part": "call", "id": call.call_id, "name": call.name}
        blocks += [_heading(3, f"Call of {_one_line(call.name)}", part), ""]
        blocks += [f"{FENCE}json", _escaped(call.arguments), FENCE, ""]
    return "\n".join(blocks)


def from_markdown(text: str) -> dict[str, Any]:
    """The conversation of a Markdown file, for `ConversationStore.import_`.

    Without our marks the headings ``# System``, ``## User`` and ``## Assistant`` part messages.
    Raises `InvalidRequestError` for a text without either.
    """
    lines = text.replace("\r\n", "\n").split("\n")
    data: dict[str, Any] = {"format": FORMAT, "version": 1, "messages": []}
    if any(MARK.fullmatch(line) for line in lines):
        _read_marked(lines, data)
    else:
        _read_plain(lines, data)
    if not data["messages"]:
        raise InvalidRequestError(
            "the conversation cannot be imported: it has no headings such as ## User and "
            "## Assistant.",
            "messages",
        )
    return data


def _read_marked(lines: list[str], data: dict[str, Any]) -> None:
    part: dict[str, Any] = {}
    said: list[str] = []

    def take() -> None:
        body = "\n".join(said).removeprefix("\n").removesuffix("\n")
        if "role" in part:
            data["messages"].append({**part, "content": body})
        elif not data["messages"]:
            return
        elif part.get("part") == "reasoning":
            data["messages"][-1]["reasoning"] = body
        elif part.get("part") == "content":
            data["messages"][-1]["content"] = body
        elif part.get("part") == "call":
            arguments = body.strip("\n").removeprefix(f"{FENCE}json\n").removesuffix(FENCE)
            function = {"name": part.get("name"), "arguments": arguments.removesuffix("\n")}
            calls = data["messages"][-1].setdefault("tool_calls", [])
            calls.append({"id": part.get("id"), "type": "function", "function": function})

    for line in lines:
        match = MARK.fullmatch(line)
        mark = _mark(match[1]) if match else None
        if mark is None:
            said.append(
                ESCAPED.sub(lambda m: m[0][1:], line, count=1) if line[:1] == "\\" else line
            )
            continue
        take()
        part, said = mark, []
        if "format" in mark:
            data.update({k: mark.get(k) for k in ("title", "model", "settings", "pruning")})
    take()


def _mark(text: str) -> dict[str, Any] | None:
    try:
        mark = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return mark if isinstance(mark, dict) else None


def _read_plain(lines: list[str], data: dict[str, Any]) -> None:
    said: list[str] = []
    for line in lines:
        match = PLAIN.fullmatch(line)
        role = match[1].lower() if match else ""
        if role in ROLES:
            said = []
            data["messages"].append({"role": role, "content": said})
        else:
            said.append(line)
    for message in data["messages"]:
        message["content"] = "\n".join(message["content"]).strip()


def _heading(level: int, text: str, mark: dict[str, Any]) -> str:
    # "--" would end the comment.
    data = json.dumps(mark, ensure_ascii=False).replace("-", "\\u002d").replace(">", "\\u003e")
    return f"{'#' * level} {text} <!-- llmkit {data} -->"


def _one_line(text: str) -> str:
    return " ".join(text.replace("<!--", "").split())


def _escaped(text: str) -> str:
    """A text whose lines are no headings of ours."""
    if "<!-- llmkit " not in text:
        return text
    return "\n".join(
        f"\\{line}" if HEADING.match(line.lstrip("\\")) else line for line in text.split("\n")
    )
