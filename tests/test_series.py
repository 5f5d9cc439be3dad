"""The numbers behind the metrics: bounded, and never falling."""

from __future__ import annotations

import math

from shelf import status

from llmkit.gateway.ops.lifecycle import Lifecycle
from llmkit.gateway.ops.series import Counter, Histogram, Names


def test_series_take_no_nonsense() -> None:
    histogram = Histogram("h", "help", (1, 2))
    for number in (math.nan, math.inf, -1.0, 0.5, 2.0, 9.0):
        histogram.observe(number, times=2)
    samples = {(s.name, s.labels.get("le")): s.value for s in histogram.family().samples}
    assert samples == {
        ("h_bucket", "1.0"): 2, ("h_bucket", "2.0"): 4, ("h_bucket", "+Inf"): 6,
        ("h_count", None): 6, ("h_sum", None): 23.0,
    }  # fmt: skip
    counter = Counter("c", "help", ("a", "b"))
    for i in range(5000):
        counter.add(str(i), "x")
    samples = counter.family().samples
    assert len(samples) == 2001 and sum(s.value for s in samples) == 5000
    assert Names(most=0)("m") == "other"


def test_a_models_life_is_counted() -> None:
    life = Lifecycle(Names(), lambda: [status("ready", loads=2, load_s=1.5)])
    for phase, restarts in (
        ("loading", 0), ("ready", 0), ("restarting", 1), ("restarting", 2), ("ready", 2),
        ("draining", 2), ("stopping", 2), ("unloaded", 0), ("loading", 0), ("ready", 0),
        ("restarting", 1), ("failed", 1), ("loading", 0), ("failed", 0),
    ):  # fmt: skip
        life.changed(status(phase, restarts=restarts))
    samples = {
        (s.name, s.labels.get("state")): s.value for f in life.families([]) for s in f.samples
    }
    assert samples["llmkit_model_loads_total", None] == 2
    assert samples["llmkit_model_unloads_total", None] == 1
    assert samples["llmkit_model_restarts_total", None] == 3
    assert samples["llmkit_model_crashes_total", None] == 4  # three restarts, then given up
    assert samples["llmkit_model_failures_total", None] == 2
    assert samples["llmkit_model_state", "ready"] == 1
    assert samples["llmkit_model_state", "failed"] == 0
    assert samples["llmkit_model_load_seconds", None] == 1.5
