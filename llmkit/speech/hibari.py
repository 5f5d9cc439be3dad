"""Hibari, a small English voice: a `Speaker`."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from llmkit.errors import InvalidRequestError, ModelLoadError
from llmkit.speech.extra import need
from llmkit.speech.sentences import cut, sentences_of

__all__ = ["Hibari"]

# Phonemes that are spoken at once: 240 MB of memory at the voice's own speed.
MOST, LEAST = 400, 160
PHONEMES_S = 14  # a second, about
MAX_S = 1800


class Hibari:
    """The voices whose files are here: none is downloaded. Each is loaded when first used."""

    def __init__(self, *, threads: int | None = None) -> None:
        library = need("hibari")
        registry = need("hibari.voices")
        self._make, self._threads = library.Hibari, threads or 1
        here = [name for name in registry.VOICES if _is_here(registry, name)]
        default = registry.DEFAULT
        if default not in here:
            raise ModelLoadError("hibari-tts lacks its voice; install it again.")
        self._voices = (default, *(name for name in here if name != default))
        self._loaded: dict[str, Any] = {default: self._make(default, threads=self._threads)}
        self._loaded[default]("Yes.", seed=0)  # dictionaries and buffers: the first call is slow

    @property
    def voices(self) -> tuple[str, ...]:
        return self._voices

    @property
    def rate(self) -> int:
        return int(self._make.sample_rate)

    def speak(
        self,
        text: str,
        voice: str | None,
        speed: float,
        seed: int | None,
        is_over: Callable[[], bool] = lambda: False,
    ) -> Iterator[np.ndarray]:
        """Sentence by sentence; long ones in pieces, since memory grows with what is spoken at
        once. Raises `InvalidRequestError` for what would take longer than half an hour to say."""
        name = voice or self._voices[0]
        if name not in self._loaded:
            self._loaded[name] = self._make(name, threads=self._threads)
        model = self._loaded[name]
        random = np.random.default_rng(seed)
        for phonemes in _phonemes(model, text, speed, is_over):
            ids = model.ids(phonemes)
            if len(ids) > 2:  # else nothing is between the two pauses
                sound = model.from_ids(ids, speed, random)
                yield np.nan_to_num(np.asarray(sound, np.float32))

    def close(self) -> None:
        self._loaded.clear()
        gc.collect()


def _phonemes(model: Any, text: str, speed: float, is_over: Callable[[], bool]) -> list[str]:
    """All of a text, so that its length is known before the first sound; ends early if over."""
    most = max(LEAST, int(MOST * min(1.0, speed)))
    pieces: list[str] = []
    for sentence in sentences_of(text, model.split_sentences):
        if is_over():
            break
        try:
            found = str(model.g2p(sentence) or "")
        except Exception as error:
            raise InvalidRequestError(
                f"input: the voice cannot read {sentence!r:.80} ({error!r:.60}); write it out.",
                "input",
            ) from error
        pieces.extend(cut(found, most))
        if sum(map(len, pieces)) > MAX_S * PHONEMES_S * speed:
            raise InvalidRequestError(
                f"input: it would take longer than {MAX_S // 60} minutes to say, numbers and signs "
                "spelled out. Send it in parts.",
                "input",
            )
    return pieces


def _is_here(registry: Any, name: str) -> bool:
    try:
        registry.voice_path(name, download_missing=False)
    except (OSError, ValueError):
        return False
    return True
