"""Sound as people have it in Python, samples in an array, to 16 bits. Any thread."""

from __future__ import annotations

from numbers import Real
from typing import Any

import numpy as np

from llmkit.errors import InvalidRequestError
from llmkit.media.sounds import HIGHEST, LOWEST

__all__ = ["check_rate", "floats", "pcm16"]

FULL = 32768  # the loudest of 16 bits
MAX_PEAK = 100.0  # of floats: 40 dB above what they should reach; above, they are no shares


def check_rate(rate: Any, param: str) -> int:
    """Samples a second, also numpy's numbers and whole floats.

    Raises `InvalidRequestError`, which names ``param``.

    >>> check_rate(np.int64(44_100), "rate"), check_rate(16_000.0, "rate")
    (44100, 16000)
    """
    is_number = isinstance(rate, Real) and not isinstance(rate, bool)
    if not is_number or not LOWEST <= rate <= HIGHEST or rate != int(rate):
        raise InvalidRequestError(
            f"{param}: the rate is {rate!r:.20}; it must be a whole number of samples per second, "
            f"from {LOWEST} to {HIGHEST}.",
            param,
        )
    return int(rate)


def floats(samples: np.ndarray, param: str) -> np.ndarray:
    """float32 from -1 to 1, by the range of their type; what Python's own integers hold are 16
    bits. The shape stays.

    Raises `InvalidRequestError`, which names ``param``, for types that hold no sound, and for
    numbers that cannot be meant so.

    >>> floats(np.array([-128, 64], np.int8), "sound").tolist()
    [-1.0, 0.5]
    >>> floats(np.array([0, 192], np.uint8), "sound").tolist()
    [-1.0, 0.5]
    """
    if samples.dtype.kind == "f":
        known = np.nan_to_num(samples, nan=0.0, posinf=1.0, neginf=-1.0)
        if known.size and max(-known.min(), known.max()) > MAX_PEAK:
            raise InvalidRequestError(
                f"{param}: these are floats from {known.min():g} to {known.max():g}, and sound "
                "goes from -1 to 1: give the integers that it was recorded in, or divide by 32768 "
                "if these were 16 bits.",
                param,
            )
        return np.asarray(np.clip(known, -1, 1), np.float32)
    if samples.dtype.kind not in "iu":
        raise InvalidRequestError(
            f"{param}: samples cannot be of type {samples.dtype}; give floats from -1 to 1, or "
            "integers.",
            param,
        )
    if samples.dtype.itemsize == 8:
        if samples.size and max(-int(samples.min()), int(samples.max())) > FULL:
            raise InvalidRequestError(
                f"{param}: these are 64-bit integers above {FULL}: give them the type that they "
                'were recorded in, such as array.astype("int32").',
                param,
            )
        samples = np.clip(samples, -FULL, FULL - 1).astype(np.int16)
    half = 1 << (8 * samples.dtype.itemsize - 1)
    middle = half if samples.dtype.kind == "u" else 0
    return np.asarray((samples.astype(np.float64) - middle) / half, np.float32)


def pcm16(sound: np.ndarray) -> np.ndarray:
    """Floats from -1 to 1 as 16-bit integers; those that were such integers are the same again.

    >>> pcm16(floats(np.array([-32768, -1, 7], np.int16), "sound")).tolist()
    [-32768, -1, 7]
    """
    return np.asarray(np.clip(np.rint(sound * FULL), -FULL, FULL - 1), "<i2")
