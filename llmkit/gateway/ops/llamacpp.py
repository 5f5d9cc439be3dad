"""llama-server's metrics by its names, each with the model as a label. Tornado loop only."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from llmkit.gateway.ops.totals import ModelTotals
from llmkit.protocol import RequestMetrics

__all__ = ["LlamaCppMetrics"]

LABELS = ("model",)
KEEP_S = 10.0
COUNTERS = (
    (
        "prompt_tokens_cached",
        "Number of prompt tokens reused from the cache.",
        "cached_tokens_total",
    ),
    ("tokens_predicted", "Number of generation tokens processed.", "generation_tokens_total"),
    ("n_decode", "Number of decodes.", "steps_total"),
    ("spec_decode_num_drafts", "Number of drafts verified.", "drafts_total"),
    ("spec_decode_num_draft_tokens", "Number of draft tokens.", "draft_tokens_total"),
    ("spec_decode_num_accepted_tokens", "Number of accepted tokens.", "accepted_tokens_total"),
)


@dataclass(slots=True)
class Phases:
    """Tokens of a model's finished requests, and the seconds of prefill and decode."""

    prompt_tokens: int = 0
    prompt_s: float = 0.0
    decode_tokens: int = 0
    decode_s: float = 0.0
    most_tokens: int = 0


class LlamaCppMetrics:
    """``llamacpp:`` metrics. The two speeds are averages since the last scrape, as llama.cpp's.

    A scrape within ten seconds of another gets the same speeds, so that several readers do not take
    them from each other.
    """

    def __init__(self) -> None:
        self._phases: dict[str, Phases] = {}
        self._before: dict[str, Phases] = {}
        self._speeds: dict[str, tuple[float, float]] = {}
        self._at = -math.inf

    def note_answer(self, model: str, times: RequestMetrics) -> None:
        phases = self._phases.setdefault(model, Phases())
        phases.prompt_tokens += times.prompt_tokens - times.cached_tokens
        phases.prompt_s += max(0.0, times.ttft_s - times.queue_s)
        phases.decode_tokens += max(0, times.completion_tokens - 1)
        phases.decode_s += times.decode_s
        phases.most_tokens = max(phases.most_tokens, times.prompt_tokens + times.completion_tokens)

    def families(self, models: Mapping[str, ModelTotals]) -> Iterator[Metric]:
        """All of it, for a scrape."""
        phases = {model: self._phases.get(model, Phases()) for model in models}
        counted = {model: totals.counted for model, totals in models.items()}
        yield _counter(
            "prompt_tokens",
            "Number of prompt tokens processed, without cached ones.",
            {m: c["prompt_tokens_total"] - c["cached_tokens_total"] for m, c in counted.items()},
        )
        for name, text, field in COUNTERS:
            yield _counter(name, text, {m: c[field] for m, c in counted.items()})
        yield _counter(
            "prompt_seconds",
            "Time that requests spent in prompt processing.",
            {m: p.prompt_s for m, p in phases.items()},
        )
        yield _counter(
            "tokens_predicted_seconds",
            "Time that requests spent generating tokens.",
            {m: p.decode_s for m, p in phases.items()},
        )
        yield _gauge(
            "n_tokens_max",
            "Largest observed sequence, prompt and answer.",
            {m: p.most_tokens for m, p in phases.items()},
        )
        yield _gauge(
            "n_busy_slots_per_decode",
            "Average number of busy slots of a decode.",
            {m: _ratio(c["busy_slots_total"], c["steps_total"]) for m, c in counted.items()},
        )
        here = {model: totals.now for model, totals in models.items() if totals.is_here}
        yield _gauge(
            "requests_processing",
            "Number of requests processing.",
            {m: now["num_running"] for m, now in here.items()},
        )
        yield _gauge(
            "requests_deferred",
            "Number of requests deferred.",
            {m: now["num_waiting"] for m, now in here.items()},
        )
        self._measure()
        speeds = {model: self._speeds.get(model, (0.0, 0.0)) for model in here}
        yield _gauge(
            "prompt_tokens_seconds",
            "Average prompt throughput in tokens/s, since the last scrape.",
            {model: prompt for model, (prompt, _) in speeds.items()},
        )
        yield _gauge(
            "predicted_tokens_seconds",
            "Average generation throughput in tokens/s, since the last scrape.",
            {model: decode for model, (_, decode) in speeds.items()},
        )

    def _measure(self) -> None:
        """The speeds since they were measured last, unless that was just now."""
        now = time.monotonic()
        if now - self._at < KEEP_S:
            return
        self._at, before = now, self._before
        self._before = {model: replace(kept) for model, kept in self._phases.items()}
        self._speeds = {
            model: _speeds(kept, before.get(model, Phases()))
            for model, kept in self._before.items()
        }


def _speeds(now: Phases, before: Phases) -> tuple[float, float]:
    """Tokens/s of prefill and decode between two counts."""
    return (
        _ratio(now.prompt_tokens - before.prompt_tokens, now.prompt_s - before.prompt_s),
        _ratio(now.decode_tokens - before.decode_tokens, now.decode_s - before.decode_s),
    )


def _ratio(amount: float, per: float) -> float:
    return amount / per if per > 0 else 0.0


def _counter(name: str, text: str, values: Mapping[str, float]) -> CounterMetricFamily:
    family = CounterMetricFamily(f"llamacpp:{name}", text, labels=LABELS)
    for model, value in values.items():
        family.add_metric((model,), value)
    return family


def _gauge(name: str, text: str, values: Mapping[str, float]) -> GaugeMetricFamily:
    family = GaugeMetricFamily(f"llamacpp:{name}", text, labels=LABELS)
    for model, value in values.items():
        family.add_metric((model,), value)
    return family
