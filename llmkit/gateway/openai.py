"""The OpenAI routes: models, chat completions, completions. Tornado loop only."""

from __future__ import annotations

import asyncio
import time
import weakref
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from llmkit.client import EngineClient
from llmkit.errors import EngineGoneError, ModelNotFoundError
from llmkit.gateway import schemas
from llmkit.gateway.chat import ChatChunks, ChatRequest, chat_object
from llmkit.gateway.engines import EngineDirectory
from llmkit.gateway.exchange import Exchange
from llmkit.stream import Stream
from llmkit.types import Completion, Delta, FinishReason, GenerationRequest, TokenLogprob

__all__ = ["OpenAIRoutes"]

PING_S = 15.0
Chunks = Callable[[dict[str, Any], int, str, Sequence[TokenLogprob], Completion | None], list[dict[str, Any]]]


class OpenAIRoutes:
    """Routes over the engines of a directory. ``fingerprint`` goes into every reply; ``on_use`` hears of each engine that is used."""

    def __init__(self, directory: EngineDirectory, fingerprint: str, on_use: Callable[[EngineClient], None] = lambda _: None) -> None:
        self._directory = directory
        self._fingerprint = fingerprint
        self._on_use = on_use

    async def list_models(self, exchange: Exchange) -> None:
        data = [schemas.model_object(e.model_id, e.client.description) for e in self._directory.entries()]
        exchange.send_json({"object": "list", "data": data})

    async def get_model(self, exchange: Exchange) -> None:
        model = exchange.args[0]
        try:
            description = self._directory.lookup(model).description
        except EngineGoneError as error:  # here a model that is not there is not found, whatever it was
            raise ModelNotFoundError(str(error)) from error
        exchange.send_json(schemas.model_object(model, description))

    async def chat_completions(self, exchange: Exchange) -> None:
        request = schemas.parse(ChatRequest, exchange.body)
        reply_id = schemas.new_id("chatcmpl")
        engine = self._engine(request.model)
        head = self._head(reply_id, "chat.completion.chunk" if request.stream else "chat.completion", engine)
        streams = submit_all(engine, [replace(r, caller=exchange.caller) for r in request.requests(reply_id, engine.description)])
        try:
            parsers = [request.parser(engine.description) for _ in streams]
            if not request.stream:
                done = await gather(streams, lambda: self._on_use(engine))
                exchange.send_json(chat_object(head, done, parsers, bool(request.logprobs)))
                return
            events = merge(streams)
            news = await anext(events)  # an error before the first byte still has its real status
            await self._start(exchange, head, request.include_usage)
            chunks = ChatChunks(parsers)
            for i in range(len(streams)):
                await exchange.send_event(chunks.first(head, i))
            await self._relay(exchange, engine, head, news, events, request.include_usage, 1, chunks)
        finally:
            close_all(streams)

    async def completions(self, exchange: Exchange) -> None:
        request = schemas.parse(schemas.CompletionRequest, exchange.body)
        reply_id = schemas.new_id("cmpl")
        engine = self._engine(request.model)
        head = self._head(reply_id, "text_completion", engine)
        requests = [replace(r, caller=exchange.caller) for r in request.requests(reply_id)]
        num_prompts = len(request.prompts)
        streams = submit_all(engine, requests)
        try:
            if not request.stream:
                done = await gather(streams, lambda: self._on_use(engine))
                exchange.send_json(schemas.completion_object(head, request, done))
                return
            events = merge(streams)
            news = await anext(events)
            await self._start(exchange, head, request.include_usage)
            if request.echo:
                for i in range(len(streams)):
                    await exchange.send_event(schemas.text_chunk(head, i, request.echo_text(i)))
            await self._relay(exchange, engine, head, news, events, request.include_usage, num_prompts, TextChunks())
        finally:
            close_all(streams)

    def _engine(self, model: str) -> EngineClient:
        engine = self._directory.lookup(model, "generate")
        self._on_use(engine)
        return engine

    def _head(self, reply_id: str, kind: str, engine: EngineClient) -> dict[str, Any]:
        return {
            "id": reply_id,
            "object": kind,
            "created": int(time.time()),
            "model": engine.description.name,
            "system_fingerprint": self._fingerprint,
        }

    @staticmethod
    async def _start(exchange: Exchange, head: dict[str, Any], include_usage: bool) -> None:
        if include_usage:
            head["usage"] = None
        await exchange.start_events()

    async def _relay(
        self,
        exchange: Exchange,
        engine: EngineClient,
        head: dict[str, Any],
        news: Event | None,
        events: AsyncIterator[Event | None],
        include_usage: bool,
        num_prompts: int,
        chunks: Chunks,
    ) -> None:
        """Pass events on until all streams have ended."""
        usages = {}
        while True:
            if news is None:
                self._on_use(engine)  # still at work, though silent
                await exchange.send_text(": ping\n\n")
            else:
                index, deltas, completion = news
                text = "".join(d.text for d in deltas)
                entries = [e for d in deltas for e in d.logprobs]
                if completion is not None:
                    usages[index] = completion.usage
                for chunk in chunks(head, index, text, entries, completion):
                    await exchange.send_event(chunk)
            try:
                news = await anext(events)
            except StopAsyncIteration:
                break
        if include_usage:
            usage = schemas.usage_object([usages[i] for i in sorted(usages)], num_prompts)
            await exchange.send_event({**head, "choices": [], "usage": usage})
        self._on_use(engine)
        exchange.end_events()


