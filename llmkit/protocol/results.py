"""Results: deltas, completions, embeddings. Standard library only."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import StrEnum

__all__ = [
    "Completion",
    "Delta",
    "Embeddings",
    "FinishReason",
    "RequestMetrics",
    "TokenLogprob",
    "Usage",
]


class FinishReason(StrEnum):
    """Why a request ended."""

    STOP = "stop"
    LENGTH = "length"
    TOOL_CALLS = "tool_calls"
    ABORT = "abort"
    ERROR = "error"
    REPETITION = "repetition"


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of one request.

    ``cached_tokens`` of the prompt came from a cached prefix; ``reasoning_tokens`` of the
    completion were reasoning (counted when an answer is read as chat); ``image_tokens`` and
    ``audio_tokens`` of the prompt stand for images and sounds.
    """

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    reasoning_tokens: int = 0
    image_tokens: int = 0
    audio_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True)
class RequestMetrics:
    """Times of one request in seconds, measured in the engine.

    ``ttft_s`` runs from arrival to the first token, ``queue_s`` of it spent waiting; ``decode_s``
    from the first to the last token; ``max_itl_s`` is the longest gap between two tokens. Counts
    are in tokens: of the prompt, of it from the cache, generated, drafted, and accepted drafts. Of
    a resumed answer they tell the last part alone.

    >>> RequestMetrics(decode_s=2.0, completion_tokens=5).tpot_s
    0.5
    """

    queue_s: float = 0.0
    ttft_s: float = 0.0
    decode_s: float = 0.0
    max_itl_s: float = 0.0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0

    @property
    def tpot_s(self) -> float:
        """Mean time per output token after the first (nan below two tokens)."""
        n = self.completion_tokens - 1
        return self.decode_s / n if n > 0 else math.nan


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token, its bytes, its natural log-probability, and the likeliest tokens in its place.

    Log-probabilities are the model's, before temperature and penalties; None for the first token
    of a prompt, which has nothing before it.
    """

    token: int
    piece: bytes
    logprob: float | None
    top: tuple[tuple[int, bytes, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Delta:
    """New text of one stream, its number of tokens, and their log-probabilities if requested.

    ``tokens``, for requests with ``show_tokens``: the ids of those tokens, also where their text is
    still held back. Without any, though ``num_tokens`` is not 0, the request cannot be resumed from
    here on (see `Resume`).
    """

    text: str
    num_tokens: int
    logprobs: tuple[TokenLogprob, ...] = ()
    tokens: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Completion:
    """One finished generation: text, why it ended, token counts and times.

    ``tokens`` holds the generated token ids (without the end-of-generation token), ``logprobs``
    one entry for each if requested, ``prompt_logprobs`` one for each token of the prompt.
    """

    text: str
    finish_reason: FinishReason
    usage: Usage = Usage()
    metrics: RequestMetrics = field(default=RequestMetrics(), compare=False)
    tokens: tuple[int, ...] = ()
    request_id: str = field(default="", compare=False)
    error: str | None = None
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    stop: str | None = None  # the stop string that ended it
    reasoning: str = ""  # in chat: the model's reasoning, kept apart from ``text``

    @property
    def is_cut(self) -> bool:
        """Whether it was cut short by length, repetition or an abort."""
        return self.finish_reason in (
            FinishReason.LENGTH,
            FinishReason.REPETITION,
            FinishReason.ABORT,
        )

    @property
    def decode_tok_s(self) -> float:
        """Generated tokens per second after the first (NaN below two tokens)."""
        n = self.usage.completion_tokens - 1
        return n / self.metrics.decode_s if n > 0 and self.metrics.decode_s > 0 else math.nan

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        u = self.usage
        return (
            f"Completion({self.text!r}, finish_reason={self.finish_reason.value!r}, "
            f"prompt_tokens={u.prompt_tokens}, completion_tokens={u.completion_tokens})"
        )


@dataclass(frozen=True, slots=True)
class Embeddings:
    """Vectors as consecutive little-endian float32, ``size`` numbers each.

    ``num_tokens`` holds the token count of each text.
    """

    data: bytes
    size: int
    num_tokens: tuple[int, ...]
