"""One sequence as the scheduler sees it. Engine thread only."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence

from llmkit.engine.batch import Score
from llmkit.engine.detokenize import Detokenizer
from llmkit.engine.draft import Payoff, PromptLookup
from llmkit.engine.media import Item
from llmkit.engine.repetition import Repetitions
from llmkit.engine.runner import Constraint
from llmkit.protocol import (
    Completion,
    Delta,
    FinishReason,
    RequestMetrics,
    SamplingParams,
    TokenLogprob,
    Usage,
)
from llmkit.protocol.stream import Channel

__all__ = ["Request", "slot_of"]


_serials = itertools.count(1)


class Request:
    """A request from submission to completion.

    ``num_computed_tokens`` chases ``len(tokens)`` (prompt + output, less what a context shift
    discarded): the difference is left for the next steps, be it a long prompt, the rest after a
    prefix hit, or one new token.
    """

    __slots__ = (
        "adapters",
        "arrived_at",
        "cache_salt",
        "caller",
        "channel",
        "constraint",
        "detokenizer",
        "draft_payoff",
        "ended_as",
        "error",
        "finish_reason",
        "first_token_at",
        "forced",
        "guessed_by",
        "is_encoded_ahead",
        "is_late",
        "is_queued",
        "is_refused",
        "is_repeating",
        "is_shifted",
        "keep_on_disk",
        "last_token_at",
        "lookup",
        "max_itl_s",
        "max_tokens",
        "media",
        "num_accepted",
        "num_cached_tokens",
        "num_computed_tokens",
        "num_drafted",
        "num_foreseen",
        "num_prompt_tokens",
        "num_resumed_tokens",
        "num_unsent_tokens",
        "outputs",
        "parked_key",
        "priority",
        "prompt_logprobs",
        "repetitions",
        "request_id",
        "sampler",
        "sampling",
        "serial",
        "shows_tokens",
        "slot",
        "started_at",
        "tokens",
        "unsent",
        "unsent_logprobs",
        "waits_for",
        "weight",
    )

    def __init__(
        self,
        prompt: list[int],
        sampling: SamplingParams,
        max_tokens: int,
        detokenizer: Detokenizer,
        channel: Channel,
        *,
        priority: int = 0,
        caller: str = "",
        weight: float = 1.0,
        cache_salt: str = "",
        keep_on_disk: bool = False,
        constraint: Constraint | None = None,
        sampler: object | None = None,
        adapters: tuple[tuple[str, float], ...] = (),
        show_tokens: bool = False,
        media: tuple[Item, ...] = (),
    ) -> None:
        self.serial = next(_serials)
        self.request_id = channel.request_id
        self.channel = channel
        self.sampling = sampling
        self.max_tokens = max_tokens
        self.detokenizer = detokenizer
        self.tokens = list(prompt)
        self.outputs: list[int] = []
        self.is_shifted = False
        self.num_prompt_tokens = len(prompt)
        self.num_resumed_tokens = 0  # of the output: another engine generated them
        self.ended_as: FinishReason | None = None  # they were all; only the prompt is missing
        self.shows_tokens = show_tokens
        self.num_computed_tokens = 0
        self.num_cached_tokens = 0
        self.num_drafted = self.num_accepted = 0
        self.finish_reason: FinishReason | None = None
        self.error: str | None = None  # why it failed on its own
        self.slot: int | None = None
        self.arrived_at = time.perf_counter()
        self.started_at: float | None = None
        self.first_token_at: float | None = None
        self.last_token_at: float | None = None
        self.max_itl_s = 0.0
        self.priority, self.caller, self.weight = priority, caller, weight
        # What one adapter computed is useless with another.
        self.cache_salt = f"{cache_salt}\0{adapters}" if adapters else cache_salt
        self.adapters = adapters
        self.media = media  # of its prompt, in order
        self.is_encoded_ahead = False  # while it waits
        self.num_foreseen = 0  # tokens that it will probably find cached
        self.constraint = constraint  # the runner's own type
        self.sampler = sampler  # the runner's, if made beforehand; opaque here
        self.is_queued = True  # counts as waiting until it runs for the first time
        self.is_refused = False  # failed for what it requested, not for what we did
        self.is_late = False  # sat out the last step: its grammar was not ready in time
        self.keep_on_disk = keep_on_disk  # save its prompt once computed
        # A running request that computes this many tokens of our prompt.
        self.waits_for: tuple[Request, int] | None = None
        self.lookup = (
            PromptLookup() if sampling.speculate and sampling.prompt_logprobs is None else None
        )
        self.draft_payoff = Payoff()  # of the draft model
        self.guessed_by: Payoff | None = None  # payoff of what drafted for the running step
        self.parked_key: int | None = None  # of the copy parked for it alone
        self.forced: Sequence[int] = ()  # tokens that its grammar forces next
        self.repetitions = (
            Repetitions(sampling.max_repetitions) if sampling.max_repetitions is not None else None
        )
        self.is_repeating = False
        self.prompt_logprobs: list[TokenLogprob] = []
        self.unsent_logprobs: list[TokenLogprob] = []
        self.unsent: list[str] = []
        self.num_unsent_tokens = 0

    @property
    def num_uncomputed_tokens(self) -> int:
        return len(self.tokens) - self.num_computed_tokens

    @property
    def item(self) -> Item | None:
        """What its next tokens are cells of; None if they are text."""
        at = self.num_computed_tokens
        return next((i for i in self.media if i.start <= at < i.end), None)

    @property
    def num_alike(self) -> int:
        """How many of the uncomputed tokens are of one kind: text up to the next item of media, or
        the rest of an item."""
        at = self.num_computed_tokens
        ends = (i.start if at < i.start else i.end for i in self.media if at < i.end)
        return next(ends, len(self.tokens)) - at

    @property
    def offset(self) -> int:
        """See `llmkit.engine.batch`, for its next tokens."""
        at = self.num_computed_tokens
        return sum(i.n_positions - i.n_tokens for i in self.media if i.end <= at)

    @property
    def num_output_tokens(self) -> int:
        return len(self.outputs)

    @property
    def is_prefill(self) -> bool:
        """Whether more than the newest token is missing."""
        return self.num_uncomputed_tokens > 1 or self.num_output_tokens == 0

    @property
    def is_held(self) -> bool:
        """Whether it waits for its grammar rather than the model."""
        return self.is_late and self.constraint is not None and not self.constraint.ready

    @property
    def scores_prompt(self) -> bool:
        """Whether log-probabilities of its prompt are still missing."""
        return (
            self.sampling.prompt_logprobs is not None
            and len(self.prompt_logprobs) < self.num_prompt_tokens
        )

    def start(self, slot: int, num_cached_tokens: int) -> None:
        self.slot = slot
        self.num_computed_tokens = num_cached_tokens
        self.waits_for = None
        if self.started_at is None:  # not after a preemption
            self.num_cached_tokens = min(num_cached_tokens, self.num_prompt_tokens)
            self.started_at = time.perf_counter()
        if self.scores_prompt and not self.prompt_logprobs:
            self.prompt_logprobs.append(
                TokenLogprob(self.tokens[0], self.detokenizer.piece(self.tokens[0]), None)
            )

    def shift(self, keep: int, discard: int) -> None:
        """Continue without ``discard`` tokens after the first ``keep``."""
        del self.tokens[keep : keep + discard]
        self.num_computed_tokens -= discard
        # From here on, the keys and values are not those of a prompt of these tokens: never share.
        self.cache_salt = f"{self.cache_salt}\0shifted {self.serial}"
        self.is_shifted = True
        self.shows_tokens = False  # nobody could go on from them: some are forgotten
        self.draft_payoff = Payoff()  # it counts by length, which has changed
        if self.lookup is not None:
            self.lookup = PromptLookup()

    def preempt(self) -> None:
        """Return to waiting; generated tokens stay."""
        self.slot = None
        self.num_foreseen, self.is_encoded_ahead = self.num_computed_tokens, False
        self.num_computed_tokens = 0
        if self.scores_prompt:
            self.prompt_logprobs.clear()

    def add_prompt_scores(self, start: int, scores: Sequence[Score]) -> None:
        """Add scores of the tokens after position ``start``, replacing any computed before."""
        del self.prompt_logprobs[start + 1 :]
        for i, score in enumerate(scores):
            self.prompt_logprobs.append(self._logprob(self.tokens[start + 1 + i], score))

    def _logprob(self, token: int, score: Score) -> TokenLogprob:
        piece = self.detokenizer.piece
        return TokenLogprob(
            token, piece(token), score.logprob, tuple((t, piece(t), p) for t, p in score.top)
        )

    def append(self, token: int, now: float, score: Score | None = None) -> None:
        """Add a sampled token and its text."""
        self.tokens.append(token)
        self.outputs.append(token)
        if score is not None:
            self.unsent_logprobs.append(self._logprob(token, score))
        if self.last_token_at is None:
            self.first_token_at = now
        else:
            self.max_itl_s = max(self.max_itl_s, now - self.last_token_at)
        self.last_token_at = now
        self.num_unsent_tokens += 1
        if self.repetitions is not None:
            self.is_repeating = self.repetitions.push(token)
        text = self.detokenizer.push(token)
        if text:
            self.unsent.append(text)

    def resume(self) -> None:
        """What was appended so far is another engine's: nothing to report or to time."""
        self.num_resumed_tokens, self.num_unsent_tokens = len(self.outputs), 0
        self.first_token_at = self.last_token_at = None
        self.max_itl_s = 0.0

    def finish(self, reason: FinishReason) -> None:
        self.finish_reason = reason
        text = self.detokenizer.flush()
        if text:
            self.unsent.append(text)

    def publish(self, failure: Exception | None = None) -> None:
        """Store new text, and the end, for the reader; once per step. ``failure`` counts only for a
        finished request."""
        if self.unsent or self.num_unsent_tokens:
            new = self.num_unsent_tokens
            tokens = tuple(self.outputs[-new:]) if self.shows_tokens and new else ()
            self.channel.push(Delta("".join(self.unsent), new, tuple(self.unsent_logprobs), tokens))
            self.unsent, self.num_unsent_tokens, self.unsent_logprobs = [], 0, []
        if self.finish_reason is not None:
            self.channel.finish(self._completion(str(failure) if failure else None), failure)

    def _num_media_tokens(self, kind: str) -> int:
        return sum(i.n_tokens for i in self.media if i.kind == kind)

    def _completion(self, error: str | None) -> Completion:
        assert self.finish_reason is not None
        start = self.started_at or time.perf_counter()
        first = self.first_token_at or start
        return Completion(
            text="".join(self.channel.text_parts),
            finish_reason=self.finish_reason,
            usage=Usage(
                self.num_prompt_tokens,
                self.num_output_tokens,
                self.num_cached_tokens,
                image_tokens=self._num_media_tokens("image"),
                audio_tokens=self._num_media_tokens("audio"),
            ),
            metrics=RequestMetrics(
                queue_s=start - self.arrived_at,
                ttft_s=first - self.arrived_at,
                decode_s=(self.last_token_at or first) - first,
                max_itl_s=self.max_itl_s,
                prompt_tokens=self.num_prompt_tokens,
                cached_tokens=self.num_cached_tokens,
                completion_tokens=self.num_output_tokens - self.num_resumed_tokens,
                draft_tokens=self.num_drafted,
                accepted_tokens=self.num_accepted,
            ),
            tokens=tuple(self.outputs),
            request_id=self.request_id,
            error=error,
            logprobs=tuple(self.channel.logprobs),
            prompt_logprobs=tuple(self.prompt_logprobs),
            stop=self.detokenizer.matched,
        )


def slot_of(request: Request) -> int:
    """The slot of a running request."""
    assert request.slot is not None
    return request.slot
