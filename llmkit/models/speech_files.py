"""Which files are models that hear or speak, by name and by what lies beside them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

__all__ = ["SpeechKind", "speech_kind", "whisper_file"]

SpeechKind = Literal["", "whisper", "hibari"]
MAX_CONFIG = 1 << 20


def speech_kind(path: Path) -> SpeechKind:
    """What a model's file is: a Whisper in CTranslate2's format (``model.bin`` with its
    ``config.json``), the voice of hibari-tts, or neither."""
    if path.name == "hibari.onnx":
        return "hibari"
    return "whisper" if path.name == "model.bin" and _is_whisper(path.parent) else ""


def whisper_file(folder: Path) -> Path | None:
    """The file of the Whisper in a folder; None if there is none."""
    file = folder / "model.bin"
    return file if file.is_file() and speech_kind(file) else None


def _is_whisper(folder: Path) -> bool:
    config = folder / "config.json"
    try:
        if config.stat().st_size > MAX_CONFIG:
            return False
        data = json.loads(config.read_text("utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(data, dict) and "suppress_ids" in data
