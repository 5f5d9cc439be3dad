"""`/metrics` for Prometheus: llama-server's names, vLLM's, our own, and those of older services.

Composes the collectors. Tornado loop only. Labels are bounded: models that are here, patterns of
routes, codes of errors; never a path, a prompt or a caller.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from llmkit.gateway.access.permission import may_use
from llmkit.gateway.directory import EngineDirectory
from llmkit.gateway.exchange import Exchange
from llmkit.gateway.ops.lifecycle import Lifecycle
from llmkit.gateway.ops.machine import engine_families, machine_families, memory_families
from llmkit.gateway.ops.meter import RequestMeter, metering
from llmkit.gateway.ops.openapi import Route
from llmkit.gateway.ops.series import Names
from llmkit.gateway.ops.totals import EngineTotals
from llmkit.gateway.pipeline import Observer
from llmkit.system.gpu_memory import GpuMemory, Gpus
from llmkit.workers.place import ModelStatus

__all__ = ["CONTENT_TYPE", "Metrics"]

logger = logging.getLogger("llmkit.gateway")

# Never OpenMetrics: asked for that, prometheus_client would write vllm_x for vllm:x.
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class CacheCounts(Protocol):
    """What is read of a `ResponseCache`."""

    @property
    def hits(self) -> int: ...

    @property
    def joined(self) -> int: ...

    @property
    def misses(self) -> int: ...

    @property
    def num_bytes(self) -> int: ...

    def __len__(self) -> int: ...


class Metrics(Collector):
    """All metrics of a gateway, as a collector of `prometheus_client`.

    >>> from llmkit.gateway.directory import EngineDirectory
    >>> b"llmkit_build_info" in Metrics(EngineDirectory([])).text()
    True

    ``offered`` gives the models of a `ModelManager`, whose changes `changed` must be told;
    ``response_cache`` is the gateway's; ``gpus`` tells the GPUs' memory, and must not wait for it.
    `observer` has requests counted, `routes` serve the text; in another server's registry, register
    the object itself.
    """

    def __init__(
        self,
        directory: EngineDirectory,
        *,
        offered: Callable[[], Sequence[ModelStatus]] = tuple,
        response_cache: CacheCounts | None = None,
        gpus: Callable[[], Sequence[GpuMemory]] | None = None,
    ) -> None:
        self._names = names = Names()
        self._totals = EngineTotals(directory, names)
        self._meter = RequestMeter(names)
        self._lifecycle = Lifecycle(names, offered)
        self._response_cache = response_cache
        self._gpus = Gpus().read if gpus is None else gpus
        self._registry = CollectorRegistry()
        self._registry.register(self)
        ProcessCollector(registry=self._registry)

    @property
    def observer(self) -> Observer:
        """Counts every request of a gateway."""
        return metering(self._meter)

    def changed(self, status: ModelStatus) -> None:
        """Count what has happened to a model. Any thread."""
        self._lifecycle.changed(status)

    def routes(self) -> list[Route]:
        return [Route("GET", "/metrics", self.serve, "Metrics for Prometheus")]

    async def serve(self, exchange: Exchange) -> None:
        families = [_visible(family) for family in self._registry.collect()]
        # The larger part of the work is text, which need not hold up streams.
        text = await asyncio.to_thread(generate_latest, _Given(families))
        exchange.send_bytes(text, content_type=CONTENT_TYPE)

    def text(self) -> bytes:
        """The metrics in Prometheus' text format, version 0.0.4."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """All families. A caller's limits do not apply: sums must be those of all models."""
        yield from contextvars.Context().run(lambda: list(self._families()))

    def describe(self) -> Iterator[Metric]:
        """The names, by which a registry finds duplicates; reads nothing."""
        yield from self._meter.families({})
        yield from engine_families({})

    def _families(self) -> Iterator[Metric]:
        models, entries = self._totals.read()
        parts: list[Callable[[], Iterator[Metric]]] = [
            lambda: self._meter.families(models),
            lambda: engine_families(models),
            lambda: self._lifecycle.families(entries),
            lambda: memory_families(entries, self._names),
            lambda: machine_families(self._gpus),
            lambda: _cache_families(self._response_cache),
        ]
        for part in parts:
            try:
                yield from list(part())
            except Exception:  # the others must still be served, those of Jupyter among them
                logger.exception("some metrics could not be read")


class _Given(Collector):
    """Families that were collected before."""

    def __init__(self, families: Sequence[Metric]) -> None:
        self._families = families

    def collect(self) -> Sequence[Metric]:
        return self._families


def _visible(family: Metric) -> Metric:
    """A family without the models that the caller of this request may not use."""
    family.samples = [s for s in family.samples if _is_visible(s.labels)]
    return family


def _is_visible(labels: Mapping[str, str]) -> bool:
    model = labels.get("model") or labels.get("model_name")
    return model is None or may_use(model)


def _cache_families(cache: CacheCounts | None) -> Iterator[Metric]:
    if cache is None:
        return
    requests = CounterMetricFamily(
        "llmkit_response_cache_requests",
        "Requests that stored answers served (hit), a running one (joined), or none (miss).",
        labels=("result",),
    )
    requests.add_metric(("hit",), cache.hits - cache.joined)
    requests.add_metric(("joined",), cache.joined)
    requests.add_metric(("miss",), cache.misses)
    yield requests
    yield GaugeMetricFamily(
        "llmkit_response_cache_bytes", "Size of the stored answers.", value=cache.num_bytes
    )
    yield GaugeMetricFamily(
        "llmkit_response_cache_entries", "Number of stored answers.", value=len(cache)
    )
