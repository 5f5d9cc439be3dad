"""llama.cpp's quantizer: a model's weights written in another type.

It runs in a child process only, since an assert in C would end this one, and a call cannot be
broken off; the caller's thread is busy until it is done.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmkit.backend import library
from llmkit.backend.library import C
from llmkit.errors import ModelLoadError

__all__ = ["Made", "quantize"]

STEP = re.compile(r"\[ *(\d+)/ *(\d+)\]")
SIZE = re.compile(r"quant size += +([\d.]+) MiB \(([\d.]+) BPW\)")
FALLBACK = re.compile(r"(\d+) of (\d+) tensor\(s\) required fallback")


@dataclass(slots=True)
class Made:
    """What llama.cpp said of its result: bytes and bits a weight of all tensors, and how many of
    them could not have the type, because their rows do not divide into its blocks."""

    size_bytes: int = 0
    bits: float = 0.0
    num_fallbacks: int = 0
    num_tensors: int = 0


def quantize(
    source: Path,
    target: Path,
    number: int,
    *,
    threads: int,
    only_size: bool = False,
    on_progress: Callable[[float], None] = lambda _: None,
) -> Made:
    """Write ``source`` to ``target`` in the type of this number (``llama_ftype``).

    With ``only_size`` nothing is written. Raises `ModelLoadError` with llama.cpp's last error
    lines; ``target`` may then be there in part.
    """
    library.start()
    library.log.clear()
    made = Made()

    @C.llama_log_callback  # type: ignore[untyped-decorator]
    def read_log(level: int, text: bytes, _: Any) -> None:
        line = text.decode("utf-8", "replace")
        library.log.add(level, line)
        if step := STEP.match(line):
            made.num_tensors = int(step[2])
            on_progress(int(step[1]) / max(int(step[2]), 1))
        elif size := SIZE.search(line):
            made.size_bytes, made.bits = int(float(size[1]) * (1 << 20)), float(size[2])
        elif fallback := FALLBACK.search(line):
            made.num_fallbacks = int(fallback[1])

    C.llama_log_set(read_log, ctypes.c_void_p(0))
    params = C.llama_model_quantize_default_params()
    params.ftype, params.nthread = number, threads
    params.allow_requantize, params.dry_run = True, only_size
    try:
        failed = C.llama_model_quantize(
            os.fsencode(source), os.fsencode(target), ctypes.byref(params)
        )
    finally:
        library.keep_log()
    if failed:
        why = "; ".join(library.log.errors())
        raise ModelLoadError(f"llama.cpp could not quantize {source.name}: {why}")
    return made
