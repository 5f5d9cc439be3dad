"""What speech looks like in a notebook: transcripts as they come, and sound with a player."""

from __future__ import annotations

import base64
import contextlib
import sys
import time
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmkit.errors import InvalidRequestError
from llmkit.media.sounds import MAX_CHANNELS
from llmkit.notebook import charts
from llmkit.protocol.speech import Segment, Word
from llmkit.speech.formats import clock, srt, text_of, vtt

if TYPE_CHECKING:
    import numpy as np

__all__ = ["LiveText", "Speech", "Transcript", "sound_bytes"]

HEADER = 44  # bytes of a WAV's
SHOWN = 200  # segments
INTERVAL_S = 0.1
RATE = 16_000


@dataclass(frozen=True, slots=True)
class Transcript:
    """What was said, in ``segments``; ``duration`` is the sound's, ``seconds`` the work's."""

    segments: tuple[Segment, ...]
    duration: float
    seconds: float = 0.0

    @property
    def text(self) -> str:
        """All of it."""
        return text_of(self.segments)

    @property
    def words(self) -> tuple[Word, ...]:
        """With ``words=True``: all words and their times."""
        return tuple(word for segment in self.segments for word in segment.words)

    @property
    def language(self) -> str:
        """The code of the language; empty if nobody spoke."""
        return self.segments[0].language if self.segments else ""

    def srt(self) -> str:
        """As subtitles: SubRip."""
        return srt(self.segments)

    def vtt(self) -> str:
        """As subtitles: WebVTT."""
        return vtt(self.segments)

    def save(self, path: str | Path) -> Path:
        """Write it as .srt, .vtt or text, by the name of the file."""
        file = Path(path).expanduser()
        made = {".srt": self.srt, ".vtt": self.vtt}.get(file.suffix.lower(), lambda: self.text)
        file.write_text(made(), encoding="utf-8")
        return file

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        return f"Transcript({self.text!r}, {self.duration:.1f} s in {self.seconds:.1f} s)"

    def _repr_html_(self) -> str:
        note = (
            f"{self.duration:.1f} s of sound in {self.seconds:.1f} s"
            if self.segments
            else f"nobody speaks in these {self.duration:.1f} s"
        )
        return f'{_lines(self.segments)}<div style="color:{charts.MUTED}">{escape(note)}</div>'


class LiveText:
    """Shows segments as they come: in a notebook's output, or as lines of a terminal.

    ``show`` None: in those two places and nowhere else.
    """

    def __init__(self, title: str, show: bool | None) -> None:
        self._title, self._began, self._shown = title, time.monotonic(), 0.0
        self._segments: list[Segment] = []
        self._handle: Any = None
        self._in_notebook = show is not False and _in_kernel()
        self._prints = not self._in_notebook and (
            sys.stdout.isatty() if show is None else bool(show)
        )

    def add(self, segment: Segment) -> None:
        self._segments.append(segment)
        if self._prints:
            print(f"{clock(segment.start)[:-4]}  {segment.text.strip()}", flush=True)
        elif self._in_notebook and time.monotonic() - self._shown >= INTERVAL_S:
            self._shown = time.monotonic()
            with contextlib.suppress(Exception):  # a closed frontend must not stop the work
                self._update(_lines(self._segments), text_of(self._segments))

    def close(self, *, finished: bool) -> None:
        """The answer shows itself, so that a line is left here."""
        if self._handle is None:
            return
        how = "transcribed in" if finished else "stopped after"
        text = f"{self._title}: {how} {time.monotonic() - self._began:.1f} s"
        html = f'<span style="color:{charts.MUTED};font-size:90%">{escape(text)}</span>'
        with contextlib.suppress(Exception):
            self._update(html if finished else _lines(self._segments) + html, text)

    def _update(self, html: str, text: str) -> None:
        from IPython.display import display

        bundle = {"text/plain": text, "text/html": html}
        if self._handle is None:
            self._handle = display(bundle, raw=True, display_id=True)  # type: ignore[no-untyped-call]
        else:
            self._handle.update(bundle, raw=True)


