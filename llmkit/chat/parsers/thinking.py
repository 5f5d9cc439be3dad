"""Reasoning between ``<think>`` and ``</think>``, before the answer. Pure."""

from __future__ import annotations

from llmkit.chat.parsers.events import Event, Parser, Reasoning, held

__all__ = ["MARKS", "ReasoningParser"]

OPEN, CLOSE = MARKS = "<think>", "</think>"


class ReasoningParser:
    """Takes the reasoning off the beginning of a text and passes the rest to ``inner``.

    ``begun``: the prompt ended with the opening tag, so the text begins inside the reasoning.
    """

    def __init__(self, inner: Parser, *, begun: bool) -> None:
        self._inner = inner
        self._state = "inside" if begun else "before"
        self._buffer = ""
        self._started = False

    @property
    def thinking(self) -> bool:
        return self._state == "inside"

    def push(self, text: str) -> list[Event]:
        if self._state == "after":
            return self._inner.push(text)
        if self._state == "gap":
            return self._leave(text)
        self._buffer += text
        if self._state == "before":
            start = self._buffer.lstrip()
            if not start or (OPEN.startswith(start) and start != OPEN):
                return []
            if not start.startswith(OPEN):
                return self._leave(self._buffer)
            self._state, self._buffer = "inside", start[len(OPEN) :]
        at = self._buffer.find(CLOSE)
        if at >= 0:
            reasoning, rest = self._buffer[:at], self._buffer[at + len(CLOSE) :]
            return [*self._reasoning(reasoning.rstrip()), *self._leave(rest)]
        # White space before the closing tag does not count.
        ready = self._buffer[: len(self._buffer) - held(self._buffer, CLOSE)].rstrip()
        self._buffer = self._buffer[len(ready) :]
        return self._reasoning(ready)

    def finish(self) -> list[Event]:
        rest, self._buffer = self._buffer, ""
        if self._state == "inside":
            return [*self._reasoning(rest.rstrip()), *self._inner.finish()]
        return [*(self._inner.push(rest) if rest else []), *self._inner.finish()]

    def _leave(self, rest: str) -> list[Event]:
        """Go on to the answer, without the blank lines before it."""
        if self._state != "before":
            rest = rest.lstrip("\n")
        self._state, self._buffer = "after" if rest else "gap", ""
        return self._inner.push(rest) if rest else []

    def _reasoning(self, text: str) -> list[Event]:
        if not self._started:
            text = text.lstrip("\n")
        self._started = self._started or bool(text)
        return [Reasoning(text)] if text else []
