"""The workers of one model: each is supervised and started again alone. Any thread."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from llmkit.errors import LLMKitError
from llmkit.protocol import EngineState
from llmkit.workers.supervisor import STOPPED_S, Supervisor

__all__ = ["Crew"]

STOPPED_BESIDE_S = 4.0  # where others go on: engines of other hosts may be silent for as long


class Crew:
    """As many workers of a task as there are ``replicas``: ready as soon as one is, gone once all
    are. ``on_ready`` is called whenever one has loaded."""

    def __init__(
        self, task: dict[str, Any], replicas: int, *, on_ready: Callable[[], None] = lambda: None
    ) -> None:
        stopped_s = STOPPED_S if replicas == 1 else STOPPED_BESIDE_S
        self._workers = [
            Supervisor(task, on_ready=on_ready, stopped_s=stopped_s) for _ in range(replicas)
        ]

    @property
    def state(self) -> EngineState:
        states = [worker.state for worker in self._workers]
        for phase in ("ready", "loading"):
            found = [state for state in states if state.phase == phase]
            if found:
                return max(found, key=lambda state: state.share or 0.0)
        return states[0]

    @property
    def num_ready(self) -> int:
        """How many have the model."""
        return sum(worker.state.phase == "ready" for worker in self._workers)

    @property
    def num_replicas(self) -> int:
        """How many there are to be."""
        return len(self._workers)

    @property
    def pids(self) -> tuple[int, ...]:
        """Process ids of those that run."""
        return tuple(worker.pid for worker in self._workers if worker.pid is not None)

    @property
    def restarts(self) -> int:
        """Of all together."""
        return sum(worker.restarts for worker in self._workers)

    @property
    def failure(self) -> LLMKitError | None:
        """Why the first was given up."""
        return next((w.failure for w in self._workers if w.failure is not None), None)

    def close(self) -> None:
        """End all, at the same time."""
        threads = [
            threading.Thread(target=w.close, name="llmkit-end", daemon=True) for w in self._workers
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def kill(self) -> None:
        """End all at once; idle prefixes are not saved."""
        for worker in self._workers:
            worker.kill()
