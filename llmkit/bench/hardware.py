"""The machine behind a measurement: its description and its memory bandwidth."""

from __future__ import annotations

import os
import platform
import time
from typing import Any

__all__ = ["hardware", "memory_bandwidth"]


def memory_bandwidth() -> float:
    """Memory bandwidth with all cores reading at once, in bytes per second.

    The best of 5 passes over 256 MiB (32 MiB where memory is short).
    """
    from concurrent.futures import ThreadPoolExecutor

    import numpy as np
    import psutil

    size = 256 << 20
    if psutil.virtual_memory().available < 4 * size:
        size = 32 << 20
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    parts = np.array_split(np.ones(size // 8), cores)
    best = 0.0
    with ThreadPoolExecutor(cores) as pool:
        for _ in range(5):
            began = time.perf_counter()
            list(pool.map(np.max, parts))  # reads everything, keeps nothing, releases the GIL
            best = max(best, size / (time.perf_counter() - began))
    return best


def hardware() -> dict[str, Any]:
    """This machine's description, to store with a measurement."""
    import psutil

    return {
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "ram_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "system": platform.system(),
    }
