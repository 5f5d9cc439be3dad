"""What a chat template accepts, probed once: roles, calls, tools. Pure.

Templates differ: some refuse a system message, or two messages of one role, some lose a role or a call without a word, some want the arguments of a call as an
object and others as text. What one takes is tried once, and then it is given that.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from llmkit.types import Message, Tool, ToolCall

__all__ = ["Manners", "Rendering", "as_dicts", "find_manners"]

ID = "call_0123456789abcdef01234567"
# Markers that no template contains.
SAID, MORE, KEY, VALUE, NAME, RESULT, ABOUT = "qvxasaid", "qvxbmore", "qvxckey", "qvxdvalue", "qvxename", "qvxfresult", "qvxgabout"
TOOL = Tool(NAME, ABOUT, {"type": "object", "properties": {KEY: {"type": "string", "description": MORE}}, "required": [KEY]})
# (messages as dicts, tools) -> the text, or None where the template refuses
Rendering = Callable[[list[dict[str, Any]], Sequence[Tool]], str | None]


@dataclass(frozen=True, slots=True)
class Manners:
    """What a template takes.

    ``system`` a system message; ``later_system`` also one after others; ``developer`` that role; ``repeats`` two messages of one role in a row. ``calls``
    whether it shows calls that were made, ``arguments`` how, ``content`` what stands beside them, ``many_calls`` more than one in a message, ``short_ids``
    whether ids must be nine letters or digits, ``results`` whether it shows what tools gave. ``tools`` whether it tells of tools. ``parts`` whether a text must
    come as a list of parts.
    """

    system: bool = True
    later_system: bool = True
    developer: bool = False
    repeats: bool = True
    calls: bool = False
    arguments: Literal["object", "text"] = "object"
    content: Literal["", "none", "absent"] = ""
    many_calls: bool = True
    short_ids: bool = False
    results: bool = False
    tools: bool = False
    parts: bool = False


def find_manners(render: Rendering, source: str) -> Manners:
    """Try what a template takes."""
    parts = False

    def shows(messages: list[dict[str, Any]], *texts: str, tools: Sequence[Tool] = ()) -> bool:
        text = render([_in_parts(m) for m in messages] if parts else messages, tools)
        return text is not None and all(t in text for t in texts)

    if not shows([{"role": "user", "content": SAID}], SAID):  # made for pictures, perhaps
        parts = True
        text = render([_in_parts({"role": "user", "content": SAID})], ()) or ""
        parts = SAID in text and "'text'" not in text  # and not the list as Python writes it
    user, answer = {"role": "user", "content": SAID}, {"role": "assistant", "content": MORE}
    manners = Manners(
        parts=parts,
        system=shows([{"role": "system", "content": MORE}, user], MORE, SAID),
        later_system=shows([{"role": "system", "content": RESULT}, user, answer, {"role": "system", "content": ABOUT}, user], RESULT, ABOUT),
        developer="developer" in source and shows([{"role": "developer", "content": MORE}, user], MORE, SAID),
        repeats=shows([user, {"role": "user", "content": MORE}], SAID, MORE)
        and shows([user, answer, {"role": "assistant", "content": ABOUT}, user], MORE, ABOUT),
        tools=shows([user], NAME, KEY, tools=[TOOL]),
    )
    return _with_calls(manners, shows)


def _with_calls(manners: Manners, shows: Callable[..., bool]) -> Manners:
    """The same, with how calls are taken: the first way in which the template shows all of a call."""
    forms: tuple[Literal["object", "text"], ...] = ("object", "text")
    contents: tuple[Literal["", "none", "absent"], ...] = ("", "none", "absent")
    for content in contents:
        for short in (False, True):
            for arguments in forms:
                tried = replace(manners, parts=False, calls=True, arguments=arguments, content=content, short_ids=short, results=True)
                call = ToolCall(ID, NAME, json.dumps({KEY: VALUE}))
                made = [Message("user", SAID), Message("assistant", "", tool_calls=(call,))]
                given = Message("tool", RESULT, name=NAME, tool_call_id=ID)
                for results in (True, False):
                    messages = as_dicts([*made, *([given] if results else [])], tried)
                    if shows(messages, NAME, KEY, VALUE, *([RESULT] if results else []), tools=[TOOL] if manners.tools else ()) and shows(
                        messages, VALUE, *([RESULT] if results else [])
                    ):
                        two = as_dicts(
                            [Message("user", SAID), Message("assistant", "", tool_calls=(call, replace(call, arguments=json.dumps({KEY: ABOUT}))))], tried
                        )
                        return replace(tried, parts=manners.parts, results=results, many_calls=shows(two, VALUE, ABOUT))
    return manners


def as_dicts(messages: Sequence[Message], manners: Manners) -> list[dict[str, Any]]:
    """Messages as a template sees them: calls in the form that it takes."""
    found = []
    for message in messages:
        entry = message.as_dict()
        if message.reasoning_content:
            entry.setdefault("thinking", message.reasoning_content)
        for made, call in zip(message.tool_calls, entry.get("tool_calls", ()), strict=True):
            if manners.arguments == "text":
                call["function"]["arguments"] = made.arguments
            call["id"] = _id(call["id"], manners)
        if "tool_call_id" in entry:
            entry["tool_call_id"] = _id(entry["tool_call_id"], manners)
        if entry.get("tool_calls") and not entry["content"]:
            if manners.content == "none":
                entry["content"] = None
            elif manners.content == "absent":
                del entry["content"]
        found.append(_in_parts(entry) if manners.parts else entry)
    return found


def _in_parts(entry: dict[str, Any]) -> dict[str, Any]:
    text = entry.get("content")
    return {**entry, "content": [{"type": "text", "text": text}]} if isinstance(text, str) else entry


def _id(text: str, manners: Manners) -> str:
    """The same id, as nine letters and digits where it must be: always the same for the same."""
    if not manners.short_ids or (len(text) == 9 and text.isascii() and text.isalnum()):
        return text
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:9]
