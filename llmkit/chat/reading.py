"""One answer of a model, parsed as it streams: text, reasoning, tool calls and reasoning tokens.

Pure; one thread at a time for each reader.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from llmkit.chat.parsers.events import Content, Event, Parser, Plain, Reasoning
from llmkit.chat.tools import make_parser
from llmkit.protocol import Completion, Delta, ModelDescription, Tool

__all__ = ["AnswerReader"]


class AnswerReader:
    """Turns the deltas of one answer into events.

    ``tools`` may be called. ``forced``: a grammar constrains the answer to calls; ``held``: to
    something else (either leaves no room for reasoning). ``thinks``: whether reasoning was
    requested (None: unspecified). ``continued`` is the text that the answer continues;
    ``after_results``: it follows a tool result.
    """

    def __init__(
        self,
        model: ModelDescription,
        tools: Sequence[Tool] = (),
        *,
        thinks: bool | None = None,
        forced: bool = False,
        held: bool = False,
        continued: str | None = None,
        after_results: bool = False,
    ) -> None:
        opened = {
            "think_always": True,
            "think_begun": thinks is not False,
            "think_asked": thinks is True,
        }
        begun = (
            opened.get(model.reasoning, False)
            and not (forced or held)
            and (model.reasons_after_results or not after_results)
        )
        if continued is not None:
            begun = continued.rfind("<think>") > continued.rfind("</think>")
        form = "think" if model.reasoning and not forced else ""
        self._parser: Parser = make_parser(
            model.tool_form, form, tools, reasoning_begun=begun, forced=forced
        )
        self._reasoning_tokens = 0

    @classmethod
    def plain(cls) -> AnswerReader:
        """A reader that treats all text as content."""
        reader = cls.__new__(cls)
        reader._parser, reader._reasoning_tokens = Plain(), 0
        return reader

    def read(self, deltas: Sequence[Delta]) -> list[Event]:
        """The events certain so far; neighbours of one kind are joined."""
        joined: list[Event] = []
        for delta in deltas:
            events = self._parser.push(delta.text) if delta.text else []
            if any(isinstance(e, Reasoning) for e in events) or (
                not events and self._parser.thinking
            ):
                self._reasoning_tokens += delta.num_tokens
            for event in events:
                last = joined[-1] if joined else None
                if last is not None and not hasattr(event, "name") and type(event) is type(last):
                    joined[-1] = type(event)(last.text + event.text)
                else:
                    joined.append(event)
        return joined

    def end(self, completion: Completion) -> tuple[list[Event], Completion]:
        """The remaining events, and the completion with its reasoning tokens counted."""
        events = self._parser.finish()
        return events, replace(
            completion, usage=replace(completion.usage, reasoning_tokens=self._reasoning_tokens)
        )

    def apart(
        self, completion: Completion, count: Callable[[str], int] = lambda _: 0
    ) -> Completion:
        """A whole answer, its reasoning split from its text; ``count`` counts a text's tokens."""
        events = self.whole(completion)
        text, thoughts = (
            "".join(e.text for e in events if isinstance(e, kind)) for kind in (Content, Reasoning)
        )
        usage = (
            replace(
                completion.usage,
                reasoning_tokens=min(count(thoughts), completion.usage.completion_tokens),
            )
            if thoughts
            else completion.usage
        )
        return replace(completion, text=text, reasoning=thoughts, usage=usage)

    def whole(self, completion: Completion) -> list[Event]:
        """All events of an answer that was not streamed."""
        return [*self._parser.push(completion.text), *self._parser.finish()]