class Bell:
    """Wakes a loop from other threads: a step of the engine has news of many streams, and waking the loop costs a system call."""

    _bells: ClassVar[weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Bell]] = weakref.WeakKeyDictionary()

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = weakref.ref(loop)
        self._events: deque[asyncio.Event] = deque()
        self._rung = False

    @classmethod
    def of(cls, loop: asyncio.AbstractEventLoop) -> Bell:
        return cls._bells.setdefault(loop, cls(loop))

    def ring(self, event: asyncio.Event) -> None:
        """Set ``event`` on the loop's thread, soon."""
        self._events.append(event)
        loop = self._loop()
        if not self._rung and loop is not None and not loop.is_closed():
            self._rung = True  # before the call: what is appended from now on is found by it, or rings anew
            loop.call_soon_threadsafe(self._set_all)

    def _set_all(self) -> None:
        self._rung = False
        while self._events:
            self._events.popleft().set()


class TextChunks:
    """Chunks of text completions; keeps where in its text each choice is."""

    def __init__(self) -> None:
        self._offsets: dict[int, int] = {}

    def __call__(self, head: dict[str, Any], index: int, text: str, entries: Sequence[TokenLogprob], completion: Completion | None) -> list[dict[str, Any]]:
        chunks = []
        if text or entries:
            offset = self._offsets.get(index, 0)
            self._offsets[index] = offset + len(text)
            chunks.append(schemas.text_chunk(head, index, text, None, entries, offset))
        if completion is not None:
            chunks.append(schemas.text_chunk(head, index, "", completion.finish_reason))
        return chunks


Event = tuple[int, list[Delta], Completion | None]


def submit_all(engine: EngineClient, requests: list[GenerationRequest]) -> list[Stream]:
    """All or none."""
    streams: list[Stream] = []
    try:
        for request in requests:
            streams.append(engine.submit(request))
    except BaseException:
        close_all(streams)
        raise
    return streams


def close_all(streams: list[Stream]) -> None:
    for stream in streams:
        stream.close()


async def gather(streams: list[Stream], on_wait: Callable[[], None]) -> list[Completion]:
    """The completions of all streams, in order. The first failure is raised at once."""
    done: dict[int, Completion] = {}
    async for event in merge(streams):
        if event is None:
            on_wait()
        elif event[2] is not None:
            done[event[0]] = event[2]
    return [done[i] for i in range(len(streams))]


async def merge(streams: list[Stream]) -> AsyncIterator[Event | None]:
    """News of any stream as it comes; None after 15 s of silence. A failed stream's error is raised."""
    loop, arrived = asyncio.get_running_loop(), asyncio.Event()
    bell = Bell.of(loop)
    last_news = loop.time()
    timer: asyncio.TimerHandle | None = None

    def watch_silence() -> None:
        """One timer for the whole stream; a timeout around every wait would cost more than the wait."""
        nonlocal timer
        timer = loop.call_later(max(0.01, last_news + PING_S - loop.time()), watch_silence)
        arrived.set()

    timer = loop.call_later(PING_S, watch_silence)
    for stream in streams:
        stream.listen(lambda: bell.ring(arrived))
    waiting = dict(enumerate(streams))
    try:
        while waiting:
            await arrived.wait()
            arrived.clear()
            if loop.time() - last_news >= PING_S:
                last_news = loop.time()
                yield None
            for event in take_news(waiting):
                last_news = loop.time()
                yield event
    finally:
        timer.cancel()


def take_news(waiting: dict[int, Stream]) -> Iterator[Event]:
    """What the waiting streams have; ended ones are taken out. A failed stream's error is raised."""
    for index, stream in list(waiting.items()):
        deltas, completion = stream.take()
        if completion is not None:
            del waiting[index]
            if completion.finish_reason in (FinishReason.ERROR, FinishReason.ABORT):
                raise stream.failure or EngineGoneError("the request was aborted in the kernel")
        if deltas or completion is not None:
            yield index, deltas, completion
