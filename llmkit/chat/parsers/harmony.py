"""gpt-oss's channels. Pure.

``<|channel|>analysis<|message|>…<|end|><|start|>assistant<|channel|>final<|message|>…``; a call is
a message to ``functions.name``.
"""

from __future__ import annotations

import re
from typing import Any

from llmkit.chat.parsers.events import Content, Event, Reasoning, as_call, held

__all__ = ["MARKS", "HarmonyParser"]

CHANNEL, MESSAGE, START = "<|channel|>", "<|message|>", "<|start|>"
ENDS = ("<|end|>", "<|call|>", "<|return|>", START, CHANNEL)
# "<|end|>" ends a message only if another one begins: otherwise it is quoted in the text.
ENDING = re.compile(
    r"<\|end\|>(?=\s*<\|start\|>)|<\|call\|>|<\|return\|>|<\|start\|>|<\|channel\|>"
)
MARK_LENGTH = 40
MARKS = (CHANNEL, MESSAGE, START, "<|end|>", "<|call|>", "<|return|>", "<|constrain|>")
BEGINNINGS = (*MARKS, "to=functions.")
RECIPIENT = re.compile(r"to=functions\.([^\s<]+)")


class HarmonyParser:
    """Streams the channels' text; a call waits until it is whole. Without channels all is content.

    ``tools`` maps names to the JSON schemas of their arguments.
    """

    def __init__(self, tools: dict[str, Any]) -> None:
        self._tools = tools
        self._buffer = ""
        self._header: str | None = ""  # None: within a message
        self._kind: type[Content] | type[Reasoning] = Content
        self._seen = 0  # how much of the buffer has been searched
        self._name = ""  # the tool that the message calls
        self._plain: bool | None = None  # None: cannot tell yet

    @property
    def thinking(self) -> bool:
        return self._kind is Reasoning

    def push(self, text: str) -> list[Event]:
        if self._plain:
            return [Content(text)] if text else []
        self._buffer += text
        if self._plain is None:
            start = self._buffer.lstrip()
            if any(begin.startswith(start) for begin in BEGINNINGS):
                return []
            self._plain = not start.startswith(BEGINNINGS)
            if self._plain:
                return self._rest()
        events: list[Event] = []
        while self._step(events):
            pass
        return events

    def _step(self, events: list[Event]) -> bool:
        """Read to the next marker. False: more text is needed."""
        if self._header is not None:
            header, mark, rest = self._buffer.partition(MESSAGE)
            if not mark:
                return False
            self._begin(header)
            self._buffer, self._seen = rest, 0
            return True
        ending = ENDING.search(self._buffer, max(0, self._seen - MARK_LENGTH))
        self._seen = len(self._buffer)
        at, end = (ending.start(), ending[0]) if ending else (-1, "")
        if at < 0:
            if not self._name:
                keep = max(held(self._buffer, e) for e in ENDS)
                open_end = self._buffer.rfind("<|end|>")
                if open_end >= 0 and START.startswith(
                    self._buffer[open_end + len("<|end|>") :].lstrip()
                ):  # the end of the message, or a quote of it
                    keep = len(self._buffer) - open_end
                events += self._text(self._buffer[: len(self._buffer) - keep])
                self._buffer = self._buffer[len(self._buffer) - keep :]
            return False
        events += self._message(self._buffer[:at])
        self._buffer, self._header, self._seen = self._buffer[at + len(end) :], "", 0
        if end == CHANNEL:
            self._buffer = CHANNEL + self._buffer
        return True

    def _begin(self, header: str) -> None:
        called = RECIPIENT.search(header)
        channel = header.partition(CHANNEL)[2].split(" ")[0].split("<")[0].strip()
        self._header, self._name = None, called[1] if called else ""
        self._kind = Reasoning if channel == "analysis" else Content

    def _text(self, text: str) -> list[Event]:
        return [self._kind(text)] if text else []

    def _message(self, text: str) -> list[Event]:
        if not self._name:
            return self._text(text)
        call = as_call({"name": self._name, "arguments": text.strip() or "{}"}, self._tools)
        return [call] if call is not None else [Content(f"functions.{self._name} {text}")]

    def _rest(self) -> list[Event]:
        text, self._buffer = self._buffer, ""
        return [Content(text)] if text else []

    def finish(self) -> list[Event]:
        if self._plain is None:
            return self._rest()
        text, self._buffer = self._buffer, ""
        if self._header is not None or not text:
            return []  # an unfinished header is dropped
        return self._message(text.removesuffix("<|end|>"))
