"""The packages of the extra ``speech``, which are imported late, and may be missing."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

from llmkit.errors import ModelLoadError

__all__ = ["INSTALL", "is_installed", "need"]

INSTALL = 'pip install "llmkit[speech]"'


def is_installed() -> bool:
    """Whether the packages are here; imports none of them."""
    return all(importlib.util.find_spec(name) for name in ("faster_whisper", "soundfile", "hibari"))


def need(name: str) -> ModuleType:
    """Import one of them. Raises `ModelLoadError`, which says what to install."""
    try:
        return importlib.import_module(name)
    except (ImportError, OSError) as error:  # soundfile: its own library cannot be loaded
        raise ModelLoadError(
            f"speech needs packages that are not installed ({error}); install them with\n"
            f"    {INSTALL}"
        ) from error
