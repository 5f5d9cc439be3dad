"""Sound files to samples, by libsndfile. The bytes are a stranger's: nothing in them is believed.

Runs in the process of the model, never on an event loop.
"""

from __future__ import annotations

import io

import numpy as np

from llmkit.errors import InvalidRequestError
from llmkit.speech.extra import need
from llmkit.speech.resampling import Resampler

__all__ = ["RATE", "pcm_of"]

RATE = 16_000  # samples a second of what models hear
MIN_S = 0.1
LOWEST, HIGHEST = 4_000, 192_000
MAX_CHANNELS = 16
BLOCK = 1 << 16
READ = "WAV, MP3, FLAC, OGG (Vorbis or Opus), AIFF"


def pcm_of(data: bytes, max_s: float | None = None) -> np.ndarray:
    """Mono float32 at 16 kHz.

    Raises `InvalidRequestError` for what is no sound file, or shorter than 0.1 s, or longer than
    ``max_s``: by what is read, whatever the header says.
    """
    soundfile = need("soundfile")
    if not data:
        raise InvalidRequestError("file: it is empty.", "file")
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            rate, channels = int(file.samplerate), int(file.channels)
            if not (LOWEST <= rate <= HIGHEST and 1 <= channels <= MAX_CHANNELS):
                raise InvalidRequestError(
                    f"file: {channels} channels at {rate} Hz; there may be at most {MAX_CHANNELS}, "
                    f"at {LOWEST} to {HIGHEST} Hz.",
                    "file",
                )
            return _read(file, rate, max_s)
    except soundfile.SoundFileError as error:
        raise InvalidRequestError(
            f"file: it cannot be read as sound ({error!s:.120}). Readable are {READ}.", "file"
        ) from error
    except (RuntimeError, ValueError, OSError) as error:
        if isinstance(error, InvalidRequestError):
            raise
        raise InvalidRequestError(f"file: it cannot be read: {error!s:.120}.", "file") from error


def _read(file: object, rate: int, max_s: float | None) -> np.ndarray:
    resampler = None if rate == RATE else Resampler(rate, RATE)
    parts: list[np.ndarray] = []
    num_read = 0
    while True:
        block = file.read(BLOCK, dtype="float32", always_2d=True)  # type: ignore[attr-defined]
        if not len(block):
            break
        num_read += len(block)
        if max_s is not None and num_read > max_s * rate:
            raise InvalidRequestError(
                f"file: it lasts longer than {max_s / 60:g} minutes, the most that is accepted "
                "here. Send it in parts.",
                "file",
            )
        mono = np.nan_to_num(block.mean(axis=1), nan=0.0, posinf=0.0, neginf=0.0)
        np.clip(mono, -1.0, 1.0, out=mono)
        parts.append(mono if resampler is None else resampler.push(mono))
    if num_read < MIN_S * rate:
        raise InvalidRequestError(
            f"file: it lasts {num_read / rate:.3f} s; at least {MIN_S:g} s are needed.", "file"
        )
    if resampler is not None:
        parts.append(resampler.end())
    return np.concatenate(parts)
