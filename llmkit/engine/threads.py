"""How many threads compute: fewer while something else uses the cores (a busy cell), all of them
otherwise. Engine thread only.

ggml's threads wait for each other at barriers many times per step: with as many threads as cores,
one core that is busy elsewhere stalls them all. The engine cannot see what else runs, but its step
times tell. While steps take their usual time, nothing is tried. When they take much longer, other
thread counts are tried for a few steps each, and the best one is kept; all threads are retried now
and then, since the other load may be gone.
"""

from __future__ import annotations

import time
from collections.abc import Callable

__all__ = ["ThreadGovernor"]

DIRE = 4.0
# Suspiciously slower than usual: a busy core doubles a step, a filling context adds a fifth.
SLOW = 1.5
PATIENCE = 6  # slow steps in a row before other counts are tried
TRIAL_STEPS = 5
LONG_S = 0.2  # one step this long is evidence enough, and costly
RETRY_S, MAX_RETRY_S = 0.5, 4.0  # between retries of all threads, while fewer compute
TRIAL_SHARE = 20  # and at least this many times as long as the trial took
SMOOTHING = 0.2
# The usual cost grows by this per step, so that one lucky step is not the yardstick for ever.
FORGET = 1.0005


class ThreadGovernor:
    """Sets the thread count through ``set_threads``, at most ``most``.

    >>> counts = []
    >>> governor = ThreadGovernor(8, counts.append)
    >>> governor.candidates
    [8, 7, 4]
    """

    def __init__(
        self,
        most: int,
        set_threads: Callable[[int], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.candidates = sorted({most, max(1, most - 1), max(1, most // 2)}, reverse=True)
        self.count = most
        self._set_threads = set_threads
        self._clock = clock
        # Cost per token with all threads and all cores ours, by step size: large steps are cheaper
        # per token.
        self._usual: dict[int, float] = {}
        # Cost by thread count, in units of the usual, under the current load.
        self._cost: dict[int, float] = {}
        self._slow_steps = 0
        self._trials: list[int] = []
        self._trial_steps = 0
        self._trial_began = 0.0
        self._best = most
        self._retry_s, self._retry_at = RETRY_S, 0.0

    def observe(self, num_tokens: int, seconds: float) -> None:
        """Record a step of ``num_tokens`` tokens."""
        if len(self.candidates) == 1 or not num_tokens:
            return
        size = num_tokens.bit_length()
        per_token = seconds / (2 + num_tokens)  # a step's fixed cost is about two tokens
        usual = self._usual.setdefault(size, per_token)
        cost = per_token / usual
        before = self._cost.get(self.count)
        self._cost[self.count] = (
            cost if before is None else before + SMOOTHING * (min(cost, 4 * before) - before)
        )
        if self._trials:
            self._continue_trial(seconds)
        elif self.count == self.candidates[0]:
            self._watch(size, cost)
        elif self._clock() >= self._retry_at:
            self._try([self.candidates[0]])

    def free(self) -> None:
        """What took cores from it has ended, as its owner knows: all threads at once."""
        if self._trials or self.count != self.candidates[0]:
            self._trials.clear()
            self._cost.clear()
            self._slow_steps, self._best = 0, self.candidates[0]
            self._switch(self._best)

    def _watch(self, size: int, cost: float) -> None:
        """With all threads computing: is a step as fast as usual?"""
        self._usual[size] *= min(cost, FORGET)
        # Threads waiting for one without a core make a step forty times as long: two are enough.
        self._slow_steps = (
            self._slow_steps + (1 if cost < DIRE else PATIENCE // 2)
            if cost > SLOW
            else max(0, self._slow_steps - 2)
        )
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

    def _continue_trial(self, seconds: float) -> None:
        self._trial_steps += 1
        hopeless = (self._trial_steps >= 2 or seconds > LONG_S) and self._cost[
            self.count
        ] > 1.25 * self._cost[self._best]
        if self._trial_steps < TRIAL_STEPS and not hopeless:
            return
        self._trials.pop(0)
        if self._cost[self.count] < 0.95 * self._cost[self._best]:
            self._best = self.count
        if self._trials:
            self._begin(self._trials[0])
            return
        all_are_best = self._best == self.candidates[0]
        now = self._clock()
        self._retry_s = RETRY_S if all_are_best else min(2 * self._retry_s, MAX_RETRY_S)
        self._retry_at = now + max(self._retry_s, TRIAL_SHARE * (now - self._trial_began))
        if all_are_best and self._cost[self._best] > SLOW:
            # No count is better: this is the machine's current speed.
            self._usual = {
                size: usual * self._cost[self._best] for size, usual in self._usual.items()
            }
            self._cost.clear()
        self._switch(self._best)

    def _switch(self, count: int) -> None:
        if count != self.count:
            self.count = count
            self._set_threads(count)
