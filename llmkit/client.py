"""The seam above the engine: what every face of llmkit may ask of a loaded model, wherever it lives."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any, Protocol

from llmkit.stream import Stream
from llmkit.types import EmbeddingRequest, Embeddings, EngineStats, GenerationRequest, Inquiry, ModelDescription

__all__ = ["EngineClient"]


class EngineClient(Protocol):
    """A loaded model: `LocalEngine` in this process, `BridgeClient` in another. All methods are thread-safe and do not block on the engine."""

    @property
    def description(self) -> ModelDescription:
        """Name, sizes and limits of the model."""
        ...

    @property
    def gone(self) -> str | None:
        """Why it cannot be used any more (its engine or its process has ended); None while it works."""
        ...

    def submit(self, request: GenerationRequest) -> Stream:
        """Queue a request for one answer.

        Raises `InvalidRequestError` or `ContextLengthError` at once or from the stream, `ModelUnloadedError` or `EngineGoneError` when there is no
        engine any more.
        """
        ...

    def submit_choices(self, request: GenerationRequest) -> list[Stream]:
        """Queue all ``n`` choices of a request, or none. Raises as ``submit`` does."""
        ...

    def embed(self, request: EmbeddingRequest) -> Future[Embeddings]:
        """Vectors of texts. Raises as ``submit`` does, also for a model that generates text."""
        ...

    def inquire(self, inquiry: Inquiry) -> Future[dict[str, Any]]:
        """Ask the vocabulary or the chat template. Raises as ``submit`` does; the future may hold an `InvalidRequestError`."""
        ...

    def abort(self, request_id: str) -> None:
        """End a request early; unknown ids are ignored."""
        ...

    def stats(self) -> EngineStats:
        """The newest snapshot."""
        ...

    def close(self) -> None:
        """Let go: a local engine frees its memory, a remote one only disconnects."""
        ...
