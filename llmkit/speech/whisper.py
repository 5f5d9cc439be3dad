"""Whisper, by faster-whisper and CTranslate2: a `Transcriber`."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from llmkit.errors import InvalidModelFileError, ModelLoadError
from llmkit.protocol.speech import Hearing, Segment, Word
from llmkit.speech.decoding import RATE
from llmkit.speech.extra import need

__all__ = ["Whisper"]

PIECE_S, SEARCH_S = 300, 20  # memory grows with what is looked at in one go
HEARD_S = 0.02  # the span in which loudness is measured
MAX_THREADS = 4  # more make small models no faster
REMEMBERED = 200  # characters of the last piece, which the next follows in style


class _Over(Exception):
    """Nobody waits for the rest."""


class _Stops:
    """The library's model, which looks before each part of its work whether that is still wanted.

    A window of 30 s is tried up to six times where it is hard to hear.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.is_over: Callable[[], bool] = lambda: False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def generate(self, *values: Any, **options: Any) -> Any:
        if self.is_over():
            raise _Over
        return self.model.generate(*values, **options)


class Whisper:
    """A model in a folder, on the CPU in 8 bits unless ``on_gpu``."""

    def __init__(self, folder: Path, *, threads: int | None = None, on_gpu: bool = False) -> None:
        library = need("faster_whisper")
        if not (folder / "tokenizer.json").is_file():  # else the library would download one
            raise InvalidModelFileError(f"{folder}: there is no tokenizer.json beside model.bin.")
        try:
            self._model: Any = library.WhisperModel(
                str(folder),
                device="cuda" if on_gpu else "cpu",
                compute_type="float16" if on_gpu else "int8",
                cpu_threads=threads or min(MAX_THREADS, os.cpu_count() or 1),
                local_files_only=True,
            )
        except (RuntimeError, ValueError, OSError) as error:
            raise ModelLoadError(f"{folder.name}: {error!s:.300}") from error
        self._model.model = self._stops = _Stops(self._model.model)
        self._languages = tuple(self._model.supported_languages)

    @property
    def languages(self) -> tuple[str, ...]:
        return self._languages

    def segments(
        self,
        pcm: np.ndarray,
        options: Hearing,
        prompt: str = "",
        is_over: Callable[[], bool] = lambda: False,
    ) -> Iterator[Segment]:
        """In pieces of at most 5 minutes, cut where it is quiet."""
        self._stops.is_over = is_over
        with contextlib.suppress(_Over):
            yield from self._heard(pcm, options, prompt)

    def _heard(self, pcm: np.ndarray, options: Hearing, prompt: str) -> Iterator[Segment]:
        settings: dict[str, Any] = {
            "language": options.language,
            "task": "translate" if options.translate else "transcribe",
            "word_timestamps": options.words,
            "vad_filter": True,
        }
        if options.temperature:
            settings["temperature"] = options.temperature
        before = prompt
        for at, piece in _pieces(pcm):
            found, info = self._model.transcribe(piece, initial_prompt=before or None, **settings)
            said = []
            for each in found:
                segment = _moved(_segment(each, str(info.language)), at / RATE, len(pcm) / RATE)
                said.append(segment.text)
                yield segment
            if said:  # a language guessed from silence is not that of the rest
                settings["language"] = str(info.language)
            before = "".join(said)[-REMEMBERED:] or prompt

    def close(self) -> None:
        model, self._model = self._model, None
        if model is not None:
            self._stops.model.unload_model()
            del model, self._stops
            gc.collect()


def _pieces(pcm: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Pieces of a long sound, each with the place where it begins."""
    at = 0
    while len(pcm) - at > PIECE_S * RATE:
        tail = at + (PIECE_S - SEARCH_S) * RATE
        span = int(HEARD_S * RATE)
        searched = pcm[tail : at + PIECE_S * RATE]
        loud = (searched[: len(searched) // span * span].reshape(-1, span) ** 2).mean(axis=1)
        end = tail + (int(loud.argmin()) * span) + span // 2
        yield at, pcm[at:end]
        at = end
    yield at, pcm[at:]


def _segment(found: Any, language: str) -> Segment:
    return Segment(
        str(found.text),
        float(found.start),
        float(found.end),
        language,
        tuple(
            Word(str(w.word), float(w.start), float(w.end), float(w.probability))
            for w in found.words or ()
        ),
        tuple(map(int, found.tokens)),
        float(found.avg_logprob),
        float(found.compression_ratio),
        float(found.no_speech_prob),
        float(found.temperature or 0.0),
    )


def _moved(segment: Segment, by: float, end: float) -> Segment:
    """Later, and never beyond the end of the sound."""

    def at(time: float) -> float:
        return round(min(time + by, end), 3)

    words = tuple(replace(w, start=at(w.start), end=at(w.end)) for w in segment.words)
    return replace(segment, start=at(segment.start), end=at(segment.end), words=words)
