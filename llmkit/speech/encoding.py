"""Samples to sound files, sentence by sentence: each piece can be sent as it is made.

Containers are written forwards only: what a library would go back to, a length in a header, is
left unknown or left out.
"""

from __future__ import annotations

import contextlib
import io
import struct
from typing import Any, Protocol

import numpy as np

from llmkit.protocol.speech import SoundFormat
from llmkit.speech.extra import need

__all__ = ["Encoder", "encoder_of", "wav_header"]

# An MP3 begins with this many samples of the encoder's own, at any rate.
MP3_DELAY = 1105
SILENT = 1e-3
WRITTEN: dict[str, dict[str, Any]] = {
    "mp3": {"format": "MP3", "bitrate_mode": "CONSTANT", "compression_level": 0.3},
    "opus": {"format": "OGG", "subtype": "OPUS"},
    "flac": {"format": "FLAC", "subtype": "PCM_16"},
}
UNKNOWN = 0xFFFFFFFF


class Encoder(Protocol):
    """Writes one sound."""

    def push(self, samples: np.ndarray) -> bytes:
        """The bytes that are ready once mono float32 ``samples`` have come; perhaps none."""
        ...

    def end(self) -> bytes:
        """The rest."""
        ...


def encoder_of(kind: SoundFormat, rate: int) -> Encoder:
    """An encoder. Raises `ModelLoadError` where a format needs a package that is not installed."""
    if kind == "pcm":
        return Samples()
    if kind == "wav":
        return Samples(wav_header(rate))
    return Container(kind, rate)


def wav_header(rate: int, num_samples: int | None = None) -> bytes:
    """Of 16-bit mono; without a number of samples, of a stream that ends when it ends."""
    size = UNKNOWN if num_samples is None else 2 * num_samples
    whole = UNKNOWN if num_samples is None else size + 36
    return struct.pack(
        "<4sI4s4sIHHIIHH4sI",
        *(b"RIFF", whole, b"WAVE", b"fmt ", 16, 1, 1, rate, 2 * rate, 2, 16, b"data", size),
    )


class Samples:
    """Little-endian 16-bit samples, after a header."""

    def __init__(self, header: bytes = b"") -> None:
        self._header = header

    def push(self, samples: np.ndarray) -> bytes:
        header, self._header = self._header, b""
        data: bytes = (np.clip(samples, -1.0, 1.0) * 32767.0).astype("<i2").tobytes()
        return header + data

    def end(self) -> bytes:
        header, self._header = self._header, b""
        return header


class Container:
    """MP3 at a constant rate, Opus in Ogg, or FLAC, which comes as a whole at its end.

    An MP3 is moved so that its samples are where they were: its encoder puts 46 ms of silence
    before them, so as much silence is taken away. The frame that would hold its length is left out.
    """

    def __init__(self, kind: SoundFormat, rate: int) -> None:
        soundfile = need("soundfile")
        self._kind, self._begun, self._num_cut = kind, False, 0
        self._sink = io.BytesIO() if kind == "flac" else Forward()
        self._file = soundfile.SoundFile(self._sink, "w", rate, 1, **WRITTEN[kind])

    def push(self, samples: np.ndarray) -> bytes:
        samples = np.clip(samples, -1.0, 1.0)
        if self._kind == "mp3" and self._num_cut < MP3_DELAY:
            head = samples[: MP3_DELAY - self._num_cut]
            loud = np.flatnonzero(np.abs(head) > SILENT)
            cut = int(loud[0]) if len(loud) else len(head)
            self._num_cut = MP3_DELAY if len(loud) else self._num_cut + cut
            samples = samples[cut:]
        if len(samples):
            self._file.write(samples)
        return self._taken()

    def end(self) -> bytes:
        with contextlib.closing(self._file):
            pass
        return self._sink.getvalue() if isinstance(self._sink, io.BytesIO) else self._taken()

    def _taken(self) -> bytes:
        if isinstance(self._sink, io.BytesIO):
            return b""
        data = self._sink.take()
        if self._kind == "mp3" and data and not self._begun:
            self._begun = True
            data = data[_frame_bytes(data) :]
        return _steady(data) if self._kind == "opus" else data


class Forward(io.RawIOBase):
    """A file that keeps what is appended to it, and forgets what is written anywhere else."""

    def __init__(self) -> None:
        self._kept = bytearray()
        self._at = self._end = 0

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0, /) -> int:
        self._at = offset + (0, self._at, self._end)[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def write(self, data: object, /) -> int:
        written = bytes(data)  # type: ignore[call-overload]
        if self._at == self._end:
            self._kept += written
            self._end += len(written)
        self._at += len(written)
        return len(written)

    def take(self) -> bytes:
        """What has come since the last time."""
        data = bytes(self._kept)
        self._kept.clear()
        return data


def _crc_table() -> tuple[int, ...]:
    table = []
    for byte in range(256):
        value = byte << 24
        for _ in range(8):
            value = (value << 1) ^ (0x04C11DB7 if value & 0x80000000 else 0)
        table.append(value & 0xFFFFFFFF)
    return tuple(table)


CRC = _crc_table()


def _steady(pages: bytes) -> bytes:
    """Whole pages of Ogg with the same serial number each time, where the library draws one."""
    data, at = bytearray(pages), 0
    while at < len(data):
        body = at + 27 + data[at + 26]
        end = body + sum(data[at + 27 : body])
        data[at + 14 : at + 18] = (1).to_bytes(4, "little")
        data[at + 22 : at + 26] = bytes(4)
        crc = 0
        for byte in data[at:end]:
            crc = ((crc << 8) & 0xFFFFFFFF) ^ CRC[(crc >> 24) ^ byte]
        data[at + 22 : at + 26] = crc.to_bytes(4, "little")
        at = end
    return bytes(data)


# Kilobits a second by a frame's header, of MPEG 1 and of the others, layer III.
RATES_1 = (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320)
RATES_2 = (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)
SAMPLE_RATES = {3: (44100, 48000, 32000), 2: (22050, 24000, 16000), 0: (11025, 12000, 8000)}


def _frame_bytes(data: bytes) -> int:
    """The length of the MP3 frame that begins ``data``."""
    version, third = (data[1] >> 3) & 3, data[2]
    bits = (RATES_1 if version == 3 else RATES_2)[third >> 4] * 1000
    samples = 144 if version == 3 else 72
    return samples * bits // SAMPLE_RATES[version][(third >> 2) & 3] + ((third >> 1) & 1)
