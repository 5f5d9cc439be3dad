"""How ggml's threads wait for each other: OpenMP reads it from the environment once, when loaded.

GNU's OpenMP spins for milliseconds at a barrier before it sleeps. That is right while every thread
has a core. When something else takes one (a busy cell), Linux may leave two of our threads on the
other: one then spins away its whole time slice at each of hundreds of barriers per step, while the
thread it waits for cannot run, and a step takes forty times as long. With short spins, waiting
threads yield their core quickly; where every thread has a core, that costs nothing measurable. If
another library loaded the same OpenMP before, or llama.cpp is built with another one, this has no
effect.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

__all__ = ["short_spins"]

SPINS = "3000"  # about a tenth of a millisecond
NAME = "GOMP_SPINCOUNT"
CHOSEN_BY_USER = (NAME, "OMP_WAIT_POLICY")


@contextlib.contextmanager
def short_spins() -> Iterator[None]:
    """Short spins for an OpenMP loaded inside; the environment is restored afterwards, and the
    user's own choice is left alone."""
    if any(name in os.environ for name in CHOSEN_BY_USER):
        yield
        return
    os.environ[NAME] = SPINS
    try:
        yield
    finally:
        del os.environ[NAME]
