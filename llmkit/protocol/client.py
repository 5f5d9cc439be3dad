"""The seam above the engine: all that llmkit's front ends may ask of a model, wherever it lives."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Protocol, TypeVar

from llmkit.protocol import (
    EmbeddingRequest,
    Embeddings,
    EngineState,
    EngineStats,
    GenerationRequest,
    Inquiry,
    ModelDescription,
    Origin,
)
from llmkit.protocol.stream import Stream

__all__ = ["EngineClient"]

Answer = TypeVar("Answer")


class EngineClient(Protocol):
    """A loaded model: `LocalEngine` in this process, `BridgeClient` in another.

    All methods are thread-safe and do not block on the engine.
    """

    @property
    def description(self) -> ModelDescription:
        """Name, sizes and limits of the model."""
        ...

    @property
    def state(self) -> EngineState:
        """Whether it can be used; gone, with the reason, once its engine or process has ended."""
        ...

    @property
    def origin(self) -> Origin:
        """Where the model is."""
        ...

    def submit(self, request: GenerationRequest) -> Stream:
        """Queue a request for one answer.

        Raises `InvalidRequestError` or `ContextLengthError` at once or from the stream, and
        `ModelUnloadedError` or `EngineGoneError` once the engine is gone.
        """
        ...

    def submit_choices(self, request: GenerationRequest) -> list[Stream]:
        """Queue all ``n`` choices of a request, or none. Raises as ``submit`` does."""
        ...

    def embed(self, request: EmbeddingRequest) -> Future[Embeddings]:
        """Embed texts. Raises as ``submit`` does, and for a model that generates text."""
        ...

    def inquire(self, inquiry: Inquiry[Answer]) -> Future[Answer]:
        """Ask about the vocabulary, the chat template or the engine.

        Raises as ``submit`` does; the future may hold an `InvalidRequestError`.
        """
        ...

    def abort(self, request_id: str) -> None:
        """End a request early; unknown ids are ignored."""
        ...

    def stats(self) -> EngineStats:
        """The latest snapshot."""
        ...

    def close(self) -> None:
        """Release the model: a local engine frees its memory, a remote client only disconnects."""
        ...
