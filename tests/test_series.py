"""The numbers behind the metrics: bounded, never falling, and cheap."""

from __future__ import annotations

import logging
import math
import time
from types import SimpleNamespace
from typing import Any

from shelf import status

from llmkit.gateway.access.identity import LOCAL
from llmkit.gateway.ops import logs
from llmkit.gateway.ops.lifecycle import Lifecycle
from llmkit.gateway.ops.logs import JsonFormatter, LogHandler
from llmkit.gateway.ops.meter import RequestMeter
from llmkit.gateway.ops.series import Counter, Histogram, Names
from llmkit.gateway.ops.telemetry import start_telemetry
from llmkit.gateway.record import Record
from llmkit.protocol import Completion, FinishReason, GenerationRequest, RequestMetrics


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


def test_observing_costs_little() -> None:
    """Some 13, 27 and 60 microseconds a request here; the bounds are ten times that, since machines
    are slow and busy."""
    times = RequestMetrics(0.01, 0.1, 2.0, 0.2, 10, 0, 20)
    ended: Any = SimpleNamespace(
        method="POST", route="/v1/chat/completions", path="/v1/chat/completions", streaming=True,
        identity=LOCAL, address="127.0.0.1", request_id="r", header={}.get,
    )  # fmt: skip
    ended.record = Record(
        operation="chat", model="m", requests=[GenerationRequest("r", prompt="x")], status=200,
        completions=[Completion("x", FinishReason.STOP, metrics=times)],
    )  # fmt: skip
    ended.record.submitted_at = ended.record.started_at
    handler = LogHandler(lambda _: None, JsonFormatter())
    access = logging.getLogger("llmkit.access")
    access.addHandler(handler)
    access.propagate, level = False, access.level
    access.setLevel(logging.INFO)
    tracer = start_telemetry("http://127.0.0.1:9", {"OTEL_METRICS_EXPORTER": "none"})
    assert tracer is not None
    try:
        for note, most in (
            (RequestMeter(Names()).note, 130e-6),
            (logs.note_access, 270e-6),
            (tracer.note, 600e-6),
        ):
            best = math.inf
            for _ in range(20):
                start = time.perf_counter()
                for _ in range(100):
                    note(ended)
                best = min(best, (time.perf_counter() - start) / 100)
            assert best < most, f"{note} takes {1e6 * best:.0f} microseconds"
    finally:
        access.removeHandler(handler)
        access.propagate = True
        access.setLevel(level)
        handler.close()
        tracer.close(0.1)
