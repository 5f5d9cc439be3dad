"""Calls that are the whole answer: ``{"name": ..., "parameters": {...}}`` (Llama 3), also after ``<|python_tag|>``, or a list after ``[TOOL_CALLS]`` (Mistral),
``<|tool_call|>`` or ``functools`` (Granite, Phi); several with ``;`` between them. Newer models of Mistral write ``[TOOL_CALLS]name[ARGS]{...}``. Pure."""

from __future__ import annotations

import json
import re
from typing import Any

from llmkit.chat.parsers.events import Content, Event, as_call

__all__ = ["MARKS", "BareJsonParser"]

OPEN = ("<|python_tag|>", "[TOOL_CALLS]", "<|tool_call|>", "functools")
CLOSE = "<|/tool_call|>"
MARKS = (*OPEN, CLOSE, "[ARGS]", "[CALL_ID]")
NAMED = re.compile(r"(?:\[TOOL_CALLS\])?\s*([\w.-]+)(?:\[CALL_ID\][^\[]*)?(?:\[ARGS\])?\s*(?=\{)")


class BareJsonParser:
    """An answer that begins like a call waits until it is whole; any other streams."""

    thinking = False

    def __init__(self, tools: dict[str, Any]) -> None:
        self._tools = tools
        self._buffer = ""
        self._is_call: bool | None = None  # None: cannot tell yet

    def push(self, text: str) -> list[Event]:
        if self._is_call is False:
            return [Content(text)] if text else []
        self._buffer += text
        start = self._buffer.lstrip()
        if not start or any(mark.startswith(start) for mark in OPEN):
            return []
        self._is_call = start.startswith(("{", "[{", *OPEN))
        return [] if self._is_call else self._flush()

    def finish(self) -> list[Event]:
        return self._calls() or self._flush() if self._is_call is not False else []

    def _flush(self) -> list[Event]:
        text, self._buffer = self._buffer, ""
        return [Content(text)] if text else []

    def _calls(self) -> list[Event]:
        """All calls of the answer; none if any part of it is something else."""
        rest = self._buffer.strip().removesuffix(CLOSE)
        for mark in OPEN:
            if mark != "[TOOL_CALLS]" or not NAMED.match(rest):
                rest = rest.removeprefix(mark).lstrip()
        found: list[Event] = []
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
                found.append(call)
            rest = rest[end:].lstrip("; \n\t")
        return found
