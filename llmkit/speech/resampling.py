"""Sound at another rate, block by block, in constant memory. Pure."""

from __future__ import annotations

import math

import numpy as np

__all__ = ["Resampler"]

ZEROS = 16  # crossings of the sinc on each side: more is sharper and slower


class Resampler:
    """Mono float32 from one rate to another by windowed sincs, one for each phase.

    >>> to_16k = Resampler(8000, 16000)
    >>> sum(map(len, (to_16k.push(np.zeros(5000, np.float32)), to_16k.end())))
    10000
    """

    def __init__(self, source: int, target: int) -> None:
        common = math.gcd(source, target)
        self._up, self._down = target // common, source // common
        widest = max(1.0, source / target)  # of the filter, where it also cuts what would alias
        half = math.ceil(ZEROS * widest)
        self._taps = 2 * half + 1
        phases = np.arange(self._up)
        self._offsets = phases * self._down // self._up
        shift = phases * self._down / self._up - self._offsets
        at = np.arange(-half, half + 1)[None, :] - shift[:, None]
        window = np.cos(np.clip(at / (half + 1), -1, 1) * math.pi / 2) ** 2
        filters = np.sinc(at / widest) * window
        self._filters = (filters / filters.sum(axis=1, keepdims=True)).astype(np.float32)
        self._rest = np.zeros(half, np.float32)
        self._half, self._read, self._written = half, 0, 0

    def push(self, samples: np.ndarray) -> np.ndarray:
        """What is certain once these have come."""
        self._read += len(samples)
        return self._take(samples)

    def end(self) -> np.ndarray:
        """What is left."""
        total = -(-self._read * self._up // self._down)
        left = total - self._written
        rest = self._take(np.zeros(self._half + 2 * self._down, np.float32))
        self._written = total
        return rest[:left]

    def _take(self, samples: np.ndarray) -> np.ndarray:
        """As many whole rounds of all phases as there are samples for."""
        sound = np.concatenate([self._rest, samples.astype(np.float32, copy=False)])
        rounds = (len(sound) - self._taps + 1) // self._down
        if rounds <= 0:
            self._rest = sound
            return np.zeros(0, np.float32)
        made = np.empty((rounds, self._up), np.float32)
        windows = np.lib.stride_tricks.sliding_window_view(sound, self._taps)
        end = rounds * self._down
        for phase, offset in enumerate(self._offsets):
            made[:, phase] = windows[offset : end : self._down] @ self._filters[phase]
        self._rest = sound[end:]
        self._written += made.size
        return made.ravel()
