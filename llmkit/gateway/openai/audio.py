"""OpenAI's routes for sound: transcriptions, translations and speech. Tornado loop only.

Sound is decoded and encoded in the process of the model, not here.
"""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator, Callable
from typing import Any

from llmkit.gateway.directory import EngineDirectory
from llmkit.gateway.exchange import Exchange
from llmkit.gateway.ids import new_id
from llmkit.gateway.openai.audio_objects import (
    CONTENT_TYPES,
    LISTS,
    SpeechBody,
    TranscriptionBody,
    TranslationBody,
    heard_usage,
    said_usage,
    transcript,
)
from llmkit.gateway.ops.openapi import Route
from llmkit.gateway.specialists import Specialists
from llmkit.gateway.streams import close_all
from llmkit.protocol import Completion, GenerationRequest, Usage
from llmkit.protocol.client import EngineClient
from llmkit.protocol.speech import Facts, Lines, Segment
from llmkit.protocol.stream import Stream

__all__ = ["AudioRoutes"]

Event = Facts | Segment | bytes | Completion


class AudioRoutes:
    """Routes over the engines of a directory that hear or speak.

    Sound longer than ``max_s`` seconds is refused.
    """

    def __init__(
        self,
        directory: EngineDirectory,
        on_use: Callable[[EngineClient], None] = lambda _: None,
        max_s: float | None = None,
    ) -> None:
        self._specialists, self._max_s = Specialists(directory, on_use), max_s

    def routes(self) -> list[Route]:
        form = "multipart/form-data"
        return [
            Route(
                "POST",
                "/v1/audio/transcriptions",
                self.transcriptions,
                "Speech as text",
                "OpenAI",
                TranscriptionBody,
                media=form,
            ),
            Route(
                "POST",
                "/v1/audio/translations",
                self.translations,
                "Speech as English text",
                "OpenAI",
                TranslationBody,
                media=form,
            ),
            Route("POST", "/v1/audio/speech", self.speech, "Text as speech", "OpenAI", SpeechBody),
        ]

    async def transcriptions(self, exchange: Exchange) -> None:
        body = await exchange.read_form(TranscriptionBody, LISTS)
        await self._hear(exchange, body, body.stream)

    async def translations(self, exchange: Exchange) -> None:
        await self._hear(exchange, await exchange.read_form(TranslationBody, LISTS), False)

    async def speech(self, exchange: Exchange) -> None:
        body = await exchange.read(SpeechBody)
        engine = self._specialists.engine(body.model, "speak")
        saying, ignored = body.saying(engine.description.voices)
        for name in ignored:
            exchange.ignore(name)
        request = GenerationRequest(new_id("speech"), prompt=body.input, saying=saying)
        streams = self._specialists.submit(exchange, engine, request)
        is_sound = body.stream_format == "audio"
        try:
            async for event in self._events(engine, streams):
                if event is None or isinstance(event, bytes):
                    # The first sound is there: from here on the status is 200.
                    if event is not None and not exchange.streaming:
                        kind = CONTENT_TYPES[saying.format] if is_sound else "text/event-stream"
                        await exchange.start_events(kind)
                    await self._send_sound(exchange, event, is_sound)
                elif isinstance(event, Completion) and not is_sound:
                    usage = said_usage(event.usage)
                    await exchange.send_event({"type": "speech.audio.done", "usage": usage})
            exchange.end_events("")
        except Exception:
            if exchange.streaming and is_sound:
                exchange.drop()  # an error's words are no sound
            raise
        finally:
            close_all(streams)

    @staticmethod
    async def _send_sound(exchange: Exchange, sound: bytes | None, is_sound: bool) -> None:
        if sound is None:
            if exchange.streaming and not is_sound:
                await exchange.send_text(": ping\n\n")
        elif is_sound:
            await exchange.send_part(sound)
        else:
            text = base64.b64encode(sound).decode()
            await exchange.send_event({"type": "speech.audio.delta", "audio": text})

    async def _hear(self, exchange: Exchange, body: TranslationBody, is_stream: bool) -> None:
        hearing = body.hearing(self._max_s)
        engine = self._specialists.engine(body.model, "hear")
        request = GenerationRequest(new_id("transc"), prompt=body.prompt, hearing=hearing)
        streams = self._specialists.submit(exchange, engine, request)
        segments: list[Segment] = []
        duration, usage = 0.0, Usage()
        try:
            async for event in self._events(engine, streams):
                if isinstance(event, Segment):
                    segments.append(event)
                elif isinstance(event, Facts):
                    duration = exchange.record.heard_s = event.duration
                elif isinstance(event, Completion):
                    usage = event.usage
                if is_stream:
                    await self._send(exchange, event, segments, body.response_format)
            if is_stream:
                exchange.end_events()
                return
            text, content_type = transcript(body, segments, duration, usage)
            exchange.send_bytes(text.encode(), content_type=content_type)
        finally:
            close_all(streams)

    @staticmethod
    async def _send(
        exchange: Exchange, event: Event | None, segments: list[Segment], shape: str
    ) -> None:
        """An event of a streamed transcript."""
        if not exchange.streaming:  # the sound could be read
            await exchange.start_events()
        if event is None:
            await exchange.send_text(": ping\n\n")
        elif isinstance(event, Segment):
            text = event.text if len(segments) > 1 else event.text.lstrip()
            await exchange.send_event({"type": "transcript.text.delta", "delta": text})
            if shape == "verbose_json":
                said: dict[str, Any] = {
                    "type": "transcript.text.segment",
                    "id": str(len(segments) - 1),
                    "start": event.start,
                    "end": event.end,
                    "text": event.text,
                    "speaker": "",
                }
                await exchange.send_event(said)
        elif isinstance(event, Completion):
            whole = "".join(s.text for s in segments).lstrip()
            usage = heard_usage(event.usage)
            done = {"type": "transcript.text.done", "text": whole, "usage": usage}
            await exchange.send_event(done)

    async def _events(
        self, engine: EngineClient, streams: list[Stream]
    ) -> AsyncIterator[Event | None]:
        """What the stream says, the completion last; None after a silence."""
        lines = Lines()
        async for said in self._specialists.texts(engine, streams):
            if isinstance(said, str):
                for event in lines.read(said):
                    yield event
            else:
                yield said
