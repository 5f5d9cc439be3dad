"""Calls that are the whole answer, as bare JSON. Pure.

``{"name": ..., "parameters": {...}}`` (Llama 3), also after ``<|python_tag|>``; or a list after
``[TOOL_CALLS]`` (Mistral), ``<|tool_call|>`` or ``functools`` (Granite, Phi); several are separated
by ``;``. Newer Mistral models write ``[TOOL_CALLS]name[ARGS]{...}``.
"""

from __future__ import annotations

import json
import re
from typing import Any

from llmkit.chat.parsers.events import Content, Event, as_call, held

__all__ = ["MARKS", "BareJsonParser"]

OPEN = ("<|python_tag|>", "[TOOL_CALLS]", "<|tool_call|>", "functools")
CLOSE = "<|/tool_call|>"
MARKS = (*OPEN, CLOSE, "[ARGS]", "[CALL_ID]")
NAMED = re.compile(
    r"(?:\[TOOL_CALLS\])?\s*([\w.-]+)(?:\[CALL_ID\][^\s\[{]*)?(?:\[ARGS\])?\s*(?=\{)"
)
BEGINNING = ("{", "[{", *OPEN[:-1], "functools[")


class BareJsonParser:
    """Text that begins like a call or follows a marker waits until whole; the rest streams."""

    thinking = False

    def __init__(self, tools: dict[str, Any]) -> None:
        self._tools = tools
        self._buffer = ""
        self._is_call: bool | None = None  # None: cannot tell yet

    def push(self, text: str) -> list[Event]:
        self._buffer += text
        if self._is_call is None:
            start = self._buffer.lstrip()
            if not start or any(mark.startswith(start) and mark != start for mark in BEGINNING):
                return []
            self._is_call = start.startswith(BEGINNING)
        if self._is_call:
            return []
        at = min((i for mark in OPEN[:-1] if (i := self._buffer.find(mark)) >= 0), default=-1)
        self._is_call = at >= 0
        if at < 0:
            at = len(self._buffer) - max(held(self._buffer, mark) for mark in OPEN[:-1])
        ready, self._buffer = self._buffer[:at], self._buffer[at:]
        return [Content(ready)] if ready else []

    def finish(self) -> list[Event]:
        return (self._calls() if self._is_call is not False else []) or self._flush()

    def _flush(self) -> list[Event]:
        text, self._buffer = self._buffer, ""
        return [Content(text)] if text else []

    def _calls(self) -> list[Event]:
        """All calls of the answer; none if any part of it is not a call."""
        rest = self._buffer.strip().removesuffix(CLOSE)
        for mark in OPEN:
            if mark != "[TOOL_CALLS]" or not NAMED.match(rest):
                rest = rest.removeprefix(mark).lstrip()
        calls: list[Event] = []
        decoder = json.JSONDecoder()
        while rest:
            named = NAMED.match(rest)
            rest = rest[named.end() :] if named else rest
            try:
                value, end = decoder.raw_decode(rest)
            except (ValueError, RecursionError):
                return []
            for one in value if isinstance(value, list) else [value]:
                call = as_call({"name": named[1], "arguments": one} if named else one, self._tools)
                if call is None:
                    return []
                calls.append(call)
            rest = rest[end:].lstrip("; \n\t")
        return calls
