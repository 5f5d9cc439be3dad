"""Garbage collection in a process that imports much, then serves for long. Standard library only.

While modules are imported, objects become many and none is garbage: collections take a tenth of the
time. Later a full one looks at all of them, and every stream waits meanwhile.
"""

from __future__ import annotations

import gc

__all__ = ["pause", "resume", "settle"]


def pause() -> None:
    """No collections until `resume`."""
    gc.disable()


def resume() -> None:
    """Collect garbage, but never look again at what is there now."""
    gc.freeze()
    gc.enable()


def settle() -> None:
    """Nor at what has been made since `resume` and is no garbage."""
    gc.collect()  # quick: of what is there since
    gc.freeze()
