"""How ggml's threads wait for each other, which OpenMP reads from the environment once, when it is loaded.

GNU's OpenMP spins for milliseconds at a barrier before it sleeps. That is right while every thread has a core. When something else takes one (a busy cell),
Linux may leave two of our threads on the other: then one spins away its whole time slice at each of hundreds of barriers a step, while the one it waits for
cannot run, and a step takes forty times as long. A short spin gives the core up instead; where every thread has a core it costs nothing that can be measured.
Where another library has loaded the same OpenMP before, or llama.cpp is built with another one, this does nothing.
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
    """While llama.cpp is loaded; the environment is then as it was, and what the user chose is left alone."""
    if any(name in os.environ for name in CHOSEN_BY_USER):
        yield
        return
    os.environ[NAME] = SPINS
    try:
        yield
    finally:
        del os.environ[NAME]
