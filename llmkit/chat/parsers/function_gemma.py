"""FunctionGemma's tool calls. Pure.

``<start_function_call>call:name{city:<escape>Paris<escape>,days:3}<end_function_call>``
"""

from __future__ import annotations

import re
from typing import Any

from llmkit.chat.parsers.events import Call, Content, Event, as_call, held

__all__ = ["MARKS", "FunctionGemmaParser"]

OPEN, CLOSE, ESCAPE = "<start_function_call>", "<end_function_call>", "<escape>"
MARKS = (OPEN, CLOSE, ESCAPE)
HEAD = re.compile(r"\s*call:([^\s{]+)\s*(?=\{)")
WORD = re.compile(r"[^,:{}\[\]<]+")
MAX_DEPTH = 50


class FunctionGemmaParser:
    """Content outside calls streams.

    ``tools`` maps names to the JSON schemas of their arguments.
    """

    thinking = False

    def __init__(self, tools: dict[str, Any]) -> None:
        self._tools = tools
        self._buffer = ""
        self._inside = False

    def push(self, text: str) -> list[Event]:
        self._buffer += text
        events: list[Event] = []
        while (at := self._buffer.find(CLOSE if self._inside else OPEN)) >= 0:
            # An end tag within a string is text.
            while self._inside and at >= 0 and self._buffer.count(ESCAPE, 0, at) % 2:
                at = self._buffer.find(CLOSE, at + 1)
            if at < 0:
                break
            before, self._buffer = (
                self._buffer[:at],
                self._buffer[at + len(CLOSE if self._inside else OPEN) :],
            )
            events += self._called(before, CLOSE) if self._inside else self._content(before)
            self._inside = not self._inside
        if not self._inside:
            end = len(self._buffer) - held(self._buffer, OPEN)
            ready, self._buffer = self._buffer[:end], self._buffer[end:]
            events += self._content(ready)
        return events

    def finish(self) -> list[Event]:
        rest, self._buffer = self._buffer, ""
        return self._called(rest, "") if self._inside else self._content(rest)

    @staticmethod
    def _content(text: str) -> list[Event]:
        return [Content(text)] if text else []

    def _called(self, body: str, end: str) -> list[Event]:
        call = self._call(body)
        return [call] if call is not None else [Content(OPEN + body + end)]

    def _call(self, body: str) -> Call | None:
        head = HEAD.match(body)
        if head is None:
            return None
        try:
            arguments, end = _value(body, head.end(), 0)
        except (ValueError, IndexError):
            return None
        return (
            None
            if body[end:].strip()
            else as_call({"name": head[1], "arguments": arguments}, self._tools)
        )


def _value(text: str, at: int, depth: int) -> tuple[Any, int]:
    """The value that begins at ``at``, and where it ends.

    Raises `ValueError` or `IndexError` if there is none.
    """
    if depth > MAX_DEPTH:
        raise ValueError("nested too deeply")
    if text.startswith(ESCAPE, at):
        end = text.index(ESCAPE, at + len(ESCAPE))
        return text[at + len(ESCAPE) : end], end + len(ESCAPE)
    if text[at] not in "{[":
        word = WORD.match(text, at)
        if word is None:
            raise ValueError("no value")
        return _word(word[0].strip()), word.end()
    is_object, close = text[at] == "{", "}" if text[at] == "{" else "]"
    members: dict[str, Any] = {}
    items: list[Any] = []
    at += 1
    while text[at] != close:
        if is_object:
            key, at = _value(text, at, depth + 1)
            if text[at] != ":":
                raise ValueError("a name without a value")
            members[str(key)], at = _value(text, at + 1, depth + 1)
        else:
            item, at = _value(text, at, depth + 1)
            items.append(item)
        if text[at] == ",":
            at += 1
        elif text[at] != close:
            raise ValueError("a comma is missing between values")
    return (members if is_object else items), at + 1


def _word(text: str) -> Any:
    if text in ("true", "false", "null"):
        return {"true": True, "false": False}.get(text)
    try:
        return int(text) if re.fullmatch(r"-?\d+", text) else float(text)
    except ValueError:
        return text
