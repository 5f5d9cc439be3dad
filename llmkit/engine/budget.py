"""How many prompt tokens a step takes beside running streams, to hold an inter-token latency; from
measured step times. Engine thread only."""

from __future__ import annotations

__all__ = ["StepClock"]

# Prompts get at least this much of a step: below it, a step's fixed cost outweighs the gain.
MIN_PREFILL_TOKENS = 16
SMOOTHING = 0.2
DRAFT_FACTOR = 1.3  # a drafted token is a prompt token with logits
FIRST_DECODE_S, FIRST_PREFILL_S = 0.01, 0.002  # until the first steps are measured


class StepClock:
    """Learns what a step costs: ``decode_s(n)`` for n streams, ``prefill_s`` for each further
    token. ``target_s=None`` sets no bound.

    >>> clock = StepClock(0.2)
    >>> step = {"num_streams": 8, "num_decode": 8}
    >>> for _ in range(100): clock.observe(**step, num_prefill=0, seconds=0.04)
    >>> for _ in range(100): clock.observe(**step, num_prefill=64, seconds=0.168)
    >>> clock.prefill_budget(8)
    80
    """

    def __init__(self, target_s: float | None) -> None:
        self.target_s = target_s
        self.prefill_s = FIRST_PREFILL_S
        self._decode: dict[int, float] = {}
        self._draft_s: float | None = None
        self._measured = False

    def observe(
        self, *, num_streams: int, num_decode: int, num_prefill: int, seconds: float
    ) -> None:
        """Record a step: ``num_decode`` tokens of ``num_streams`` decoding streams (more where
        drafts were tried) and ``num_prefill`` prompt tokens."""
        if not num_prefill and num_streams == num_decode:
            if num_streams:
                before = self._decode.get(num_streams, seconds)
                self._decode[num_streams] = before + SMOOTHING * (min(seconds, 4 * before) - before)
            return
        if not num_prefill:
            cost = (seconds - self.decode_s(num_streams)) / (num_decode - num_streams)
            before = self._draft_s or DRAFT_FACTOR * self.prefill_s
            self._draft_s = before + SMOOTHING * (min(max(cost, 0.3 * before), 3 * before) - before)
            return
        if num_prefill < MIN_PREFILL_TOKENS // 2:
            return
        cost = (
            max(seconds - (self.decode_s(num_streams) if num_streams else 0.0), 0.1 * seconds)
            / num_prefill
        )
        if self._measured:
            cost = min(cost, 4 * self.prefill_s)
        self.prefill_s = (
            self.prefill_s + SMOOTHING * (cost - self.prefill_s) if self._measured else cost
        )
        self._measured = True

    def decode_s(self, num_streams: int) -> float:
        """Seconds of a step that decodes one token per stream; estimated from the nearest number of
        streams measured."""
        known = self._decode.get(num_streams)
        if known is not None:
            return known
        if not self._decode:
            return FIRST_DECODE_S
        nearest = min(self._decode, key=lambda n: abs(n - num_streams))
        # One more stream costs at most as much as one more prompt token.
        return max(
            self._decode[nearest] + (num_streams - nearest) * self.prefill_s,
            0.2 * self._decode[nearest],
        )

    @property
    def prompt_token_s(self) -> float:
        """As measured; 0 before the first prompt."""
        return self.prefill_s if self._measured else 0.0

    def step_s(self, num_streams: int) -> float:
        """As measured, with at least one stream; 0 before the first step."""
        return self.decode_s(max(1, num_streams)) if self._decode else 0.0

    def draft_cost(self, num_streams: int) -> float:
        """Cost of one more drafted token, in units of one stream's share of a plain step."""
        cost = self._draft_s or DRAFT_FACTOR * self.prefill_s
        return cost * num_streams / self.decode_s(num_streams)

    def prefill_budget(self, num_streams: int) -> int:
        """Prompt tokens for a step in which ``num_streams`` streams decode."""
        if self.target_s is None:
            return 1 << 30
        return max(
            MIN_PREFILL_TOKENS, round((self.target_s - self.decode_s(num_streams)) / self.prefill_s)
        )
