"""Where copies of a model in other types of weights are kept, and which there are.

Beside the model, in a folder of llmkit's own, if that is the user's and can be written; else in
llmkit's cache. A copy is named by its source's name, size and time, so a new version has a new one.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from pathlib import Path

from llmkit.models.quantization import TYPES
from llmkit.models.registry import cache_folder
from llmkit.models.scanning import OWN, hub_cache
from llmkit.models.splits import stem_of

__all__ = ["copies_of", "former_copies_of", "places_for"]

MAX_STEM = 120  # bytes of a name: the whole must not pass what file systems allow


def places_for(files: Sequence[Path], kind: str) -> list[Path]:
    """The files that a copy in type ``kind`` may be, the best place first."""
    name = f"{_start(files)}-{_mark(files, kind)}-{kind}.gguf"
    beside = files[0].parent / OWN / name
    cached = cache_folder() / name
    return [cached] if _is_foreign(files[0]) else [beside, cached]


def copies_of(files: Sequence[Path]) -> list[Path]:
    """The copies of a model that are on disk."""
    return [p for kind in TYPES for p in places_for(files, kind) if os.path.isfile(p)]


def former_copies_of(files: Sequence[Path]) -> list[Path]:
    """Copies beside a model that were made of an earlier version of its file."""
    made = re.compile(rf"{re.escape(_start(files))}-[0-9a-f]{{12}}-({'|'.join(TYPES)})\.gguf")
    folder = files[0].parent / OWN
    if _is_foreign(files[0]) or not os.path.isdir(folder):
        return []
    present = set(copies_of(files))
    return [
        folder / name
        for name in sorted(os.listdir(folder))
        if made.fullmatch(name) and folder / name not in present
    ]


def _start(files: Sequence[Path]) -> str:
    stem = os.fsencode(stem_of(files[0].name))[:MAX_STEM]
    return os.fsdecode(stem.decode("utf-8", "ignore").encode())


def _mark(files: Sequence[Path], kind: str) -> str:
    facts = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    return hashlib.sha256(repr((facts, kind)).encode("utf-8", "backslashreplace")).hexdigest()[:12]


def _is_foreign(file: Path) -> bool:
    """Whether other programs look after the folder: Hugging Face's cache, packages, our cache."""
    real = file.resolve()
    if "site-packages" in real.parts or "dist-packages" in real.parts:
        return True
    return any(real.is_relative_to(folder.resolve()) for folder in (hub_cache(), cache_folder()))
