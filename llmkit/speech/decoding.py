"""Sound as models of speech hear it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from llmkit.media.sounds import samples

__all__ = ["RATE", "pcm_of"]

RATE = 16_000  # samples a second of what models hear


def pcm_of(
    data: bytes, max_s: float | None = None, is_over: Callable[[], bool] = lambda: False
) -> np.ndarray:
    """The sound file as mono float32 at 16 kHz, or what was read of it before ``is_over``. Raises
    `InvalidRequestError` as `samples` does."""
    return samples(data, RATE, max_s, "file", is_over)
