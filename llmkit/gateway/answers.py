"""One chat answer for the dialects without choices. They write a `Chat` and read events.

Tornado loop only. Knows no dialect.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace

from llmkit.chat.parsers.events import Event
from llmkit.chat.reading import AnswerReader
from llmkit.gateway.chats import Chat
from llmkit.gateway.exchange import Exchange
from llmkit.gateway.streams import close_all, merge, submit_all
from llmkit.protocol import Completion, Inquiry, TokenizeChat, check_size
from llmkit.protocol.client import EngineClient
from llmkit.protocol.stream import Stream

__all__ = ["Answer", "AnswerUpdate", "count_tokens", "read_all"]

AnswerUpdate = list[Event] | Completion | None


class Answer:
    """The answer to ``chat``, as it is generated. ``close()`` aborts it.

    A ``prompt`` is continued (up to a ``suffix``) as it is: no template is applied, and control
    tokens in it count.
    """

    def __init__(
        self,
        engine: EngineClient,
        chat: Chat,
        reply_id: str,
        exchange: Exchange,
        on_use: Callable[[EngineClient], None],
        *,
        prompt: str | None = None,
        suffix: str | None = None,
    ) -> None:
        self._engine, self._on_use, self._chat = engine, on_use, chat
        self._reader = chat.reader(engine.description) if prompt is None else AnswerReader.plain()
        on_use(engine)
        request = chat.request(reply_id, engine.description)
        if prompt is not None:
            request = replace(
                request, prompt=prompt, messages=None, parse_special=True, suffix=suffix
            )
        self._streams = submit_all(engine, exchange.owned(engine, [request]))

    async def updates(self) -> AsyncIterator[AnswerUpdate]:
        """Events once they are certain, None after a silence, and finally the completion.

        Raises what the engine raises.
        """
        async for update in merge(self._streams):
            self._on_use(self._engine)
            if update is None:
                yield None
                continue
            _, deltas, completion = update
            events = self._reader.read(deltas)
            if completion is not None:
                rest, completion = self._reader.end(completion)
                events += rest
            if events:
                yield events
            if completion is not None:
                await self._chat.finished()
                yield completion

    async def whole(self) -> tuple[list[Event], Completion]:
        """All events, and the completion."""
        events: list[Event] = []
        async for update in self.updates():
            if isinstance(update, Completion):
                return events, update
            events += update or []
        raise AssertionError("the answer ended without a completion")

    def close(self) -> None:
        close_all(self._streams)


async def read_all(
    streams: list[Stream], readers: Sequence[AnswerReader], on_wait: Callable[[], None]
) -> list[tuple[list[Event], Completion]]:
    """The answers of all streams, in order. Raises the first failure at once."""
    events: list[list[Event]] = [[] for _ in streams]
    done: dict[int, Completion] = {}
    async for update in merge(streams):
        if update is None:
            on_wait()
            continue
        index, deltas, completion = update
        events[index] += readers[index].read(deltas)
        if completion is not None:
            rest, done[index] = readers[index].end(completion)
            events[index] += rest
    return [(events[i], done[i]) for i in range(len(streams))]


async def count_tokens(engine: EngineClient, chat: Chat, request_id: str, caller: str) -> int:
    """The number of prompt tokens of a chat."""
    request = chat.request(request_id, engine.description)
    check_size(request, engine.description.n_ctx)
    question = TokenizeChat(
        chat.messages,
        request.tools,
        request.template_options,
        continue_final=chat.continue_final,
        media=request.media,
    )
    reply = await asyncio.wrap_future(engine.inquire(Inquiry(request_id, question, caller)))
    return len(reply.tokens)
