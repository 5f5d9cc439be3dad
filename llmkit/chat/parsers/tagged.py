"""Calls between ``<tool_call>`` and ``</tool_call>``. Pure.

JSON (Hermes, Qwen, and our own general form), XML (Qwen3-Coder) or keys and values (GLM).
"""

from __future__ import annotations

import re
from typing import Any

from llmkit.chat.parsers.events import Call, Content, Event, as_call, fits, held, loads

__all__ = ["GLM_MARKS", "MARKS", "TaggedParser"]

OPEN, CLOSE = MARKS = "<tool_call>", "</tool_call>"
GLM_MARKS = ("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>")
GLM_NAME = re.compile(r"\s*([^\s<{]+)\s*")
GLM_PAIR = re.compile(r"<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>\s*", re.DOTALL)
QUOTE = re.compile(r'(?<!\\)(?:\\\\)*"')
_PYTHON = {"True": True, "False": False, "None": None}
FUNCTION, PARAMETER = "<function=", "<parameter="


class TaggedParser:
    """Content outside the tags streams; white space beside a call is dropped.

    >>> parser = TaggedParser({"add": {}})
    >>> text = 'Sure.\\n<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'
    >>> [type(e).__name__ for e in parser.push(text)]
    ['Content', 'Call']

    ``tools`` maps names to the JSON schemas of their arguments.
    """

    thinking = False

    def __init__(self, tools: dict[str, Any]) -> None:
        self._tools = tools
        self._buffer = ""
        self._space = ""
        self._inside = False
        self._after_call = False

    def push(self, text: str) -> list[Event]:
        self._buffer += text
        events: list[Event] = []
        while True:
            tag = CLOSE if self._inside else OPEN
            at = self._buffer.find(tag)
            if at < 0:
                break
            if self._inside:
                while at >= 0 and _within_text(self._buffer[:at]):
                    at = self._buffer.find(tag, at + 1)
                if at < 0:
                    break
            before, self._buffer = self._buffer[:at], self._buffer[at + len(tag) :]
            if self._inside:
                call = self._call(before)
                events += [call] if call is not None else self._content(OPEN + before + CLOSE)
            else:
                events += self._content(before)
            self._inside = not self._inside
        if not self._inside:
            end = len(self._buffer) - held(self._buffer, OPEN)
            ready, self._buffer = self._buffer[:end], self._buffer[end:]
            events += self._content(ready)
        return events

    def finish(self) -> list[Event]:
        rest, self._buffer = self._buffer, ""
        if self._inside:
            self._inside = False
            call = self._call(rest)  # perhaps only the end tag is missing
            if call is not None:
                return [call]
            rest = OPEN + rest
        events = self._content(rest)
        return [*events, Content(self._space)] if self._space and not self._after_call else events

    def _content(self, text: str) -> list[Event]:
        """Hold white space back until the text after it is known: beside a call it is dropped."""
        text = self._space + text
        solid = text.rstrip()
        self._space = text[len(solid) :]
        if self._after_call and solid:
            solid, self._after_call = solid.lstrip(), False
        return [Content(solid)] if solid else []

    def _call(self, body: str) -> Call | None:
        text = body.strip()
        if text.startswith(FUNCTION):
            call = self._xml_call(text.removeprefix(FUNCTION).removesuffix("</function>"))
        else:
            call = as_call(text, self._tools) if text.startswith("{") else self._glm_call(text)
        if call is not None:
            self._space, self._after_call = "", True
        return call

    def _glm_call(self, text: str) -> Call | None:
        """A name, then keys and values: strings verbatim, anything else as JSON."""
        name = GLM_NAME.match(text)
        if name is None or name[1] not in self._tools:
            return None
        properties = _properties(self._tools[name[1]])
        arguments, at = {}, name.end()
        while (pair := GLM_PAIR.match(text, at)) is not None:
            key = pair[1].strip()
            arguments[key] = _value(pair[2], properties.get(key))
            at = pair.end()
        return (
            as_call({"name": name[1], "arguments": arguments}, self._tools)
            if at == len(text)
            else None
        )

    def _xml_call(self, text: str) -> Call | None:
        """``name>`` followed by its parameters; unclosed ones are dropped."""
        name, _, rest = text.partition(">")
        name = name.strip()
        if name not in self._tools:
            return None
        properties = _properties(self._tools[name])
        arguments: dict[str, Any] = {}
        while True:
            _, begun, rest = rest.partition(PARAMETER)
            key, opened, rest = rest.partition(">")
            here, next_, later = rest.partition(PARAMETER)
            value, closed, _ = here.rpartition("</parameter>")
            rest = next_ + later
            if not (begun and opened and closed):
                return as_call({"name": name, "arguments": arguments}, self._tools)
            key = key.strip()
            arguments[key] = _value(
                value.removeprefix("\n").removesuffix("\n"), properties.get(key)
            )


def _properties(schema: Any) -> dict[str, Any]:
    properties = schema.get("properties") if isinstance(schema, dict) else None
    return properties if isinstance(properties, dict) else {}


def _value(text: str, schema: Any) -> Any:
    """XML carries no types: values that the schema does not declare as strings are read as JSON."""
    parsed = loads(text)
    guess = text if parsed is None and text.strip() != "null" else parsed
    if not isinstance(schema, dict):
        return guess
    if schema.get("type") == "string":
        return text
    return next(
        (value for value in (guess, text, _PYTHON.get(text.strip(), text)) if fits(value, schema)),
        guess,
    )


def _within_text(body: str) -> bool:
    """Whether JSON ends inside a string: a tag there is text."""
    return body.lstrip().startswith("{") and len(QUOTE.findall(body)) % 2 == 1
