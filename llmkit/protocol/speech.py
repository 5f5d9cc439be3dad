"""Speech: what is asked of a model that hears or speaks, and the seams that such models implement.

Standard library only. A model that hears (a `Transcriber`) or speaks (a `Speaker`) is behind an
`EngineClient` like any other. Its requests are `GenerationRequest`s with a `Hearing` or a `Saying`;
the text of their streams is lines: `Facts` and then `Segment`s of a hearing, sound of a saying.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from llmkit.protocol.sampling import check, check_integer, check_number

if TYPE_CHECKING:
    import numpy as np

__all__ = [
    "FORMATS",
    "MAX_SPOKEN_CHARS",
    "Facts",
    "Hearing",
    "Lines",
    "Saying",
    "Segment",
    "SoundFormat",
    "Speaker",
    "Transcriber",
    "Word",
]

SoundFormat = Literal["mp3", "opus", "flac", "wav", "pcm"]
FORMATS: tuple[SoundFormat, ...] = ("mp3", "opus", "flac", "wav", "pcm")
MAX_SPOKEN_CHARS = 4096
MAX_SEED = 2**63 - 1
SOUND_TOKENS = 50  # a second of sound in tokens: the positions of Whisper's encoder


@dataclass(frozen=True, slots=True)
class Word:
    """A word, when it was spoken (seconds from the beginning), and how sure the model is."""

    text: str
    start: float
    end: float
    probability: float = 0.0


@dataclass(frozen=True, slots=True)
class Segment:
    """A part of a transcript; ``start`` and ``end`` are seconds from the beginning.

    The other numbers are the model's own: its tokens, their mean log-probability, how well the text
    can be compressed (high where it repeats itself), and how likely nobody spoke.
    """

    text: str
    start: float
    end: float
    language: str = ""
    words: tuple[Word, ...] = ()
    tokens: tuple[int, ...] = ()
    avg_logprob: float = 0.0
    compression_ratio: float = 0.0
    no_speech_prob: float = 0.0
    temperature: float = 0.0


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known before the first segment: how long the sound lasts, in seconds."""

    duration: float


@dataclass(frozen=True, slots=True)
class Hearing:
    """Sound to write down, as the bytes of a file.

    ``language`` is its language's code ("en"); by default the model finds out. ``translate``: into
    English. ``words``: with times of words. ``temperature``: by default 0, and more where that
    fails. Sound longer than ``max_s`` seconds is refused.
    """

    audio: bytes
    language: str | None = None
    translate: bool = False
    temperature: float | None = None
    words: bool = False
    max_s: float | None = None

    def __post_init__(self) -> None:
        check(isinstance(self.audio, bytes), "file", "must be the bytes of a sound file.")
        if self.temperature is not None:
            check_number(self.temperature, "temperature", 0, 1)

    def __repr__(self) -> str:
        return f"Hearing({len(self.audio)} bytes, language={self.language!r})"


@dataclass(frozen=True, slots=True)
class Saying:
    """How a text is spoken: ``speed`` 1 is the voice's own. The same ``seed`` gives equal bytes."""

    voice: str | None = None
    speed: float = 1.0
    seed: int | None = None
    format: SoundFormat = "pcm"

    def __post_init__(self) -> None:
        check_number(self.speed, "speed", 0.25, 4)
        if self.seed is not None:
            check_integer(self.seed, "seed", 0, MAX_SEED)
        check(
            self.format in FORMATS,
            "response_format",
            f"{self.format!r:.20} cannot be written here; there are {', '.join(FORMATS)}.",
        )


class Transcriber(Protocol):
    """A model that transcribes speech. One thread at a time."""

    @property
    def languages(self) -> tuple[str, ...]:
        """The codes of the languages that it knows."""
        ...

    def segments(
        self,
        pcm: np.ndarray,
        options: Hearing,
        prompt: str = "",
        is_over: Callable[[], bool] = lambda: False,
    ) -> Iterator[Segment]:
        """The segments of mono float32 at 16 kHz, each as soon as it is known.

        ``prompt`` is text that may have come before: spelling and style follow it. The caller may
        stop between two segments; once ``is_over`` says so, the rest is left out.
        """
        ...

    def close(self) -> None:
        """Free the memory."""
        ...


class Speaker(Protocol):
    """A model that speaks. One thread at a time."""

    @property
    def voices(self) -> tuple[str, ...]:
        """The voices that are here, the default first."""
        ...

    @property
    def rate(self) -> int:
        """Samples a second of what it speaks."""
        ...

    def speak(
        self,
        text: str,
        voice: str | None,
        speed: float,
        seed: int | None,
        is_over: Callable[[], bool] = lambda: False,
    ) -> Iterator[np.ndarray]:
        """Mono float32, sentence by sentence, of 30 s at most. Between two the caller may stop;
        once ``is_over`` says so, the rest is left out."""
        ...

    def close(self) -> None:
        """Free the memory."""
        ...


class Lines:
    """The text of a speech stream: written by an engine, read piece by piece by its caller.

    >>> lines = Lines()
    >>> list(lines.read(Lines.of(Facts(1.5))[:5])), list(lines.read(Lines.of(Facts(1.5))[5:]))
    ([], [Facts(duration=1.5)])
    """

    def __init__(self) -> None:
        self._rest = ""

    @staticmethod
    def of(event: Facts | Segment | bytes) -> str:
        """An event as a line: facts and segments as JSON, sound in base64."""
        if isinstance(event, bytes):
            return base64.b64encode(event).decode() + "\n"
        return json.dumps(asdict(event)) + "\n"

    def read(self, text: str) -> Iterator[Facts | Segment | bytes]:
        """The events of all lines that are whole."""
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            yield _event(line)


def _event(line: str) -> Facts | Segment | bytes:
    if not line.startswith("{"):
        return base64.b64decode(line)
    data: dict[str, Any] = json.loads(line)
    if "duration" in data:
        return Facts(data["duration"])
    data["words"] = tuple(Word(**word) for word in data["words"])
    data["tokens"] = tuple(data["tokens"])
    return Segment(**data)
