"""What was measured on this machine, kept from one process to the next; and the thread count that decodes best, measured when a model is first loaded."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmkit.engine.batch import Batch, Chunk, Truncate
from llmkit.models.registry import ModelSpec, cache_folder

if TYPE_CHECKING:
    from llmkit.engine.runner import ModelRunner

__all__ = ["best_threads", "file_mark", "hardware", "memory_bandwidth", "python_path", "result_file"]

ROUNDS, STEPS = 2, 5
MAX_SECONDS = 2.0
WORTH = 1.1  # another count must be so much faster


def file_mark(path: Path) -> str:
    """Stands for a model file: another version of it is another mark."""
    stat = path.stat()
    return hashlib.sha256(f"{path} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()[:12]


def result_file(spec: ModelSpec, cores: int, suffix: str = ".json") -> Path:
    """Where results for a model on this kind of machine are kept."""
    facts = f"{platform.machine()} {_processor()} {cores}"
    return cache_folder().parent / "tune" / f"{spec.name}-{file_mark(spec.path)}-{hashlib.sha256(facts.encode()).hexdigest()[:8]}{suffix}"


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line
    return platform.processor()


def best_threads(runner: ModelRunner, spec: ModelSpec) -> int:
    """The thread count that decodes best here; the runner's own is all cores. It must be idle.

    Where cores come in pairs (hyper-threading), half of them are often faster; with fewer than four there is nothing to choose. Half must win both of two
    rounds by a tenth. A busy machine, or a model that would take too long, is not measured, and nothing is kept then.
    """
    cores = runner.num_threads
    if cores < 4:
        return cores
    file = result_file(spec, cores, ".threads")
    try:
        kept = json.loads(file.read_text())["threads"]
        if isinstance(kept, int) and 1 <= kept <= cores:
            return kept
    except (OSError, ValueError, KeyError, TypeError):
        pass
    if hasattr(os, "getloadavg") and os.getloadavg()[0] > 0.5 * cores:
        return cores
    best = _measure(runner, cores)
    if best is not None:
        with contextlib.suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps({"threads": best}))
    runner.set_threads(best or cores)
    return best or cores


def _measure(runner: ModelRunner, cores: int) -> int | None:
    step = Batch((Chunk(0, 0, [0], False),), (Truncate(0, 0),))

    def seconds() -> float:
        start = time.perf_counter()
        runner.execute(step)
        return time.perf_counter() - start

    try:
        seconds()  # the first of all reads the weights
        if seconds() * 2 * ROUNDS * STEPS > MAX_SECONDS:
            return None
        wins = 0
        for _ in range(ROUNDS):
            times = {}
            for count in (cores, cores // 2):
                runner.set_threads(count)
                times[count] = min(seconds() for _ in range(STEPS))
            wins += times[cores // 2] * WORTH < times[cores]
        return cores // 2 if wins == ROUNDS else cores
    finally:
        runner.execute(Batch((), (Truncate(0, 0),)))


def python_path() -> str:
    """Where this very llmkit lies, also when it is not installed."""
    here = str(Path(__file__).resolve().parents[1])
    known = os.environ.get("PYTHONPATH", "")
    with contextlib.suppress(ValueError):
        known.split(os.pathsep).index(here)
        return known
    return f"{known}{os.pathsep}{here}" if known else here


def memory_bandwidth() -> float:
    """What this machine's memory delivers to all cores reading at once, bytes a second: the best of some passes over 256 MB."""
    from concurrent.futures import ThreadPoolExecutor

    import numpy as np
    import psutil

    size = 256 << 20
    if psutil.virtual_memory().available < 4 * size:
        size = 32 << 20
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parts = np.array_split(np.ones(size // 8), cores)
    best = 0.0
    with ThreadPoolExecutor(cores) as pool:
        for _ in range(5):
            began = time.perf_counter()
            list(pool.map(np.max, parts))  # reads everything, keeps nothing, and releases the interpreter
            best = max(best, size / (time.perf_counter() - began))
    return best


def hardware() -> dict[str, Any]:
    """Facts of this machine to put beside a measurement."""
    import psutil

    return {"machine": platform.machine(), "cores": os.cpu_count(), "ram_gb": round(psutil.virtual_memory().total / 1e9, 1), "system": platform.system()}
