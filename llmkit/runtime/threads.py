"""The thread count that decodes best, measured when a model is first loaded on a machine."""

from __future__ import annotations

import contextlib
import json
import os
import time
from typing import TYPE_CHECKING

from llmkit.engine.batch import Batch, Chunk, Truncate
from llmkit.models.marks import result_file
from llmkit.models.registry import ModelSpec

if TYPE_CHECKING:
    from llmkit.engine.runner import ModelRunner

__all__ = ["best_threads"]

ROUNDS, STEPS = 2, 5
MAX_SECONDS = 2.0
WORTH = 1.1  # another count must be this much faster


def best_threads(runner: ModelRunner, spec: ModelSpec) -> int:
    """The thread count that decodes best here; the default is all cores. The runner must be idle.

    With hyper-threading, half the cores are often faster; below four there is no choice. Half must
    win both of two rounds by a tenth. On a busy machine, or with a model that would take too long,
    nothing is measured or stored.
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
        seconds()  # the first run reads the weights
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
