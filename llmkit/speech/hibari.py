"""Hibari, a small English voice: a `Speaker`."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import numpy as np

from llmkit.errors import ModelLoadError
from llmkit.speech.extra import need

__all__ = ["Hibari"]


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
        self, text: str, voice: str | None, speed: float, seed: int | None
    ) -> Iterator[np.ndarray]:
        name = voice or self._voices[0]
        if name not in self._loaded:
            self._loaded[name] = self._make(name, threads=self._threads)
        for sound in self._loaded[name].stream(text, speed=speed, seed=seed):
            yield np.nan_to_num(np.asarray(sound, np.float32))

    def close(self) -> None:
        self._loaded.clear()
        gc.collect()


def _is_here(registry: Any, name: str) -> bool:
    try:
        registry.voice_path(name, download_missing=False)
    except (OSError, ValueError):
        return False
    return True
