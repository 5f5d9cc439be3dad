"""A conversation adapted to its chat template, so that nothing is lost for lack of a place.

Pure. Also checks a rendered prompt for what the template dropped.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from llmkit.chat.conversation import tool_dict
from llmkit.chat.manners import Manners
from llmkit.protocol import INSTRUCTIONS, Message, Tool

__all__ = ["Kind", "fitted", "lost"]

RESULT = "<tool_response>"
CALL = '<tool_call>\n{"name": "the function\'s name", "arguments": {}}\n</tool_call>'
GENERAL = f"""To call one, reply only with a JSON object of its name and arguments in these tags:
{CALL}"""
# How to ask for calls in the model's own form where its template does not.
FORMS = {
    "deepseek": """To call one, reply only with this, with its name and a JSON object of its \
arguments:
<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>the function's name
```json
{}
```<｜tool▁call▁end｜><｜tool▁calls▁end｜>""",
}
TOOLS_PROMPT = """You can call functions. The available functions, each with a JSON schema of its \
arguments:
<tools>
{tools}
</tools>
{how}"""


def fitted(
    messages: Sequence[Message], tools: Sequence[Tool], manners: Manners, form: str, general: bool
) -> tuple[list[Message], Sequence[Tool]]:
    """The messages as the template accepts them, and the tools left for it to describe.

    ``form`` is that of the model's calls; ``general``: the template knows nothing of tools.
    """
    describes = manners.tools and not general
    adapted = _with_names(messages)
    # Templates with a developer role accept it in the first message only.
    adapted = [
        replace(m, role="system") if m.role == "developer" and (i or not manners.developer) else m
        for i, m in enumerate(adapted)
    ]
    if general or not manners.calls or not manners.results:
        adapted = _in_plain_words(adapted, manners, general)
    else:
        adapted = adapted if manners.words else _words_first(adapted)
        adapted = adapted if manners.many_calls else _one_by_one(adapted)
    if tools and not describes:
        adapted = _with_prompt(
            adapted,
            TOOLS_PROMPT.format(
                tools="\n".join(json.dumps(tool_dict(t), ensure_ascii=False) for t in tools),
                how=FORMS.get(form, GENERAL),
            ),
        )
    adapted = _systems(adapted, manners)
    return (adapted if manners.repeats else _joined(adapted)), (tools if describes else ())


def _with_names(messages: Sequence[Message]) -> list[Message]:
    """Tool results with the tools' names: some templates require them."""
    names = {call.call_id: call.name for m in messages for call in m.tool_calls}
    return [
        replace(m, name=names[m.tool_call_id])
        if m.role == "tool" and not m.name and m.tool_call_id in names
        else m
        for m in messages
    ]


def _in_plain_words(messages: Sequence[Message], manners: Manners, general: bool) -> list[Message]:
    """Calls and results that the template does not show, rewritten as plain messages."""
    plain: list[Message] = []
    for message in messages:
        if message.role == "tool" and (general or not manners.results or not manners.calls):
            message = Message("user", f"{RESULT}\n{message.text}\n</tool_response>")
        elif message.tool_calls and (general or not manners.calls):
            calls = [
                f'<tool_call>\n{{"name": {json.dumps(c.name)}, "arguments": {c.arguments}}}\n'
                "</tool_call>"
                for c in message.tool_calls
            ]
            message = replace(
                message,
                content="\n".join([*([message.text] if message.text else []), *calls]),
                tool_calls=(),
            )
        if (
            plain
            and message.role == plain[-1].role == "user"
            and RESULT in plain[-1].text + message.text
        ):  # many templates want roles to alternate
            message = Message("user", f"{plain.pop().text}\n\n{message.text}")
        plain.append(message)
    return plain


def _words_first(messages: Sequence[Message]) -> list[Message]:
    """Text beside calls moved into its own message before them."""
    split: list[Message] = []
    for message in messages:
        if message.tool_calls and message.text:
            split.append(replace(message, tool_calls=()))
            message = replace(message, content="", reasoning_content=None)
        split.append(message)
    return split


