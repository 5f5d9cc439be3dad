"""Which tokens are drafted for the running streams. Engine thread only."""

from __future__ import annotations

from llmkit.engine.budget import StepClock
from llmkit.engine.drafter import ModelDrafter
from llmkit.engine.request import Request, slot_of

__all__ = ["Speculation"]

# Tokens a draft model may compute to catch up with a stream, per token that may still come.
MAX_CATCH_UP = 4


class Speculation:
    """Drafts what a grammar forces, else by lookup, else by a draft model; and counts what was
    accepted."""

    def __init__(self, clock: StepClock, n_ctx: int, drafter: ModelDrafter | None) -> None:
        self._clock = clock
        self._n_ctx = n_ctx
        self._drafter = drafter
        self.num_drafts = self.num_drafted = self.num_accepted = 0

    def guess(self, decoding: list[Request], most: int) -> dict[int, list[int]]:
        """At most ``most`` tokens that may come next in each stream, by slot."""
        drafts: dict[int, list[int]] = {}
        wanted: list[tuple[int, list[int], int]] = []
        if most <= 0:
            return drafts
        cost = self._clock.draft_cost(len(decoding))
        for request in decoding:
            slot = slot_of(request)
            limit = min(
                most,
                request.max_tokens - request.num_output_tokens - 1,
                self._n_ctx - len(request.tokens) - 1,
            )
            request.guessed_by = None
            if limit <= 0:
                continue
            if request.forced:
                drafts[slot] = list(request.forced[:limit])
            elif request.lookup is not None:
                request.guessed_by = request.lookup.payoff
                drafts[slot] = request.lookup.propose(request.tokens, limit, cost)
                left = request.max_tokens - request.num_output_tokens
                if (
                    self._drafter is not None
                    and not drafts[slot]
                    and not request.media  # which the draft model cannot see
                    and self._drafter.missing(slot, request.tokens) <= MAX_CATCH_UP * left
                ):
                    request.guessed_by = request.draft_payoff
                    own_cost = self._drafter.step_s / self._clock.decode_s(len(decoding))
                    size = request.draft_payoff.size(len(request.tokens), limit, cost + own_cost)
                    if size:
                        wanted.append((slot, request.tokens, size))
        if wanted and self._drafter is not None:
            drafts.update(self._drafter.propose(wanted))
        return drafts

    def learn(self, request: Request, num_drafted: int, num_accepted: int) -> None:
        """Record how many of a request's drafted tokens were accepted."""
        request.num_drafted += num_drafted
        request.num_accepted += num_accepted
        self.num_drafts += 1
        self.num_drafted += num_drafted
        self.num_accepted += num_accepted
        if request.guessed_by is not None:
            request.guessed_by.learn(num_drafted, num_accepted)
