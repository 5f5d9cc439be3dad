"""Calls that are the whole answer: ``{"name": ..., "parameters": {...}}`` (Llama 3), also after ``<|python_tag|>``, or a list after ``[TOOL_CALLS]`` (Mistral);
several with ``;`` between them. Pure."""

from __future__ import annotations

import json
from typing import Any

from llmkit.chat.parsers.events import Content, Event, as_call

__all__ = ["BareJsonParser"]

MARKS = ("<|python_tag|>", "[TOOL_CALLS]")


class BareJsonParser:
    """An answer that begins like a call waits until it is whole; any other streams."""

    def __init__(self, tools: dict[str, Any]) -> None:
        self._names = list(tools)
        self._buffer = ""
        self._is_call: bool | None = None  # None: cannot tell yet

    def push(self, text: str) -> list[Event]:
        if self._is_call is False:
            return [Content(text)] if text else []
        self._buffer += text
        start = self._buffer.lstrip()
        if not start or any(mark.startswith(start) for mark in MARKS):
            return []
        self._is_call = start.startswith(("{", "[{", *MARKS))
        return [] if self._is_call else self._flush()

    def finish(self) -> list[Event]:
        return self._calls() or self._flush() if self._is_call is not False else []

    def _flush(self) -> list[Event]:
        text, self._buffer = self._buffer, ""
        return [Content(text)] if text else []

    def _calls(self) -> list[Event]:
        """All calls of the answer; none if any part of it is something else."""
        rest = self._buffer.strip()
        for mark in MARKS:
            rest = rest.removeprefix(mark).lstrip()
        found: list[Event] = []
        decoder = json.JSONDecoder()
        while rest:
            try:
                value, end = decoder.raw_decode(rest)
            except (ValueError, RecursionError):
                return []
            for one in value if isinstance(value, list) else [value]:
                call = as_call(one, self._names)
                if call is None:
                    return []
                found.append(call)
            rest = rest[end:].lstrip("; \n\t")
        return found
