"""Free drafts by prompt lookup: what followed the last few tokens before. Engine thread only.

A draft is checked in the same decode as the newest token. It pays when enough of it is accepted: a
step with k guesses costs 1 + r k of a plain one, where r is the cost of one more token relative to
a step; it yields 1 + p + p^2 + … + p^k tokens, where p is the acceptance rate. A `Payoff` tracks p
for one request and one way of drafting, and stops drafting where it does not pay. Prompt lookup: A.
Saxena, "Prompt Lookup Decoding", 2023.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

__all__ = ["Payoff", "PromptLookup"]

NGRAM, MIN_NGRAM = 5, 2
MAX_INDEXED = 2048  # tokens per call: a millisecond or two
MAX_DRAFT = 24
FIRST_ACCEPTANCE = 0.85
SMOOTHING = 0.2
PROBE_TOKENS = 3
PAUSE, MAX_PAUSE = 32, 512  # tokens before a request that stopped drafting tries again


class Payoff:
    """How many tokens to draft for one request, from its acceptance rate so far.

    >>> Payoff().size(at=100, most=3, token_cost=0.1)
    3
    >>> Payoff().size(at=100, most=3, token_cost=2.0)
    0
    """

    __slots__ = ("_acceptance", "_next_try", "_pause")

    def __init__(self) -> None:
        self._acceptance = FIRST_ACCEPTANCE
        self._next_try = 0
        self._pause = PAUSE

    def may_try(self, at: int) -> bool:
        """Whether a request that is ``at`` tokens long may draft now."""
        return at >= self._next_try

    def size(self, at: int, most: int, token_cost: float) -> int:
        """How many tokens to draft, at most ``most``; ``token_cost`` is r above."""
        if most <= 0 or at < self._next_try:
            return 0
        size = self._best_size(min(most, MAX_DRAFT), token_cost)
        if size:
            self._next_try = 0
            return size
        if not self._next_try:
            self._next_try = at + self._pause
            return 0
        # Probe again now and then, ever more rarely while it does not pay.
        self._pause = min(2 * self._pause, MAX_PAUSE)
        self._next_try = at + self._pause
        return min(PROBE_TOKENS, most)

    def _best_size(self, most: int, token_cost: float) -> int:
        best, best_rate = 0, 1.0
        expected, power = 1.0, 1.0
        for size in range(1, most + 1):
            power *= self._acceptance
            expected += power
            rate = expected / (1 + token_cost * size)
            if rate > best_rate * 1.02:
                best, best_rate = size, rate
        return best

    def learn(self, num_drafted: int, num_accepted: int) -> None:
        """Update the acceptance rate with the outcome of a draft."""
        for i in range(min(num_accepted + 1, num_drafted)):
            self._acceptance += SMOOTHING * ((i < num_accepted) - self._acceptance)


class PromptLookup:
    """The drafts of one request.

    >>> lookup = PromptLookup()
    >>> lookup.propose([1, 2, 3, 4, 5, 6, 7, 1, 2, 3, 4], most=3, token_cost=0.1)
    [5, 6, 7]
    """

    __slots__ = ("_ends", "_indexed", "payoff")

    def __init__(self) -> None:
        self._ends: dict[tuple[int, ...], int] = {}  # n-gram -> end of its latest occurrence
        self._indexed = 0
        self.payoff = Payoff()

    def propose(self, tokens: Sequence[int], most: int, token_cost: float) -> list[int]:
        """At most ``most`` tokens that may follow ``tokens``. ``token_cost`` is r above."""
        if most <= 0 or not self.payoff.may_try(len(tokens)):
            return []
        end = self._find(tokens)
        if end is None:
            return []
        size = self.payoff.size(len(tokens), most, token_cost)
        guess = list(tokens[end : end + size])
        period = len(tokens) - end
        while len(guess) < size:  # a repetition at the very end continues
            guess.append(guess[len(guess) - period])
        return list(takewhile(lambda token: token >= 0, guess))  # text alone, no cells of images

    def index(self, tokens: Sequence[int], upto: int) -> None:
        """Index n-grams of the first ``upto`` tokens, a bounded number per call: called during
        prefill, it is done by the first token."""
        upto = min(upto, self._indexed + MAX_INDEXED)
        for end in range(max(self._indexed, MIN_NGRAM), upto):
            if tokens[end - 1] < 0:  # within an image
                continue
            for size in range(MIN_NGRAM, min(NGRAM, end) + 1):
                self._ends[tuple(tokens[end - size : end])] = end
        self._indexed = max(self._indexed, upto)

    def _find(self, tokens: Sequence[int]) -> int | None:
        """Where the longest known suffix of ``tokens`` occurred before. Indexes what is new, except
        the n-grams at the very end."""
        n = len(tokens)
        self.index(tokens, n)
        for size in range(min(NGRAM, n), MIN_NGRAM - 1, -1):
            position = self._ends.get(tuple(tokens[n - size :]))
            if position is not None:
                return position
        return None
