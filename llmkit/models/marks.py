"""Where measurements of a model on this machine are kept between processes."""

from __future__ import annotations

import contextlib
import hashlib
import platform
from pathlib import Path

from llmkit.models.registry import ModelSpec, cache_folder

__all__ = ["file_mark", "result_file"]


def file_mark(path: Path) -> str:
    """A fingerprint of a model file, by path, size and time; a new version has a new one."""
    stat = path.stat()
    return hashlib.sha256(f"{path} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()[:12]


def result_file(spec: ModelSpec, cores: int, suffix: str = ".json") -> Path:
    """The file for results of a model on this kind of machine."""
    facts = f"{platform.machine()} {_processor()} {cores}"
    machine = hashlib.sha256(facts.encode()).hexdigest()[:8]
    folder = cache_folder().parent / "tune"
    return folder / f"{spec.name}-{file_mark(spec.path)}-{machine}{suffix}"


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line
    return platform.processor()
