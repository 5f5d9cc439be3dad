"""What a chat template accepts, probed once: roles, calls, tools. Pure.

Templates differ: some refuse a system message or two messages of one role in a row, some silently
drop a role or a call, some want call arguments as an object and others as text. Each is probed
once, and then given what it accepts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from llmkit.chat.conversation import message_dict
from llmkit.protocol import Message, Tool, ToolCall

__all__ = ["Manners", "Rendering", "as_dicts", "find_manners"]

ID = "c1"  # short: some templates demand a longer one
# Markers that occur in no template.
SAID, MORE, KEY, VALUE, NAME, RESULT, ABOUT = (
    "qvxasaid",
    "qvxbmore",
    "qvxckey",
    "qvxdvalue",
    "qvxename",
    "qvxfresult",
    "qvxgabout",
)
TOOL = Tool(
    NAME,
    ABOUT,
    {
        "type": "object",
        "properties": {KEY: {"type": "string", "description": MORE}},
        "required": [KEY],
    },
)
CALL = ToolCall(ID, NAME, json.dumps({KEY: VALUE}))
TOOL_RESULT = Message("tool", RESULT, name=NAME, tool_call_id=ID)
# (messages as dicts, tools) -> the rendered text, or None if the template refuses
Rendering = Callable[[list[dict[str, Any]], Sequence[Tool]], str | None]


@dataclass(frozen=True, slots=True)
class Manners:
    """What a template accepts.

    ``system``: a system message; ``later_system``: also after other messages; ``developer``: that
    role; ``repeats``: two messages of one role in a row. ``calls``: it shows past tool calls, with
    ``arguments`` in this form and this ``content`` when there was no text; ``words``: it shows
    text beside calls; ``many_calls``: several in one message; ``short_ids``: ids must be nine
    letters or digits; ``results``: it shows tool results. ``tools``: it describes the tools.
    ``parts``: text must come as a list of parts.
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
    """Probe what a template accepts."""
    parts = False

    def shows(messages: list[dict[str, Any]], *texts: str, tools: Sequence[Tool] = ()) -> int:
        """The length of the rendering if it contains all the texts, else 0."""
        text = render([_in_parts(m) for m in messages] if parts else messages, tools)
        return len(text) if text is not None and all(t in text for t in texts) else 0

    if not shows([{"role": "user", "content": SAID}], SAID):  # perhaps a multimodal template
        parts = True
        text = render([_in_parts({"role": "user", "content": SAID})], ()) or ""
        parts = SAID in text and "'text'" not in text  # not the list's Python repr
    user, answer = {"role": "user", "content": SAID}, {"role": "assistant", "content": MORE}
    manners = Manners(
        parts=parts,
        system=bool(shows([{"role": "system", "content": MORE}, user], MORE, SAID)),
        later_system=bool(
            shows(
                [
                    {"role": "system", "content": RESULT},
                    user,
                    answer,
                    {"role": "system", "content": ABOUT},
                    user,
                ],
                RESULT,
                ABOUT,
            )
        ),
        developer="developer" in source
        and bool(shows([{"role": "developer", "content": MORE}, user], MORE, SAID)),
        repeats=bool(
            shows([user, {"role": "user", "content": MORE}], SAID, MORE)
            and shows([user, answer, {"role": "assistant", "content": ABOUT}, user], MORE, ABOUT)
        ),
        tools=bool(shows([user], NAME, KEY, tools=[TOOL])),
    )
    return _with_calls(manners, shows)


def _with_calls(manners: Manners, shows: Callable[..., int]) -> Manners:
    """The same, with how calls are accepted.

    Of the forms in which the template shows a whole call, the one with the shortest rendering: it
    prints nothing in place of the missing text.
    """
    contents: tuple[Literal["", "none", "absent"], ...] = ("", "none", "absent")
    forms = [
        form
        for content in contents
        if (form := _with_content(replace(manners, content=content), shows)) is not None
    ]
    if not forms:
        return manners
    best = min(forms, key=lambda form: form[0])[1]
    two = Message(
        "assistant", "", tool_calls=(CALL, replace(CALL, arguments=json.dumps({KEY: ABOUT})))
    )
    talk = [
        Message("user", SAID),
        Message("assistant", MORE, tool_calls=(CALL,)),
        *([TOOL_RESULT] if best.results else []),
    ]
    later = [*talk, Message("assistant", ABOUT), Message("user", SAID)]
    return replace(
        best,
        parts=manners.parts,
        many_calls=bool(shows(as_dicts([Message("user", SAID), two], best), VALUE, ABOUT)),
        words=all(shows(as_dicts(chat, best), MORE, VALUE) for chat in (talk, talk[:2], later)),
    )


def _with_content(manners: Manners, shows: Callable[..., int]) -> tuple[int, Manners] | None:
    """The first form of ids and arguments that shows a whole call, after its rendered length."""
    forms: tuple[Literal["object", "text"], ...] = ("object", "text")
    for short in (False, True):
        for arguments in forms:
            for results in (True, False):
                tried = replace(
                    manners,
                    parts=False,
                    calls=True,
                    arguments=arguments,
                    short_ids=short,
                    results=results,
                )
                talk = [
                    Message("user", SAID),
                    Message("assistant", "", tool_calls=(CALL,)),
                    *([TOOL_RESULT] if results else []),
                ]
                messages, result = as_dicts(talk, tried), [RESULT] if results else []
                size = shows(messages, VALUE, *result)
                if size and shows(
                    messages, NAME, KEY, VALUE, *result, tools=[TOOL] if manners.tools else ()
                ):
                    return size, tried
    return None


def as_dicts(messages: Sequence[Message], manners: Manners) -> list[dict[str, Any]]:
    """Messages as a template sees them, with calls in the form it accepts."""
    entries = []
    for message in messages:
        entry = message_dict(message)
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
        entries.append(_in_parts(entry) if manners.parts else entry)
    return entries


def _in_parts(entry: dict[str, Any]) -> dict[str, Any]:
    text = entry.get("content")
    return (
        {**entry, "content": [{"type": "text", "text": text}]} if isinstance(text, str) else entry
    )


def _id(text: str, manners: Manners) -> str:
    """The id, as nine letters and digits if required; equal ids stay equal."""
    if not manners.short_ids or (len(text) == 9 and text.isascii() and text.isalnum()):
        return text
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:9]
