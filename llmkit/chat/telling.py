"""A conversation in the words that a chat template takes: nothing that was said is lost because the template has no place for it. Pure."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from llmkit.chat.manners import Manners
from llmkit.types import Message, Tool

__all__ = ["Kind", "fitted", "lost"]

RESULT = "<tool_response>"
CALL = '<tool_call>\n{"name": "the function\'s name", "arguments": {}}\n</tool_call>'
GENERAL = f"""To call one, reply only with a JSON object of its name and arguments in these tags:
{CALL}"""
# How a model that was trained to another form is told to call, where its template does not say so.
FORMS = {
    "deepseek": """To call one, reply only with this, with its name and a JSON object of its arguments:
<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>the function's name
```json
{}
```<｜tool▁call▁end｜><｜tool▁calls▁end｜>""",
}
TOOLS_PROMPT = """You can call functions. The available functions, each with a JSON schema of its arguments:
<tools>
{tools}
</tools>
{how}"""


def fitted(messages: Sequence[Message], tools: Sequence[Tool], manners: Manners, form: str, general: bool) -> tuple[list[Message], Sequence[Tool]]:
    """The messages as the template takes them, and the tools that it is to tell of itself. ``form`` is that of the model's calls; ``general`` says that the
    template knows nothing of tools at all."""
    tells = manners.tools and not general
    told = _with_names(messages)
    # Templates that know a developer take the first one only.
    told = [replace(m, role="system") if m.role == "developer" and (i or not manners.developer) else m for i, m in enumerate(told)]
    if general or not manners.calls or not manners.results:
        told = _in_plain_words(told, manners, general)
    else:
        told = told if manners.words else _words_first(told)
        told = told if manners.many_calls else _one_by_one(told)
    if tools and not tells:
        told = _with_prompt(
            told, TOOLS_PROMPT.format(tools="\n".join(json.dumps(t.function(), ensure_ascii=False) for t in tools), how=FORMS.get(form, GENERAL))
        )
    told = _systems(told, manners)
    return (told if manners.repeats else _joined(told)), (tools if tells else ())


def _with_names(messages: Sequence[Message]) -> list[Message]:
    """The results of tools with the names of the tools: some templates ask for them."""
    names = {call.call_id: call.name for m in messages for call in m.tool_calls}
    return [replace(m, name=names[m.tool_call_id]) if m.role == "tool" and not m.name and m.tool_call_id in names else m for m in messages]


def _in_plain_words(messages: Sequence[Message], manners: Manners, general: bool) -> list[Message]:
    """Calls and results that the template does not show, as plain messages."""
    plain: list[Message] = []
    for message in messages:
        if message.role == "tool" and (general or not manners.results or not manners.calls):
            message = Message("user", f"{RESULT}\n{message.content}\n</tool_response>")
        elif message.tool_calls and (general or not manners.calls):
            calls = [f'<tool_call>\n{{"name": {json.dumps(c.name)}, "arguments": {c.arguments}}}\n</tool_call>' for c in message.tool_calls]
            message = replace(message, content="\n".join([*([message.content] if message.content else []), *calls]), tool_calls=())
        if plain and message.role == plain[-1].role == "user" and RESULT in plain[-1].content + message.content:
            message = Message("user", f"{plain.pop().content}\n\n{message.content}")  # many templates want the roles to alternate
        plain.append(message)
    return plain


def _words_first(messages: Sequence[Message]) -> list[Message]:
    """What was said beside calls as a message of its own before them."""
    found: list[Message] = []
    for message in messages:
        if message.tool_calls and message.content:
            found.append(replace(message, tool_calls=()))
            message = replace(message, content="", reasoning_content=None)
        found.append(message)
    return found


def _one_by_one(messages: Sequence[Message]) -> list[Message]:
    """Each of several calls in a message of its own, with its result behind it."""
    found: list[Message] = []
    at = 0
    while at < len(messages):
        message = messages[at]
        at += 1
        if len(message.tool_calls) < 2:
            found.append(message)
            continue
        results = []
        while at < len(messages) and messages[at].role == "tool":
            results.append(messages[at])
            at += 1
        for i, call in enumerate(message.tool_calls):
            mine = next((r for r in results if r.tool_call_id == call.call_id), results[0] if results and not results[0].tool_call_id else None)
            found.append(replace(message, content=message.content if i == 0 else "", tool_calls=(call,)))
            if mine is not None:
                results.remove(mine)
                found.append(mine)
        found += results
    return found


def _with_prompt(messages: Sequence[Message], text: str) -> list[Message]:
    """The text in the first system message."""
    if messages and messages[0].role in ("system", "developer"):
        first = messages[0]
        return [replace(first, content=f"{first.content}\n\n{text}" if first.content else text), *messages[1:]]
    return [Message("system", text), *messages]


def _systems(messages: Sequence[Message], manners: Manners) -> list[Message]:
    """System messages where the template takes them: the first ones joined, later ones said by the user, all by the user where there may be none."""
    first: list[Message] = []
    rest = list(messages)
    while rest and rest[0].role == "system" and (len(first) == 0 or not manners.later_system or not manners.system):
        first.append(rest.pop(0))
    found = [Message("system", "\n\n".join(m.content for m in first), first[0].name)] if first else []
    for message in rest:
        if message.role == "system" and not (manners.system and manners.later_system):
            message = Message("user", message.content)
        found.append(message)
    if not found or manners.system or found[0].role != "system":
        return found
    said = found.pop(0).content
    place = next((i for i, m in enumerate(found) if m.role == "user"), None)
    if not said:
        return found
    if place is None:
        return [Message("user", said), *found]
    found[place] = replace(found[place], content=f"{said}\n\n{found[place].content}")
    return found


def _joined(messages: Sequence[Message]) -> list[Message]:
    """Neighbours of one role as one message."""
    found: list[Message] = []
    for message in messages:
        last = found[-1] if found else None
        if last is not None and message.role == last.role and message.role in ("user", "assistant", "system") and not last.tool_calls:
            thoughts = "\n\n".join(t for t in (last.reasoning_content, message.reasoning_content) if t) or None
            text = "\n\n".join(t for t in (last.content, message.content) if t)
            found[-1] = replace(last, content=text, tool_calls=message.tool_calls, reasoning_content=thoughts)
        else:
            found.append(message)
    return found


Kind = Literal["system", "words", "tools", "rest"]


def lost(text: str, messages: Sequence[Message], tools: Sequence[Tool]) -> set[Kind]:
    """What of a conversation is not in the prompt that a template made of it. Templates may trim, and leave old reasoning out."""
    missing: set[Kind] = set()
    place = 0
    for message in messages:
        said = message.content.rpartition("</think>")[2].strip()
        at = text.find(said, place)
        if at < 0:  # in another order, or as JSON
            at = next((i for w in (said, _quoted(said, False), _quoted(said, True)) if (i := text.find(w)) >= 0), -1)
        if at < 0:
            missing.add("system" if message.role in ("system", "developer") else "words" if message.tool_calls else "rest")
        else:
            place = at
    told = {tool.name for tool in tools}
    called = Counter(call.name for message in messages for call in message.tool_calls)
    if any(text.count(name) < count + (name in told) for name, count in called.items()) or any(name not in text for name in told):
        missing.add("tools")
    return missing


def _quoted(text: str, ascii_only: bool) -> str:
    return json.dumps(text, ensure_ascii=ascii_only)[1:-1]
