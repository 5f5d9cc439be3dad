"""Sound files to samples, by libsndfile. The bytes are a stranger's: nothing in them is believed.

Runs in the process of the model, never on an event loop.
"""

from __future__ import annotations

import importlib
import importlib.util
import io
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np

from llmkit.errors import InvalidRequestError
from llmkit.media.resampling import Resampler

__all__ = ["HIGHEST", "INSTALL", "LOWEST", "MAX_BYTES", "MAX_CHANNELS", "MAX_S", "check", "samples"]

INSTALL = "pip install soundfile"
MAX_BYTES = 25_000_000  # of a file in a message
MAX_S = 600.0
MIN_S = 0.1
LOWEST, HIGHEST = 4_000, 192_000
MAX_CHANNELS = 16
BLOCK = 1 << 16
GROWTH = 1 << 20  # samples
READABLE = "Supported formats: WAV, MP3, FLAC, OGG (Vorbis or Opus), AIFF."
UNKNOWN = f"This is not a sound format llmkit can read. {READABLE}"


def samples(
    data: bytes,
    rate: int,
    max_s: float | None = MAX_S,
    param: str = "messages",
    is_over: Callable[[], bool] = lambda: False,
) -> np.ndarray:
    """Mono float32 at ``rate`` samples a second, shape (n,), from -1 to 1. Once ``is_over`` says
    that nobody waits for them, only those that were read so far.

    Raises `InvalidRequestError` for what is no sound file, or shorter than 0.1 s, or longer than
    ``max_s``: by what is read, whatever the header says. Its message begins with ``param``.
    """
    soundfile = _soundfile(param)
    if not data:
        raise InvalidRequestError(f"{param}: the sound is empty.", param)
    if not _is_readable(data):  # the library knows two dozen more formats, which nobody tested
        raise InvalidRequestError(
            f"{param}: {UNKNOWN} `ffmpeg -i FILE sound.flac` converts others.",
            param,
        )
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            read, channels = int(file.samplerate), int(file.channels)
            if not (LOWEST <= read <= HIGHEST and 1 <= channels <= MAX_CHANNELS):
                raise InvalidRequestError(
                    f"{param}: {channels} channels at {read} Hz; there may be at most "
                    f"{MAX_CHANNELS}, at {LOWEST} to {HIGHEST} Hz.",
                    param,
                )
            return _read(file, read, rate, max_s, param, is_over)
    except soundfile.SoundFileError as error:
        # The whole message names the object that it read from, with its place in memory.
        said = str(getattr(error, "error_string", error)).rstrip(".")
        raise InvalidRequestError(
            f"{param}: it cannot be read as sound ({said:.120}). {READABLE}", param
        ) from error
    except (RuntimeError, ValueError, OSError) as error:
        if isinstance(error, InvalidRequestError):
            raise
        raise InvalidRequestError(f"{param}: it cannot be read: {error!s:.120}.", param) from error


def check(data: bytes) -> None:
    """Whether a message may hold this file, by size and first bytes; nothing is decoded.

    Raises `InvalidRequestError`.
    """
    if len(data) > MAX_BYTES:
        raise InvalidRequestError(
            f"The sound has {len(data) / 1e6:.1f} MB; the limit is {MAX_BYTES // 1_000_000} MB. "
            "Send it as MP3 or Opus.",
            "messages",
        )
    if not _is_readable(data):
        raise InvalidRequestError(UNKNOWN, "messages")


def _is_readable(data: bytes) -> bool:
    wave = data[:4] in (b"RIFF", b"RF64") and data[8:12] == b"WAVE"
    aiff = data[:4] == b"FORM" and data[8:12] in (b"AIFF", b"AIFC")
    mpeg = data[:3] == b"ID3" or (data[:1] == b"\xff" and data[1:2] >= b"\xe0")
    return wave or aiff or mpeg or data[:4] in (b"fLaC", b"OggS")


def _soundfile(param: str) -> ModuleType:
    try:
        return importlib.import_module("soundfile")
    except (ImportError, OSError) as error:  # OSError: its own library cannot be loaded
        raise InvalidRequestError(
            f"{param}: sound cannot be read here ({error}): the package soundfile is needed "
            f"where the model is. Install it with: {INSTALL}",
            param,
        ) from error


def _read(
    file: Any,
    source: int,
    target: int,
    max_s: float | None,
    param: str,
    is_over: Callable[[], bool],
) -> np.ndarray:
    resampler = None if source == target else Resampler(source, target)
    weights = np.full(file.channels, 1 / file.channels, np.float32)
    sound, num_read = _Growing(), 0
    while len(block := file.read(BLOCK, dtype="float32", always_2d=True)):
        if is_over():
            return sound.end()
        num_read += len(block)
        if max_s is not None and num_read > max_s * source:
            raise InvalidRequestError(
                f"{param}: it lasts longer than {max_s / 60:g} minutes, the most that is accepted "
                "here. Send it in parts.",
                param,
            )
        np.nan_to_num(block, copy=False, nan=0.0, posinf=0.0, neginf=0.0)
        mono = block @ weights
        np.clip(mono, -1.0, 1.0, out=mono)
        sound.add(mono if resampler is None else resampler.push(mono))
    if num_read < MIN_S * source:
        raise InvalidRequestError(
            f"{param}: it lasts {num_read / source:.3f} s; at least {MIN_S:g} s are needed.", param
        )
    if resampler is not None:
        sound.add(resampler.end())
    return sound.end()


class _Growing:
    """Samples in an array that grows in place: to join parts at the end takes twice the memory."""

    def __init__(self) -> None:
        self._samples, self._length = np.empty(GROWTH, np.float32), 0

    def add(self, samples: np.ndarray) -> None:
        end = self._length + len(samples)
        if end > len(self._samples):
            self._samples.resize(-(-end // GROWTH) * GROWTH, refcheck=False)
        self._samples[self._length : end] = samples
        self._length = end

    def end(self) -> np.ndarray:
        self._samples.resize(self._length, refcheck=False)
        return self._samples
