"""Sound at another rate, block by block, in constant memory. Pure."""

from __future__ import annotations

import math

import numpy as np

__all__ = ["Resampler"]

ZEROS = 16  # crossings of the sinc on each side: more is sharper and slower
MAX_PHASES = 1024  # the usual rates need fewer; of others the nearest is taken
AT_ONCE = 1 << 14  # samples made in one go


class Resampler:
    """Mono float32 from one rate to another by windowed sincs, one for each phase.

    >>> to_16k = Resampler(8000, 16000)
    >>> sum(map(len, (to_16k.push(np.zeros(5000, np.float32)), to_16k.end())))
    10000
    """

    def __init__(self, source: int, target: int) -> None:
        common = math.gcd(source, target)
        self._up, self._down = target // common, source // common
        self._phases = min(self._up, MAX_PHASES)
        widest = max(1.0, source / target)  # of the filter, where it also cuts what would alias
        half = math.ceil(ZEROS * widest)
        self._taps = 2 * half + 1
        shift = np.arange(self._phases + 1) / self._phases
        at = np.arange(-half, half + 1)[None, :] - shift[:, None]
        window = np.cos(np.clip(at / (half + 1), -1, 1) * math.pi / 2) ** 2
        filters = np.sinc(at / widest) * window
        self._filters = (filters / filters.sum(axis=1, keepdims=True)).astype(np.float32)
        self._rest = np.zeros(half, np.float32)
        self._half, self._read, self._written, self._dropped = half, 0, 0, 0

    def push(self, samples: np.ndarray) -> np.ndarray:
        """What is certain once these have come."""
        self._read += len(samples)
        return self._take(samples)

    def end(self) -> np.ndarray:
        """What is left."""
        total = -(-self._read * self._up // self._down)
        left = total - self._written
        return self._take(np.zeros(self._half + 1, np.float32))[:left]

    def _take(self, samples: np.ndarray) -> np.ndarray:
        """As many samples as there are whole windows for."""
        sound = np.concatenate([self._rest, samples.astype(np.float32, copy=False)])
        last = self._dropped + len(sound) - self._taps  # where the last window begins
        end = max(self._written, (last + 1) * self._up // self._down + 1)
        while end > self._written and (end - 1) * self._down // self._up > last:
            end -= 1
        made = np.empty(end - self._written, np.float32)
        if len(made):
            windows = np.lib.stride_tricks.sliding_window_view(sound, self._taps)
            for first in range(self._written, end, AT_ONCE):
                at = np.arange(first, min(end, first + AT_ONCE)) * self._down
                begins = at // self._up - self._dropped
                phases = (at % self._up * self._phases + self._up // 2) // self._up
                part = np.einsum("ij,ij->i", windows[begins], self._filters[phases])
                made[first - self._written :][: len(part)] = part
        self._written = end
        begin = end * self._down // self._up  # of the next window
        drop = min(max(0, begin - self._dropped), len(sound))
        self._rest, self._dropped = sound[drop:], self._dropped + drop
        return made
