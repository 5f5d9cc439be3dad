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

ID = "c1"  # short: some templates want more of it, and say so
# Markers that no template contains.
SAID, MORE, KEY, VALUE, NAME, RESULT, ABOUT = "qvxasaid", "qvxbmore", "qvxckey", "qvxdvalue", "qvxename", "qvxfresult", "qvxgabout"
TOOL = Tool(NAME, ABOUT, {"type": "object", "properties": {KEY: {"type": "string", "description": MORE}}, "required": [KEY]})
CALL = ToolCall(ID, NAME, json.dumps({KEY: VALUE}))
GIVEN = Message("tool", RESULT, name=NAME, tool_call_id=ID)
# (messages as dicts, tools) -> the text, or None where the template refuses
Rendering = Callable[[list[dict[str, Any]], Sequence[Tool]], str | None]


@dataclass(frozen=True, slots=True)
class Manners:
    """What a template takes.

    ``system`` a system message; ``later_system`` also one after others; ``developer`` that role; ``repeats`` two messages of one role in a row. ``calls``
    whether it shows calls that were made, ``arguments`` how, ``content`` what stands beside them where nothing was said, ``words`` whether it shows what was
    said beside them, ``many_calls`` more than one in a message, ``short_ids`` whether ids must be nine letters or digits, ``results`` whether it shows what
    tools gave. ``tools`` whether it tells of tools. ``parts`` whether a text must come as a list of parts.
    """

    system: bool = True
    later_system: bool = True
    developer: bool = False
    repeats: bool = True
    calls: bool = False
    arguments: Literal["object", "text"] = "object"
    content: Literal["", "none", "absent"] = ""
    words: bool = True
    many_calls: bool = True
    short_ids: bool = False
    results: bool = False
    tools: bool = False
    parts: bool = False


def find_manners(render: Rendering, source: str) -> Manners:
    """Try what a template takes."""
    parts = False

    def shows(messages: list[dict[str, Any]], *texts: str, tools: Sequence[Tool] = ()) -> int:
        """The length of the text if all of it is shown, else 0."""
        text = render([_in_parts(m) for m in messages] if parts else messages, tools)
        return len(text) if text is not None and all(t in text for t in texts) else 0

    if not shows([{"role": "user", "content": SAID}], SAID):  # made for pictures, perhaps
        parts = True
        text = render([_in_parts({"role": "user", "content": SAID})], ()) or ""
        parts = SAID in text and "'text'" not in text  # and not the list as Python writes it
    user, answer = {"role": "user", "content": SAID}, {"role": "assistant", "content": MORE}
    manners = Manners(
        parts=parts,
        system=bool(shows([{"role": "system", "content": MORE}, user], MORE, SAID)),
        later_system=bool(shows([{"role": "system", "content": RESULT}, user, answer, {"role": "system", "content": ABOUT}, user], RESULT, ABOUT)),
        developer="developer" in source and bool(shows([{"role": "developer", "content": MORE}, user], MORE, SAID)),
        repeats=bool(
            shows([user, {"role": "user", "content": MORE}], SAID, MORE) and shows([user, answer, {"role": "assistant", "content": ABOUT}, user], MORE, ABOUT)
        ),
        tools=bool(shows([user], NAME, KEY, tools=[TOOL])),
    )
    return _with_calls(manners, shows)


def _with_calls(manners: Manners, shows: Callable[..., int]) -> Manners:
    """The same, with how calls are taken: of the ways in which the template shows all of a call, the one with the shortest text, which writes nothing in the
    place of words that were not said."""
    contents: tuple[Literal["", "none", "absent"], ...] = ("", "none", "absent")
    found = [way for content in contents if (way := _with_content(replace(manners, content=content), shows)) is not None]
    if not found:
        return manners
    tried = min(found, key=lambda way: way[0])[1]
    two = Message("assistant", "", tool_calls=(CALL, replace(CALL, arguments=json.dumps({KEY: ABOUT}))))
    talk = [Message("user", SAID), Message("assistant", MORE, tool_calls=(CALL,)), *([GIVEN] if tried.results else [])]
    later = [*talk, Message("assistant", ABOUT), Message("user", SAID)]
    return replace(
        tried,
        parts=manners.parts,
        many_calls=bool(shows(as_dicts([Message("user", SAID), two], tried), VALUE, ABOUT)),
        words=all(shows(as_dicts(said, tried), MORE, VALUE) for said in (talk, talk[:2], later)),
    )


def _with_content(manners: Manners, shows: Callable[..., int]) -> tuple[int, Manners] | None:
    """The first form of ids and arguments in which all of a call is shown, and the length of its text."""
    forms: tuple[Literal["object", "text"], ...] = ("object", "text")
    for short in (False, True):
        for arguments in forms:
            for results in (True, False):
                tried = replace(manners, parts=False, calls=True, arguments=arguments, short_ids=short, results=results)
                talk = [Message("user", SAID), Message("assistant", "", tool_calls=(CALL,)), *([GIVEN] if results else [])]
                messages, result = as_dicts(talk, tried), [RESULT] if results else []
                size = shows(messages, VALUE, *result)
                if size and shows(messages, NAME, KEY, VALUE, *result, tools=[TOOL] if manners.tools else ()):
                    return size, tried
    return None


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
