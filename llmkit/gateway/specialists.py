"""Engines that hear, speak or draw: the one for a request, or what to load and to install. Tornado
loop only. Knows no dialect."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Literal

from llmkit.diffusion.extra import INSTALL as IMAGES
from llmkit.errors import EngineGoneError, InvalidRequestError, ModelNotFoundError
from llmkit.gateway.directory import DEFAULT, EngineDirectory
from llmkit.gateway.exchange import Exchange
from llmkit.gateway.streams import merge, submit_all
from llmkit.protocol import Completion, GenerationRequest
from llmkit.protocol.client import EngineClient
from llmkit.protocol.stream import Stream
from llmkit.speech.extra import INSTALL as SPEECH

__all__ = ["Specialists"]


@dataclass(frozen=True, slots=True)
class _Kind:
    """What such models do, how one is loaded, and what that needs."""

    does: str
    how: str
    install: str


KINDS = {
    "hear": _Kind(
        "transcribe speech",
        'llmkit serve whisper-tiny.en, or llmkit.load("whisper-tiny.en")',
        SPEECH,
    ),
    "speak": _Kind("speak", 'llmkit serve hibari, or llmkit.load("hibari")', SPEECH),
    "draw": _Kind(
        "draw images",
        'llmkit serve model.safetensors, or llmkit.load("model.safetensors"), with a file of '
        "Stable Diffusion or FLUX",
        IMAGES,
    ),
}


class Specialists:
    """Those of a directory."""

    def __init__(
        self, directory: EngineDirectory, on_use: Callable[[EngineClient], None] = lambda _: None
    ) -> None:
        self._directory, self._on_use = directory, on_use

    def engine(self, model: str, use: Literal["hear", "speak", "draw"]) -> EngineClient:
        """The engine. Raises `ModelNotFoundError`, which says what to load, and what to install,
        and `InvalidRequestError` for a model of another use."""
        kind = KINDS[use]
        able = [e.client for e in self._directory.entries() if e.client.description.use == use]
        try:
            found = self._directory.lookup(model, use)
        except (ModelNotFoundError, EngineGoneError) as error:
            if able or (model != DEFAULT and isinstance(error, EngineGoneError)):
                raise
            raise ModelNotFoundError(_none(kind)) from error
        if found.description.use != use:
            if model == DEFAULT and able:
                return able[0]
            if model == DEFAULT:
                raise ModelNotFoundError(_none(kind))
            raise InvalidRequestError(
                f"{found.description.name!r} cannot {kind.does}. "
                + (
                    f"{able[0].description.name!r} can."
                    if able
                    else f"Load one that can: {kind.how}; its packages come with {kind.install}."
                ),
                "model",
            )
        return found

    def submit(
        self, exchange: Exchange, engine: EngineClient, request: GenerationRequest
    ) -> list[Stream]:
        """Submit a request of the exchange's caller."""
        self._on_use(engine)
        return submit_all(engine, exchange.owned(engine, [request]))

    async def texts(
        self, engine: EngineClient, streams: list[Stream]
    ) -> AsyncIterator[str | Completion | None]:
        """What a stream says, the completion last; None after a silence."""
        async for update in merge(streams):
            self._on_use(engine)
            if update is None:
                yield None
                continue
            _, deltas, completion = update
            if deltas:
                yield "".join(delta.text for delta in deltas)
            if completion is not None:
                yield completion


def _none(kind: _Kind) -> str:
    return (
        f"No model here can {kind.does}. Load one: {kind.how}; its packages come with "
        f"{kind.install}."
    )
