"""Sounds for the tests: files as bytes, and readers of what comes back."""

from __future__ import annotations

import io
import re
import struct
from typing import Any

import numpy as np
import soundfile

from llmkit.speech.encoding import wav_header

__all__ = ["HOSTILE", "SENTENCES", "cues", "decoded", "folded", "silence", "tone", "wav"]

SENTENCES = (
    "The quick brown fox jumps over the lazy dog.",
    "A notebook loads the model once, and every other program may use it.",
    "Please send the report before Friday morning.",
    "The weather in the mountains was cold and clear.",
    "She bought seven green apples at the market.",
)


def wav(samples: np.ndarray, rate: int = 16_000) -> bytes:
    pcm = (np.clip(samples, -1, 1) * 32767).astype("<i2")
    return wav_header(rate, len(pcm)) + pcm.tobytes()


def silence(seconds: float, rate: int = 16_000) -> np.ndarray:
    return np.zeros(int(seconds * rate), np.float32)


def tone(seconds: float, rate: int, hertz: float = 440.0) -> np.ndarray:
    at = np.arange(int(seconds * rate)) / rate
    return (0.5 * np.sin(2 * np.pi * hertz * at)).astype(np.float32)


def encoded(samples: np.ndarray, rate: int, **options: Any) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, **options)
    return file.getvalue()


def decoded(data: bytes) -> tuple[np.ndarray, int]:
    """Samples and their rate, by libsndfile."""
    samples, rate = soundfile.read(io.BytesIO(data), dtype="float32")
    return samples, rate


def folded(text: str) -> list[str]:
    return re.findall(r"[a-z0-9']+", text.lower())


def cues(text: str) -> list[tuple[float, float, str]]:
    """The cues of SRT or WebVTT, read as a player does."""
    found = []
    for block in re.split(r"\n\s*\n", text.replace("\r\n", "\n").strip()):
        lines = block.split("\n")
        at = next((i for i, line in enumerate(lines) if "-->" in line), None)
        if at is None:
            assert lines[0].startswith("WEBVTT")
            continue
        times = re.findall(r"(\d\d):(\d\d):(\d\d)[.,](\d{3})", lines[at])
        start, end = (
            int(h) * 3600 + int(m) * 60 + int(s) + int(ms) / 1000 for h, m, s, ms in times
        )
        found.append((start, end, " ".join(lines[at + 1 :])))
    return found


def _lying() -> bytes:
    """A header that promises four gigabytes of sound."""
    return wav_header(16_000) + bytes(64)


HOSTILE: dict[str, bytes] = {
    "nothing": b"",
    "text": b"this is no sound at all, " * 50,
    "html": b"<html><body>not a sound</body></html>",
    "one sample": wav(np.zeros(1, np.float32)),
    "header alone": wav_header(16_000, 10_000_000),
    "a lie about its length": _lying(),
    "cut MP3 header": b"ID3\x04\x00\x00\x00\x00\x0f\x76" + bytes(20),
    "cut FLAC": b"fLaC\x00\x00\x00\x22" + bytes(10),
    "cut OGG": b"OggS\x00\x02" + bytes(40),
    "rate 0": struct.pack("<4sI4s4sIHHIIHH4sI", b"RIFF", 100, b"WAVE", b"fmt ", 16, 1, 1, 0, 0, 2,
                          16, b"data", 64) + bytes(64),
    "1000 channels": struct.pack("<4sI4s4sIHHIIHH4sI", b"RIFF", 100, b"WAVE", b"fmt ", 16, 1, 1000,
                                 16000, 32000000, 2000, 16, b"data", 4000) + bytes(4000),
    "a million hertz": wav_header(1_000_000, 200_000) + bytes(400_000),
}  # fmt: skip
