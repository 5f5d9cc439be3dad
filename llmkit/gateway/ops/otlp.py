"""The OpenTelemetry SDK, set up to export by OTLP over HTTP without ever being in the way.

Threads of the SDK export in batches from bounded queues. A collector that is down or slow costs
spans, one warning, and nothing else.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.metrics import Meter
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import (
    MetricExportResult,
    MetricsData,
    PeriodicExportingMetricReader,
)
from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExportResult
from opentelemetry.sdk.trace.id_generator import IdGenerator
from opentelemetry.sdk.trace.sampling import Sampler

from llmkit.settings.values import masked
from llmkit.version import __version__

__all__ = ["Export"]

logger = logging.getLogger("llmkit.gateway")


class Export:
    """Where finished spans and measurements go.

    ``resource``, ``sampler`` and ``ids`` are the SDK's, as the environment sets them.
    """

    def __init__(
        self, endpoint: str | None, environment: Mapping[str, str], service_name: str
    ) -> None:
        self.resource = Resource.create(_service(environment, service_name))
        provider = TracerProvider(resource=self.resource, shutdown_on_exit=False)
        self.sampler: Sampler = provider.sampler
        self.ids: IdGenerator = provider.id_generator
        self._words = _LastWords()
        self._told = _Told(endpoint, self._words)
        self._spans: BatchSpanProcessor | None = None
        try:
            self._metrics = self._start(endpoint, environment)
        except BaseException:
            self._words.close()
            raise

    def _start(self, endpoint: str | None, environment: Mapping[str, str]) -> MeterProvider:
        told, readers = self._told, []
        if environment.get("OTEL_METRICS_EXPORTER") != "none":
            values = _Values(_path(endpoint, "v1/metrics"), told)
            readers.append(PeriodicExportingMetricReader(values))
        metrics = MeterProvider(readers, resource=self.resource, shutdown_on_exit=False)
        if environment.get("OTEL_TRACES_EXPORTER") != "none":
            self._spans = BatchSpanProcessor(_Spans(_path(endpoint, "v1/traces"), told))
        return metrics

    @property
    def traces(self) -> bool:
        """Whether spans are exported."""
        return self._spans is not None

    @property
    def meter(self) -> Meter:
        return self._metrics.get_meter("llmkit.gateway", __version__)

    def span(self, span: ReadableSpan) -> None:
        """Queue a span that has ended; when the queue is full, the oldest is lost."""
        if self._spans is not None:
            self._spans.on_end(span)

    def close(self, timeout_s: float) -> None:
        """Export what waits; give up after ``timeout_s``, or at once if it was in vain before."""
        if self._told.is_failing:
            timeout_s = min(timeout_s, 0.2)
        ending = [threading.Thread(target=self._metrics.shutdown, daemon=True)]
        if self._spans is not None:
            ending.append(threading.Thread(target=self._spans.shutdown, daemon=True))
        for thread in ending:
            thread.start()
        for thread in ending:
            thread.join(timeout_s / len(ending))
        self._words.close()


class _LastWords(logging.Handler):
    """Keeps what the SDK complains of, in place of a line in the log for each attempt."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.text = ""
        self._exporters = logging.getLogger("opentelemetry.exporter")
        self._sdk = logging.getLogger("opentelemetry.sdk")
        self._before = self._exporters.propagate, self._sdk.level
        self._exporters.addHandler(self)
        self._exporters.propagate = False
        self._sdk.setLevel(logging.CRITICAL)  # it says each span that finds the queue full

    def emit(self, record: logging.LogRecord) -> None:
        self.text = f"{masked(record.getMessage()):.300}"

    def close(self) -> None:
        self._exporters.removeHandler(self)
        self._exporters.propagate = self._before[0]
        self._sdk.setLevel(self._before[1])
        super().close()


class _Told:
    """Says once that exporting fails, and once that it works again."""

    def __init__(self, endpoint: str | None, words: _LastWords) -> None:
        self._endpoint, self._words = _without_secrets(endpoint), words
        self._lock = threading.Lock()
        self._failing: set[str] = set()

    @property
    def is_failing(self) -> bool:
        return bool(self._failing)

    def note(self, what: str, succeeded: bool) -> None:
        with self._lock:
            if succeeded and what in self._failing:
                self._failing.discard(what)
                logger.warning("%s are exported to %s again", what, self._endpoint)
            elif not succeeded and what not in self._failing:
                self._failing.add(what)
                logger.warning(
                    "%s cannot be exported to %s; they are lost until it answers (%s)",
                    what,
                    self._endpoint,
                    self._words.text or "no reason given",
                )


class _Spans(OTLPSpanExporter):
    def __init__(self, endpoint: str | None, told: _Told) -> None:
        super().__init__(endpoint=endpoint)
        self._told = told

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        result = super().export(spans)
        self._told.note("traces", result is SpanExportResult.SUCCESS)
        return result


class _Values(OTLPMetricExporter):
    def __init__(self, endpoint: str | None, told: _Told) -> None:
        super().__init__(endpoint=endpoint)
        self._told = told

    def export(
        self, metrics_data: MetricsData, timeout_millis: float | None = 10_000, **options: Any
    ) -> MetricExportResult:
        result = super().export(metrics_data, timeout_millis, **options)
        self._told.note("metrics", result is MetricExportResult.SUCCESS)
        return result


def _service(environment: Mapping[str, str], name: str) -> dict[str, str]:
    """The attributes of this service, unless the environment names it."""
    named = environment.get("OTEL_SERVICE_NAME") or "service.name=" in environment.get(
        "OTEL_RESOURCE_ATTRIBUTES", ""
    )
    return {SERVICE_VERSION: __version__, **({} if named else {SERVICE_NAME: name})}


def _path(endpoint: str | None, path: str) -> str | None:
    return None if endpoint is None else f"{endpoint.rstrip('/')}/{path}"


def _without_secrets(endpoint: str | None) -> str:
    """An address without its user and password."""
    if endpoint is None:
        return "the collector that the OTEL_ variables name"
    parts = urlsplit(endpoint)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