class Speech:
    """Spoken text: ``samples`` (16-bit integers) at ``rate`` a second. A notebook shows a player.

    >>> import struct
    >>> from llmkit.speech.encoding import wav_header
    >>> Speech(wav_header(8000) + bytes(8000), "hm").duration
    0.5
    """

    def __init__(self, wav: bytes, text: str = "", *, play: bool = False) -> None:
        self._pcm = wav[HEADER:]
        self.rate = int.from_bytes(wav[24:28], "little")
        self.text, self._play = text, play

    @property
    def samples(self) -> np.ndarray:
        """Mono, -32768 to 32767."""
        import numpy as np

        return np.frombuffer(self._pcm, "<i2")

    @property
    def duration(self) -> float:
        """In seconds."""
        return len(self._pcm) / 2 / self.rate

    @property
    def wav(self) -> bytes:
        """As a WAV file."""
        from llmkit.speech.encoding import wav_header

        return wav_header(self.rate, len(self._pcm) // 2) + self._pcm

    def save(self, path: str | Path) -> Path:
        """Write it as .wav, .mp3, .flac, .opus or .ogg (Opus), by the name of the file."""
        from llmkit.speech.encoding import encoder_of

        file = Path(path).expanduser()
        kinds: dict[str, Any] = {".mp3": "mp3", ".flac": "flac", ".opus": "opus", ".ogg": "opus"}
        suffix = file.suffix.lower()
        if suffix == ".wav":
            data = self.wav
        elif suffix in kinds:
            encoder = encoder_of(kinds[suffix], self.rate)
            data = encoder.push(self.samples.astype("float32") / 32767) + encoder.end()
        else:
            raise InvalidRequestError(
                f"{file.name}: a name ends in .wav, .mp3, .flac, .opus or .ogg.", "path"
            )
        file.write_bytes(data)
        return file

    def __repr__(self) -> str:
        return f"Speech({self.text[:60]!r}, {self.duration:.1f} s)"

    def _repr_html_(self) -> str:
        data = base64.b64encode(self.wav).decode()
        label = escape(self.text[:200])
        start = " autoplay" if self._play else ""
        return (
            f'<audio controls{start} aria-label="{label}" style="max-width:100%" '
            f'src="data:audio/wav;base64,{data}"></audio>'
        )


def sound_bytes(sound: Any, rate: int | None) -> bytes:
    """A sound as the bytes of a file. Raises `InvalidRequestError`, and `OSError` for a path."""
    import numpy as np

    if isinstance(sound, Speech):
        return sound.wav
    if isinstance(sound, bytes | bytearray | memoryview):
        return bytes(sound)
    if isinstance(sound, str | Path):
        return Path(sound).expanduser().read_bytes()
    from llmkit.media.waveforms import check_rate, floats, pcm16
    from llmkit.speech.encoding import wav_header

    samples = np.asarray(sound)
    if samples.ndim not in (1, 2) or samples.dtype.kind not in "iuf":
        raise InvalidRequestError(
            "sound must be a path, a file's bytes, or an array of samples: floats from -1 to 1 or "
            f"integers, of shape (n,) or (n, channels); not {type(sound).__name__:.40} of "
            f"{samples.dtype}, {samples.shape}.",
            "sound",
        )
    if samples.ndim == 2 and not 1 <= samples.shape[1] <= MAX_CHANNELS:
        raise InvalidRequestError(
            f"sound has the shape {samples.shape}, and must be (n, channels) with {MAX_CHANNELS} "
            "channels at most; transpose it.",
            "sound",
        )
    if rate is None:
        raise InvalidRequestError(f"say how many samples a second: rate={RATE}, say.", "rate")
    known, mono = check_rate(rate, "rate"), floats(samples, "sound")
    pcm = pcm16(mono.mean(axis=1) if mono.ndim == 2 else mono)
    return bytes(wav_header(known, len(pcm)) + pcm.tobytes())


def _in_kernel() -> bool:
    if "IPython" not in sys.modules:
        return False
    from IPython.core.getipython import get_ipython

    return getattr(get_ipython(), "kernel", None) is not None


def _lines(segments: Any) -> str:
    """The last segments, with their times."""
    shown = segments[-SHOWN:]
    rows = "".join(
        f'<div><span style="color:{charts.MUTED}">{clock(s.start)[:-4]}</span> '
        f"{escape(s.text.strip())}</div>"
        for s in shown
    )
    before = f"<div>… {len(segments) - SHOWN} before</div>" if len(segments) > SHOWN else ""
    return f'<div class="{charts.NO_MATH}" style="max-width:760px">{before}{rows}</div>'
