"""What an HTTP request asked of engines and what came of it, for the stages around its route.

Limits, metrics, traces and logs read it; routes need not know. It follows the request's task, so
`llmkit.gateway.streams` and `llmkit.gateway.vectors` fill it in wherever they are called from.
Tornado loop only.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from llmkit.protocol import (
    Completion,
    EmbeddingRequest,
    GenerationRequest,
    RequestMetrics,
    Usage,
)
from llmkit.protocol.client import EngineClient

if TYPE_CHECKING:
    from llmkit.gateway.access.deadlines import Deadline

__all__ = ["Operation", "Record", "recording"]

Operation = Literal[
    "", "chat", "text_completion", "embeddings", "transcription", "speech", "image_generation"
]
OPERATIONS: dict[str, Operation] = {
    "hear": "transcription",
    "speak": "speech",
    "draw": "image_generation",
}


@dataclass(slots=True)
class Record:
    """One HTTP request; times are `time.monotonic()`, in seconds.

    ``operation`` and ``model`` are empty until an engine is used. ``requests`` were submitted;
    ``completions`` are the answers that have ended, with their `RequestMetrics`. ``status`` is the
    HTTP status of the answer, ``error`` its code; 499 means that the client went away first.
    ``num_unfinished_tokens`` have arrived of answers that have not ended; ``unfinished`` has their
    requests, by the ids of the answers, and ``unfinished_texts`` what is being embedded.
    ``heard_s``: how many seconds the sound of a transcription lasts, once that is known. ``cache``
    says whether the answer was a stored one ("hit"), where one could be. ``deadline`` is when it
    must be over. ``is_displaced``: it was ended to make way for another caller's.
    """

    operation: Operation = ""
    model: str = ""
    engine: EngineClient | None = None
    requests: list[GenerationRequest] = field(default_factory=list)
    completions: list[Completion] = field(default_factory=list)
    num_embedded_tokens: int = 0
    num_unfinished_tokens: int = 0
    unfinished: dict[str, GenerationRequest] = field(default_factory=dict)
    unfinished_texts: tuple[str | tuple[int, ...], ...] = ()
    heard_s: float = 0.0
    started_at: float = field(default_factory=time.monotonic)
    submitted_at: float | None = None
    first_token_at: float | None = None
    status: int = 0
    error: str = ""
    request_id: str = ""
    cache: Literal["", "hit", "miss"] = ""
    deadline: Deadline | None = None
    is_displaced: bool = False

    @property
    def usage(self) -> Usage:
        """Tokens of all answers together; a prompt shared by several choices counts once each."""
        usages = [c.usage for c in self.completions]
        return Usage(
            sum(u.prompt_tokens for u in usages) + self.num_embedded_tokens,
            sum(u.completion_tokens for u in usages),
            sum(u.cached_tokens for u in usages),
            sum(u.reasoning_tokens for u in usages),
        )

    @property
    def metrics(self) -> list[RequestMetrics]:
        """Times of each answer, measured in the engine."""
        return [c.metrics for c in self.completions]

    def begin(
        self, engine: EngineClient, requests: list[GenerationRequest], answers: Iterable[str] = ()
    ) -> None:
        """Requests were submitted to an engine; ``answers`` are the ids of all their choices."""
        self._use(engine)
        is_chat = any(r.messages is not None for r in requests)
        self.operation = "chat" if is_chat else "text_completion"
        self.operation = OPERATIONS.get(engine.description.use, self.operation)
        self.requests += requests
        choices = (request for request in requests for _ in range(request.n))
        self.unfinished.update(zip(answers, choices, strict=False))

    def begin_embedding(self, engine: EngineClient, request: EmbeddingRequest) -> None:
        """Texts were submitted to an engine."""
        self._use(engine)
        self.unfinished_texts = request.inputs
        self.operation = "embeddings"

    def _use(self, engine: EngineClient) -> None:
        self.engine, self.model = engine, engine.description.name
        if self.submitted_at is None:
            self.submitted_at = time.monotonic()

    def progress(self, completion: Completion | None, num_tokens: int) -> None:
        """New text arrived, or the end of an answer, whose tokens are then taken back."""
        self.num_unfinished_tokens += num_tokens
        if self.first_token_at is None:
            self.first_token_at = time.monotonic()
        if completion is not None:
            self.completions.append(completion)

    def forget_unfinished(self) -> None:
        """What has not ended was never begun."""
        self.unfinished.clear()
        self.unfinished_texts = ()


_current: ContextVar[Record | None] = ContextVar("record", default=None)


@contextlib.contextmanager
def recording(record: Record) -> Iterator[None]:
    """Within it, engines used by this task are recorded here."""
    token = _current.set(record)
    try:
        yield
    finally:
        _current.reset(token)


def current() -> Record | None:
    """The record of this task's request; None outside one."""
    return _current.get()
