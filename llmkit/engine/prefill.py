"""How a step's prompt tokens are divided among prompts. Engine thread only."""

from __future__ import annotations

from llmkit.engine.request import Request

__all__ = ["ALIGNMENT", "PrefillPlanner"]

# Prompt log-probabilities need a row of logits per token: small chunks bound their memory.
MAX_SCORED_TOKENS = 64
# Chunks of a deterministic engine start and end at multiples of this.
ALIGNMENT = 64
# This many tiles into a prompt, attention dominates the work.
FAR_TILES = 8


class PrefillPlanner:
    """Cuts prompts into chunks. ``tile``: multiples of it are efficient chunk sizes;
    ``deterministic``: chunk boundaries depend on the prompt alone."""

    def __init__(self, tile: int, deterministic: bool) -> None:
        self._tile = tile
        self._deterministic = deterministic
        self._short_first = False
        self._owed = 0  # tokens by which whole images went beyond the budgets of their steps

    def plan(
        self, prefilling: list[Request], room: int, budget: int, most: int
    ) -> list[tuple[Request, int]]:
        """How many tokens of which prompts: about ``budget`` in total, at most ``room``.

        In order of priority, then arrival; but a much shorter prompt need not wait behind the
        first: every other step serves such ones first. An image that must be computed whole may
        take up to ``most`` tokens if nothing else of a prompt is planned: it has a decode to
        itself. The next one waits for as many steps as that was budgets too much.
        """
        granted = max(budget, self._least(prefilling))
        self._owed = max(0, self._owed - granted)
        budget = min(room, granted)
        order = sorted(prefilling, key=lambda r: r.priority)
        if not order:
            return []
        remaining = order[0].num_uncomputed_tokens
        short = sorted(
            (r for r in order[1:] if 2 * r.num_uncomputed_tokens <= remaining),
            key=lambda r: r.num_uncomputed_tokens,
        )
        self._short_first = bool(short) and not self._short_first
        if self._short_first:
            order = short + [r for r in order if r not in short]
        planned: list[tuple[Request, int]] = []
        for request in order:
            item = request.item
            if item is not None and item.whole:
                limit = budget if planned or self._owed else most
                size = item.n_tokens if item.n_tokens <= limit else 0
                self._owed += max(0, size - granted)
            else:
                size = self._size(request, budget, alone=not planned)
            if size > 0:
                planned.append((request, size))
                budget -= size
        return planned

    def _least(self, prefilling: list[Request]) -> int:
        """The smallest efficient chunk: one tile, or two far into a prompt, where attention
        dominates; plus a token that rides with the decodes."""
        if self._tile == 1 or not prefilling:
            return 0
        return (
            2 if max(r.num_computed_tokens for r in prefilling) >= FAR_TILES * self._tile else 1
        ) * self._tile + 1

    def _size(self, request: Request, limit: int, alone: bool) -> int:
        """Tokens of a prompt for this step, at most ``limit``: its rest (up to the next image, or
        the end of one) or whole tiles, less only where it would run ``alone``."""
        rest = request.num_alike
        size = min(rest, limit)
        if size < rest:
            if size > self._tile:
                size -= (size - 1) % self._tile
                if (
                    self._tile > 1
                    and alone
                    and request.num_computed_tokens == request.num_cached_tokens
                ):
                    # The partial chunk comes first, where attention is cheapest.
                    size = rest % size or size
            elif self._tile > 1 and not alone:
                return 0
        if request.scores_prompt:
            size = min(size, MAX_SCORED_TOKENS)
        if self._deterministic:
            # Prompt chunks at fixed positions; generated tokens singly, even after a preemption.
            at = request.num_computed_tokens
            whole = (
                min(ALIGNMENT - at % ALIGNMENT, rest, request.num_prompt_tokens - at)
                if at < request.num_prompt_tokens
                else 1
            )
            size = whole if limit >= whole else 0
        return max(size, 0)
