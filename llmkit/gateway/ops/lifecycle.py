"""How often models were loaded, unloaded and lost, and in which state each one is."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import get_args

from prometheus_client.core import GaugeMetricFamily, Metric

from llmkit.gateway.directory import Entry
from llmkit.gateway.ops.series import Names, Series
from llmkit.workers.place import ModelStatus, Phase

__all__ = ["Lifecycle"]

LABELS = ("model",)
STATES = tuple(get_args(Phase))
RAN = ("ready", "restarting", "draining")  # what a crash can end


class Lifecycle:
    """Follows the models of a `ModelManager`.

    ``offered`` gives their states, ``changed`` must be told of each change. It may be called on any
    thread, all else on the Tornado loop.
    """

    def __init__(self, names: Names, offered: Callable[[], Sequence[ModelStatus]] = tuple) -> None:
        self._names, self._offered = names, offered
        self._lock = threading.Lock()
        self._before: dict[str, ModelStatus] = {}
        self._series = series = Series()
        self._loads = series.counter("llmkit_model_loads", "Times a model was loaded.", LABELS)
        self._unloads = series.counter(
            "llmkit_model_unloads", "Times a model was unloaded.", LABELS
        )
        self._crashes = series.counter(
            "llmkit_model_crashes", "Times a model's process ended by itself.", LABELS
        )
        self._restarts = series.counter(
            "llmkit_model_restarts", "Times a model's process was started again.", LABELS
        )
        self._failures = series.counter(
            "llmkit_model_failures", "Times a model could not be loaded, or was given up.", LABELS
        )

    def changed(self, status: ModelStatus) -> None:
        """Count what has happened to a model."""
        with self._lock:
            before = self._before.get(status.name)
            self._before[status.name] = status
            model = self._names(status.name)
            phase = "unloaded" if before is None else before.phase
            for counter in (self._loads, self._unloads, self._crashes, self._restarts):
                counter.add(model, by=0)
            if status.phase == "ready" and phase not in ("ready", "restarting", "draining"):
                self._loads.add(model)
            if phase in ("draining", "stopping") and status.phase in ("unloaded", "loading"):
                self._unloads.add(model)
            # A new worker counts its restarts from zero.
            known = 0 if before is None else before.restarts
            restarts = max(0, status.restarts - known)
            self._restarts.add(model, by=restarts)
            self._crashes.add(model, by=restarts)
            self._failures.add(model, by=0)
            if status.phase == "failed" and phase != "failed":
                self._failures.add(model)
                self._crashes.add(model, by=phase in RAN)

    def families(self, entries: Sequence[Entry]) -> Iterator[Metric]:
        """All of it, for a scrape; ``entries`` are the engines that are there."""
        with self._lock:
            families = list(self._series.families())
        yield from families
        statuses = self._offered()
        states: dict[str, str] = {self._names(s.name): s.phase for s in statuses}
        for entry in entries:
            states.setdefault(self._names(entry.client.description.name), entry.client.state.phase)
        state = GaugeMetricFamily(
            "llmkit_model_state", "1 for the state that a model is in.", labels=("model", "state")
        )
        for model, phase in states.items():
            for each in STATES:
                state.add_metric((model, each), float(each == phase))
        yield state
        load = GaugeMetricFamily(
            "llmkit_model_load_seconds", "Duration of a model's last load.", labels=LABELS
        )
        for status in statuses:
            if status.loads:
                load.add_metric((self._names(status.name),), status.load_s)
        yield load
