"""How many threads compute: fewer while something else has the cores (a busy cell), all of them otherwise. Engine thread only.

ggml's threads wait for each other at barriers many times a step: with as many threads as cores, one core that is busy elsewhere stalls all of them. The
engine cannot see who else runs, but its step times tell. While steps take about what they always took, nothing is tried. When they take much longer, other
thread counts are tried for a few steps each, and the best one stays; all threads are tried again now and then, since the other load may have gone.
"""

from __future__ import annotations

import time
from collections.abc import Callable

__all__ = ["ThreadGovernor"]

DIRE = 4.0
SLOW = 1.5  # so much longer than usual is suspicious: beside a busy core it is twice as long, and a context that fills makes steps a fifth longer
PATIENCE = 6  # slow steps in a row before something is tried
TRIAL_STEPS = 5
LONG_S = 0.2  # a step that long says enough by itself, and is dear
RETRY_S, MAX_RETRY_S = 0.5, 4.0  # between trials of more threads, while fewer compute
TRIAL_SHARE = 20  # and so many times as long as the trial took
SMOOTHING = 0.2
FORGET = 1.0005  # the usual cost grows by this a step, so that a lucky one does not stay the measure for ever


class ThreadGovernor:
    """Sets the thread count through ``set_threads``, at most ``most``.

    >>> counts = []
    >>> governor = ThreadGovernor(8, counts.append)
    >>> governor.candidates
    [8, 7, 4]
    """

    def __init__(self, most: int, set_threads: Callable[[int], None], clock: Callable[[], float] = time.monotonic) -> None:
        self.candidates = sorted({most, max(1, most - 1), max(1, most // 2)}, reverse=True)
        self.count = most
        self._set_threads = set_threads
        self._clock = clock
        # Cost of a token in a step with all threads when the cores are ours, by the step's size: a large step is cheaper a token than a small one.
        self._usual: dict[int, float] = {}
        self._cost: dict[int, float] = {}  # of each count, in units of the usual, under the load of the moment
        self._slow_steps = 0
        self._trials: list[int] = []
        self._trial_steps = 0
        self._trial_began = 0.0
        self._best = most
        self._retry_s, self._retry_at = RETRY_S, 0.0

    def observe(self, num_tokens: int, seconds: float) -> None:
        """A step of ``num_tokens`` tokens took so long."""
        if len(self.candidates) == 1 or not num_tokens:
            return
        size = num_tokens.bit_length()
        per_token = seconds / (2 + num_tokens)  # a step costs about two tokens more than its tokens
        usual = self._usual.setdefault(size, per_token)
        cost = per_token / usual
        before = self._cost.get(self.count)
        self._cost[self.count] = cost if before is None else before + SMOOTHING * (min(cost, 4 * before) - before)
        if self._trials:
            self._go_on_trying(seconds)
        elif self.count == self.candidates[0]:
            self._watch(size, cost)
        elif self._clock() >= self._retry_at:
            self._try([self.candidates[0]])

    def _watch(self, size: int, cost: float) -> None:
        """All threads compute: is it as quick as usual?"""
        self._usual[size] *= min(cost, FORGET)
        # Threads that wait for one that has no core can make a step forty times as long: then two of them say enough.
        self._slow_steps = self._slow_steps + (1 if cost < DIRE else PATIENCE // 2) if cost > SLOW else max(0, self._slow_steps - 2)
        if self._slow_steps >= PATIENCE:
            self._slow_steps = 0
            self._try(self.candidates[1:])

    def _try(self, counts: list[int]) -> None:
        self._best = self.count
        self._trial_began = self._clock()
        self._trials = list(counts)
        self._begin(self._trials[0])

    def _begin(self, count: int) -> None:
        self._trial_steps = 0
        self._cost.pop(count, None)
        self._switch(count)

    def _go_on_trying(self, seconds: float) -> None:
        self._trial_steps += 1
        hopeless = (self._trial_steps >= 2 or seconds > LONG_S) and self._cost[self.count] > 1.25 * self._cost[self._best]
        if self._trial_steps < TRIAL_STEPS and not hopeless:
            return
        self._trials.pop(0)
        if self._cost[self.count] < 0.95 * self._cost[self._best]:
            self._best = self.count
        if self._trials:
            self._begin(self._trials[0])
            return
        found_more = self._best == self.candidates[0]
        now = self._clock()
        self._retry_s = RETRY_S if found_more else min(2 * self._retry_s, MAX_RETRY_S)
        self._retry_at = now + max(self._retry_s, TRIAL_SHARE * (now - self._trial_began))
        if found_more and self._cost[self._best] > SLOW:  # no count is better: this is what the machine gives now
            self._usual = {size: usual * self._cost[self._best] for size, usual in self._usual.items()}
            self._cost.clear()
        self._switch(self._best)

    def _switch(self, count: int) -> None:
        if count != self.count:
            self.count = count
            self._set_threads(count)
