"""OpenAI's routes for images: generations and edits. Tornado loop only.

Images are encoded in the process of the model, not here.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator

from llmkit.errors import InvalidRequestError
from llmkit.gateway.directory import EngineDirectory
from llmkit.gateway.exchange import Exchange
from llmkit.gateway.ids import new_id
from llmkit.gateway.openai.image_objects import (
    Asked,
    ImageBody,
    ImageEditBody,
    completed,
    image_usage,
    images_object,
    partial,
)
from llmkit.gateway.ops.openapi import Route
from llmkit.gateway.specialists import Specialists
from llmkit.gateway.streams import close_all
from llmkit.protocol import Completion, GenerationRequest, Usage
from llmkit.protocol.client import EngineClient
from llmkit.protocol.images import Drawing, ImageLines, Picture, Step
from llmkit.protocol.stream import Stream

__all__ = ["ImageRoutes"]

PIECE = 1 << 20  # bytes of an answer that are sent at once
Event = Step | Picture | Completion


class ImageRoutes:
    """The routes over the engines of a directory that draw."""

    def __init__(
        self,
        directory: EngineDirectory,
        on_use: Callable[[EngineClient], None] = lambda _: None,
    ) -> None:
        self._specialists = Specialists(directory, on_use)

    def routes(self) -> list[Route]:
        form = "multipart/form-data"
        return [
            Route(
                "POST",
                "/v1/images/generations",
                self.generations,
                "Images of a prompt",
                "OpenAI",
                ImageBody,
            ),
            Route(
                "POST",
                "/v1/images/edits",
                self.edits,
                "Images of a prompt, from a picture",
                "OpenAI",
                ImageEditBody,
                media=form,
            ),
            Route(
                "POST",
                "/v1/images/variations",
                self.variations,
                "Not supported",
                "OpenAI",
            ),
        ]

    async def generations(self, exchange: Exchange) -> None:
        body = await exchange.read(ImageBody)
        await self._draw(exchange, body, body.drawing())

    async def edits(self, exchange: Exchange) -> None:
        body = await exchange.read_form(ImageEditBody, frozenset())
        assert exchange.reading is not None
        await self._draw(exchange, body, await exchange.reading.aside(exchange, body.drawing))

    async def variations(self, exchange: Exchange) -> None:
        raise InvalidRequestError(
            "Models here draw from a prompt. Send the picture to /v1/images/edits, with a prompt "
            "that says what is to be seen."
        )

    async def _draw(self, exchange: Exchange, body: ImageBody, asked: Asked) -> None:
        drawing, ignored, files = asked
        for name in ignored:
            exchange.ignore(name)
        engine = self._specialists.engine(body.model, "draw")
        request = GenerationRequest(new_id("img"), prompt=body.prompt, drawing=drawing, media=files)
        streams = self._specialists.submit(exchange, engine, request)
        try:
            if body.stream:
                await self._stream(exchange, self._events(engine, streams), drawing)
                return
            pictures: list[Picture] = []
            usage = Usage()
            async for event in self._events(engine, streams):
                if isinstance(event, Picture):
                    pictures.append(event)
                elif isinstance(event, Completion):
                    usage = event.usage
            parts = images_object(pictures, drawing, usage, int(time.time()))
            await self._send(exchange, parts)
        finally:
            close_all(streams)

    @staticmethod
    async def _send(exchange: Exchange, parts: Iterator[bytes]) -> None:
        """Each part is made on a thread, when the one before it has gone."""
        await exchange.start_events("application/json")
        try:
            while (part := await asyncio.to_thread(next, parts, None)) is not None:
                for at in range(0, len(part), PIECE):
                    await exchange.send_part(part[at : at + PIECE])
        except Exception:
            exchange.drop()  # an error's words are no part of it
            raise
        exchange.end_events("")

    @staticmethod
    async def _stream(
        exchange: Exchange, events: AsyncIterator[Event | None], drawing: Drawing
    ) -> None:
        """Each image's previews, then the image; the last one has what is left of the usage."""
        num_partial, counted, steps, waiting = 0, 0, 0, None
        async for event in events:
            if not exchange.streaming:
                await exchange.start_events()
            if event is None:
                await exchange.send_text(": ping\n\n")
                continue
            now = int(time.time())
            if waiting is not None:
                rest = event.usage if isinstance(event, Completion) else None
                usage = image_usage(waiting, steps, counted, rest)
                counted += usage["output_tokens"]
                await exchange.send_named_event(completed(waiting, drawing, usage, now))
                waiting, num_partial = None, 0
            if isinstance(event, Picture):
                waiting = event
            elif isinstance(event, Step):
                steps = event.steps
                if event.preview:
                    await exchange.send_named_event(partial(event, num_partial, drawing, now))
                    num_partial += 1
        exchange.end_events("")

    async def _events(
        self, engine: EngineClient, streams: list[Stream]
    ) -> AsyncIterator[Event | None]:
        """What the stream says, the completion last; None after a silence."""
        lines = ImageLines()
        async for said in self._specialists.texts(engine, streams):
            if isinstance(said, str):
                for event in lines.read(said):
                    yield event
            else:
                yield said
