"""One chat answer for the dialects that have no choices: Anthropic's and Ollama's. They write a `ChatRequest` and read events. Tornado loop only."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import asdict, replace

from llmkit.bridge.client import check_size
from llmkit.chat.parsers.events import Event
from llmkit.chat.reading import AnswerReader
from llmkit.client import EngineClient
from llmkit.gateway.chat import ChatRequest
from llmkit.gateway.exchange import Exchange
from llmkit.gateway.streams import close_all, merge, submit_all
from llmkit.stream import Stream
from llmkit.types import Completion, Inquiry

__all__ = ["Answer", "count_tokens", "read_all"]

News = list[Event] | Completion | None


class Answer:
    """The answer to ``request``, as it comes. ``close()`` ends it early. With a ``prompt`` that text is continued (up to a ``suffix``), control tokens and all,
    and no template is applied."""

    def __init__(
        self,
        engine: EngineClient,
        request: ChatRequest,
        reply_id: str,
        exchange: Exchange,
        on_use: Callable[[EngineClient], None],
        *,
        prompt: str | None = None,
        suffix: str | None = None,
    ) -> None:
        self._engine, self._on_use = engine, on_use
        self._reader = request.reader(engine.description) if prompt is None else AnswerReader.plain()
        on_use(engine)
        requests = exchange.owned(request.requests(reply_id, engine.description))
        self._streams = submit_all(
            engine, requests if prompt is None else [replace(r, prompt=prompt, messages=None, parse_special=True, suffix=suffix) for r in requests]
        )

    async def news(self) -> AsyncIterator[News]:
        """Events as they are sure, None after silence, and at last the completion. Raises what the engine raises."""
        async for news in merge(self._streams):
            self._on_use(self._engine)
            if news is None:
                yield None
                continue
            _, deltas, completion = news
            events = self._reader.read(deltas)
            if completion is not None:
                rest, completion = self._reader.end(completion)
                events += rest
            if events:
                yield events
            if completion is not None:
                yield completion

    async def whole(self) -> tuple[list[Event], Completion]:
        """All events, and the completion."""
        events: list[Event] = []
        async for news in self.news():
            if isinstance(news, Completion):
                return events, news
            events += news or []
        raise AssertionError("an answer ends with its completion")

    def close(self) -> None:
        close_all(self._streams)


async def read_all(streams: list[Stream], readers: Sequence[AnswerReader], on_wait: Callable[[], None]) -> list[tuple[list[Event], Completion]]:
    """The answers of all streams, in order. The first failure is raised at once."""
    events: list[list[Event]] = [[] for _ in streams]
    done: dict[int, Completion] = {}
    async for news in merge(streams):
        if news is None:
            on_wait()
            continue
        index, deltas, completion = news
        events[index] += readers[index].read(deltas)
        if completion is not None:
            rest, done[index] = readers[index].end(completion)
            events[index] += rest
    return [(events[i], done[i]) for i in range(len(streams))]


async def count_tokens(engine: EngineClient, request: ChatRequest, request_id: str, caller: str) -> int:
    """Tokens of the prompt that a request makes."""
    (asked,) = request.requests(request_id, engine.description)
    check_size(asked, engine.description.n_ctx)
    data = {
        "messages": [m.as_json() for m in asked.messages or ()],
        "tools": [asdict(tool) for tool in asked.tools],
        "template_options": asked.template_options,
        "continue_final": asked.continue_final,
    }
    found = await asyncio.wrap_future(engine.inquire(Inquiry(request_id, "tokenize_chat", data, caller)))
    return len(found["tokens"])
