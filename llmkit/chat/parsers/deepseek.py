"""DeepSeek's tool calls. Pure.

Each is between ``<｜tool▁call▁begin｜>`` and ``<｜tool▁call▁end｜>``, with ``<｜tool▁sep｜>``
between its name and its arguments (bare since 3.1, in a Markdown fence before).
"""

from __future__ import annotations

from typing import Any

from llmkit.chat.parsers.events import Content, Event, as_call, held

__all__ = ["MARKS", "DeepSeekParser"]

ALL, ALL_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
ONE, SEPARATOR, ONE_END = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
MARKS = (ALL, ALL_END, ONE, SEPARATOR, ONE_END)


class DeepSeekParser:
    """Content before the calls streams; the calls are parsed at the end of the answer.

    ``tools`` maps names to the JSON schemas of their arguments.
    """

    thinking = False

    def __init__(self, tools: dict[str, Any]) -> None:
        self._tools = tools
        self._buffer = ""
        self._calling = False

    def push(self, text: str) -> list[Event]:
        self._buffer += text
        if self._calling:
            return []
        at = min((i for mark in (ALL, ONE) if (i := self._buffer.find(mark)) >= 0), default=-1)
        if at >= 0:
            self._calling = True
            ready = self._buffer[:at].rstrip()
        else:
            keep = max(held(self._buffer, mark) for mark in (ALL, ONE))
            # White space before a call does not count.
            ready = self._buffer[: len(self._buffer) - keep].rstrip()
            at = len(ready)
        self._buffer = self._buffer[at:]
        return [Content(ready)] if ready else []

    def finish(self) -> list[Event]:
        text, self._buffer = self._buffer, ""
        calls: list[Event] = []
        for part in text.split(ONE)[1:]:
            name, mark, rest = part.partition(ONE_END)[0].partition(SEPARATOR)
            if name.strip() == "function" and mark:
                name, _, rest = rest.partition("\n")
            body = rest.strip().removeprefix("```json").removesuffix("```")
            call = as_call({"name": name.strip(), "arguments": body.strip()}, self._tools)
            if call is None:
                return [Content(text)]
            calls.append(call)
        return calls or ([Content(text)] if text else [])