def _one_by_one(messages: Sequence[Message]) -> list[Message]:
    """Each of several calls in its own message, followed by its result."""
    split: list[Message] = []
    at = 0
    while at < len(messages):
        message = messages[at]
        at += 1
        if len(message.tool_calls) < 2:
            split.append(message)
            continue
        results = []
        while at < len(messages) and messages[at].role == "tool":
            results.append(messages[at])
            at += 1
        for i, call in enumerate(message.tool_calls):
            result = next(
                (r for r in results if r.tool_call_id == call.call_id),
                results[0] if results and not results[0].tool_call_id else None,
            )
            split.append(
                replace(message, content=message.text if i == 0 else "", tool_calls=(call,))
            )
            if result is not None:
                results.remove(result)
                split.append(result)
        split += results
    return split


def _with_prompt(messages: Sequence[Message], text: str) -> list[Message]:
    """The text added to the first system message."""
    if messages and messages[0].role in INSTRUCTIONS:
        first = messages[0]
        return [
            replace(first, content=f"{first.text}\n\n{text}" if first.text else text),
            *messages[1:],
        ]
    return [Message("system", text), *messages]


def _systems(messages: Sequence[Message], manners: Manners) -> list[Message]:
    """System messages where the template accepts them.

    Leading ones are joined; later ones become user messages, and so do all if it accepts none.
    """
    first: list[Message] = []
    rest = list(messages)
    while (
        rest
        and rest[0].role == "system"
        and (len(first) == 0 or not manners.later_system or not manners.system)
    ):
        first.append(rest.pop(0))
    placed = [Message("system", "\n\n".join(m.text for m in first), first[0].name)] if first else []
    for message in rest:
        if message.role == "system" and not (manners.system and manners.later_system):
            message = Message("user", message.text)
        placed.append(message)
    if not placed or manners.system or placed[0].role != "system":
        return placed
    text = placed.pop(0).text
    at = next((i for i, m in enumerate(placed) if m.role == "user"), None)
    if not text:
        return placed
    if at is None:
        return [Message("user", text), *placed]
    placed[at] = replace(placed[at], content=f"{text}\n\n{placed[at].text}")
    return placed


def _joined(messages: Sequence[Message]) -> list[Message]:
    """Consecutive messages of one role, joined."""
    joined: list[Message] = []
    for message in messages:
        last = joined[-1] if joined else None
        if (
            last is not None
            and message.role == last.role
            and message.role in ("user", "assistant", "system")
            and not last.tool_calls
        ):
            thoughts = (
                "\n\n".join(t for t in (last.reasoning_content, message.reasoning_content) if t)
                or None
            )
            text = "\n\n".join(t for t in (last.text, message.text) if t)
            joined[-1] = replace(
                last, content=text, tool_calls=message.tool_calls, reasoning_content=thoughts
            )
        else:
            joined.append(message)
    return joined


Kind = Literal["system", "words", "tools", "rest"]
MAX_SEARCHES = 256


def lost(text: str, messages: Sequence[Message], tools: Sequence[Tool]) -> set[Kind]:
    """What of a conversation is missing from its prompt.

    Templates may trim text and drop old reasoning. A search that fails reads the whole prompt, so
    there are at most `MAX_SEARCHES` of them: a conversation costs what its length is.
    """
    missing: set[Kind] = set()
    place, num_searches = 0, 0
    for message in messages:
        words = message.text.rpartition("</think>")[2].strip()
        at = text.find(words, place)
        if at < 0:  # in another order, or as JSON
            num_searches += 1
            if num_searches > MAX_SEARCHES:
                return missing
            spellings = (words, _quoted(words, False), _quoted(words, True))
            at = next((i for s in spellings if (i := text.find(s)) >= 0), -1)
        if at < 0:
            missing.add(
                "system"
                if message.role in INSTRUCTIONS
                else "words"
                if message.tool_calls
                else "rest"
            )
        else:
            place = at
    names = {tool.name: 1 for tool in tools}
    called = Counter(call.name for message in messages for call in message.tool_calls)
    wanted = list((called + Counter(names)).items())[:MAX_SEARCHES]
    if any(text.count(name) < count for name, count in wanted):
        missing.add("tools")
    return missing


def _quoted(text: str, ascii_only: bool) -> str:
    return json.dumps(text, ensure_ascii=ascii_only)[1:-1]
