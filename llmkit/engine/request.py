"""One sequence as the scheduler sees it. Engine thread only."""

from __future__ import annotations

import time

from llmkit.engine.detokenize import Detokenizer
from llmkit.stream import Channel
from llmkit.types import Completion, Delta, FinishReason, RequestMetrics, SamplingParams, Usage

__all__ = ["Request"]


class Request:
    """A request between submission and completion.

    ``num_computed_tokens`` chases ``len(tokens)`` (prompt + output): the difference is what the next steps must compute, be it a long
    prompt, a rest after a prefix hit, or one new token.
    """

    __slots__ = (
        "arrived_at",
        "channel",
        "detokenizer",
        "error",
        "finish_reason",
        "first_token_at",
        "last_token_at",
        "max_itl_s",
        "max_tokens",
        "num_cached_tokens",
        "num_computed_tokens",
        "num_prompt_tokens",
        "num_unsent_tokens",
        "request_id",
        "sampling",
        "slot",
        "started_at",
        "tokens",
        "unsent",
    )

    def __init__(self, prompt: list[int], sampling: SamplingParams, max_tokens: int, detokenizer: Detokenizer, channel: Channel) -> None:
        self.request_id = channel.request_id
        self.channel = channel
        self.sampling = sampling
        self.max_tokens = max_tokens
        self.detokenizer = detokenizer
        self.tokens = list(prompt)
        self.num_prompt_tokens = len(prompt)
        self.num_computed_tokens = 0
        self.num_cached_tokens = 0
        self.finish_reason: FinishReason | None = None
        self.error: str | None = None  # why it alone failed
        self.slot: int | None = None
        self.arrived_at = time.perf_counter()
        self.started_at: float | None = None
        self.first_token_at: float | None = None
        self.last_token_at: float | None = None
        self.max_itl_s = 0.0
        self.unsent: list[str] = []
        self.num_unsent_tokens = 0

    @property
    def num_uncomputed_tokens(self) -> int:
        return len(self.tokens) - self.num_computed_tokens

    @property
    def num_output_tokens(self) -> int:
        return len(self.tokens) - self.num_prompt_tokens

    @property
    def is_prefill(self) -> bool:
        """More than the newest token is missing."""
        return self.num_uncomputed_tokens > 1 or self.num_output_tokens == 0

    def start(self, slot: int, num_cached_tokens: int) -> None:
        self.slot = slot
        self.num_computed_tokens = self.num_cached_tokens = num_cached_tokens
        self.started_at = time.perf_counter()

    def append(self, token: int, now: float) -> None:
        """A sampled token, and its text."""
        self.tokens.append(token)
        if self.last_token_at is None:
            self.first_token_at = now
        else:
            self.max_itl_s = max(self.max_itl_s, now - self.last_token_at)
        self.last_token_at = now
        self.num_unsent_tokens += 1
        text = self.detokenizer.push(token)
        if text:
            self.unsent.append(text)

    def finish(self, reason: FinishReason) -> None:
        self.finish_reason = reason
        text = self.detokenizer.flush()
        if text:
            self.unsent.append(text)

    def publish(self, failure: Exception | None = None) -> None:
        """Store new text, and the end, for the reader; once a step. ``failure`` counts for a request that is finished."""
        if self.unsent or self.num_unsent_tokens:
            self.channel.push(Delta("".join(self.unsent), self.num_unsent_tokens))
            self.unsent, self.num_unsent_tokens = [], 0
        if self.finish_reason is not None:
            self.channel.finish(self._completion(str(failure) if failure else None), failure)

    def _completion(self, error: str | None) -> Completion:
        assert self.finish_reason is not None
        start = self.started_at or time.perf_counter()
        first = self.first_token_at or start
        return Completion(
            text="".join(self.channel.text_parts),
            finish_reason=self.finish_reason,
            usage=Usage(self.num_prompt_tokens, self.num_output_tokens, self.num_cached_tokens),
            metrics=RequestMetrics(
                queue_s=start - self.arrived_at,
                ttft_s=first - self.arrived_at,
                decode_s=(self.last_token_at or first) - first,
                max_itl_s=self.max_itl_s,
            ),
            tokens=tuple(self.tokens[self.num_prompt_tokens :]),
            request_id=self.request_id,
            error=error,
        )
