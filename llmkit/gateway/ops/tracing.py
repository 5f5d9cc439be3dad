"""Spans and metrics of requests by OpenTelemetry's conventions for generative AI.

A request's spans are made once it has ended, from the times that the gateway and the engine took:
the request, and below it queue, prefill and decode of each answer. Nothing of this runs in kernels
or engines, and nothing for each token. The names are those of the conventions (status Development,
v0.1.0 of semantic-conventions-genai). Prompts and answers are never part of it. Tornado loop only;
exports run on threads of the SDK.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

from opentelemetry import propagate, trace
from opentelemetry.context import Context
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.sampling import Decision
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags

from llmkit.gateway.exchange import Exchange
from llmkit.gateway.ops.after import after
from llmkit.gateway.ops.health import is_quiet
from llmkit.gateway.ops.otlp import Export
from llmkit.gateway.ops.series import Names
from llmkit.gateway.pipeline import Observer
from llmkit.gateway.record import Record
from llmkit.version import __version__

__all__ = ["Tracer", "tracing"]

PROVIDER = "llmkit"
MAX_ANSWERS = 16  # of a request, that get spans of their own
MAX_STOP = 100  # characters of a stop string
SAMPLED = TraceFlags(TraceFlags.SAMPLED)
DURATION_S = tuple(0.01 * 2**k for k in range(14))  # as the conventions say, as the other two
TOKEN_S = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
FIRST_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
)  # fmt: skip
Attributes = dict[str, Any]


class Tracer:
    """Makes the spans and ``gen_ai.server`` metrics of requests, and has them exported.

    Sampling, batches, headers and the rest are set by the standard ``OTEL_`` variables. ``close``
    exports what waits, for a few seconds at most.
    """

    def __init__(
        self, endpoint: str | None, environment: Mapping[str, str], service_name: str
    ) -> None:
        self._export = Export(endpoint, environment, service_name)
        self._scope = InstrumentationScope("llmkit.gateway", __version__)
        self._names = Names()
        self._fields = tuple(propagate.get_global_textmap().fields)
        meter = self._export.meter
        self._duration = meter.create_histogram(
            "gen_ai.server.request.duration",
            "s",
            "Generative AI server request duration, to the last byte.",
            explicit_bucket_boundaries_advisory=DURATION_S,
        )
        self._first = meter.create_histogram(
            "gen_ai.server.time_to_first_token",
            "s",
            "Time to generate the first token of successful responses.",
            explicit_bucket_boundaries_advisory=FIRST_S,
        )
        self._token = meter.create_histogram(
            "gen_ai.server.time_per_output_token",
            "s",
            "Time per output token generated after the first one.",
            explicit_bucket_boundaries_advisory=TOKEN_S,
        )

    @property
    def observer(self) -> Observer:
        """Notes every request of a gateway."""
        return tracing(self)

    def close(self, timeout_s: float = 3.0) -> None:
        """Export what waits and end, after ``timeout_s`` in any case."""
        self._export.close(timeout_s)

    def note(self, exchange: Exchange) -> None:
        """Trace a request that has ended."""
        if is_quiet(exchange.path):
            return
        end, end_ns = time.monotonic(), time.time_ns()
        if exchange.record.operation:
            self._measure(exchange.record, end)
        if self._export.traces:
            self._trace(exchange, end, end_ns)

    def _measure(self, record: Record, end: float) -> None:
        attributes: Attributes = {
            "gen_ai.operation.name": record.operation,
            "gen_ai.provider.name": PROVIDER,
            "gen_ai.request.model": self._names(record.model),
        }
        error = _error(record)
        duration = attributes | {"error.type": error} if error else attributes
        self._duration.record(end - record.started_at, duration)
        if error or record.cache == "hit":
            return
        for times in record.metrics:
            self._first.record(times.ttft_s, attributes)
            if times.completion_tokens > 1:
                self._token.record(times.tpot_s, attributes)

    def _trace(self, exchange: Exchange, end: float, end_ns: int) -> None:
        record, export = exchange.record, self._export
        context = self._parent(exchange)
        parent = trace.get_current_span(context).get_span_context()
        if parent.is_valid:
            trace_id, above = parent.trace_id, parent
        else:
            trace_id, above = export.ids.generate_trace_id(), None
        name = (
            f"{record.operation} {record.model}"
            if record.operation
            else f"{exchange.method} {exchange.route}".strip()
        )
        attributes = _attributes(exchange)
        sample = export.sampler.should_sample(
            context, trace_id, name, SpanKind.SERVER, attributes, None, parent.trace_state
        )
        if sample.decision is not Decision.RECORD_AND_SAMPLE:
            return

        def span(
            name: str, above: SpanContext | None, start: float, to: float, **more: Any
        ) -> SpanContext:
            own = SpanContext(
                trace_id, export.ids.generate_span_id(), False, SAMPLED, sample.trace_state
            )
            export.span(
                ReadableSpan(
                    name,
                    own,
                    above,
                    export.resource,
                    start_time=end_ns - int(1e9 * (end - start)),
                    end_time=end_ns - int(1e9 * (end - to)),
                    instrumentation_scope=self._scope,
                    **more,
                )
            )
            return own

        failed = record.status >= 500
        own = span(
            name,
            above,
            record.started_at,
            end,
            kind=SpanKind.SERVER,
            attributes={**attributes, **(sample.attributes or {})},
            status=Status(StatusCode.ERROR, record.error or None) if failed else Status(),
        )
        for phase, start, to, more in _phases(record, end):
            span(phase, own, start, to, attributes=more)

    def _parent(self, exchange: Exchange) -> Context:
        """The context that the client sent, if any."""
        sent = {name: exchange.header(name) for name in self._fields}
        carrier = {name: value for name, value in sent.items() if value is not None}
        return propagate.extract(carrier, Context()) if carrier else Context()


def tracing(tracer: Tracer) -> Observer:
    """Has a tracer note every request."""
    return after(tracer.note)


def _error(record: Record) -> str:
    """The error's code, or the status where there is none; empty for success."""
    return (record.error or str(record.status)) if record.status >= 400 else ""


def _phases(record: Record, end: float) -> Iterator[tuple[str, float, float, Attributes]]:
    """Name, start, end and attributes of what the engine did for each answer."""
    if record.submitted_at is None or record.cache == "hit":
        return
    arrived = record.submitted_at
    many = len(record.completions) > 1
    for i, times in enumerate(record.metrics[:MAX_ANSWERS]):
        which = {"llmkit.choice.index": i} if many else {}
        admitted, first = (
            min(end, arrived + times.queue_s),
            min(end, arrived + max(times.queue_s, times.ttft_s)),
        )
        yield "queue", arrived, admitted, which
        prompt = {
            "gen_ai.usage.input_tokens": times.prompt_tokens,
            "gen_ai.usage.cache_read.input_tokens": times.cached_tokens,
        }
        yield "prefill", admitted, first, which | prompt
        answer = {"gen_ai.usage.output_tokens": times.completion_tokens}
        if times.draft_tokens:
            answer |= {
                "llmkit.draft_tokens": times.draft_tokens,
                "llmkit.accepted_tokens": times.accepted_tokens,
            }
        yield "decode", first, min(end, first + times.decode_s), which | answer


def _attributes(exchange: Exchange) -> Attributes:
    record = exchange.record
    attributes: Attributes = {
        "http.request.method": exchange.method,
        "http.response.status_code": record.status,
        "llmkit.request_id": exchange.request_id,
    }
    if exchange.route:
        attributes["http.route"] = exchange.route
    error = _error(record)
    if error:
        attributes["error.type"] = error
    if record.operation:
        attributes |= _use(exchange)
    return attributes


def _use(exchange: Exchange) -> Attributes:
    """What is said of a request that used a model."""
    record, usage = exchange.record, exchange.record.usage
    attributes: Attributes = {
        "gen_ai.operation.name": record.operation,
        "gen_ai.provider.name": PROVIDER,
        "gen_ai.request.model": record.model,
        "gen_ai.response.model": record.model,
        "gen_ai.usage.input_tokens": usage.prompt_tokens,
    }
    if not record.requests:
        return attributes
    request = record.requests[0]
    sampling, num_choices = request.sampling, sum(r.n for r in record.requests)
    attributes |= {
        "gen_ai.usage.output_tokens": usage.completion_tokens,
        "gen_ai.usage.cache_read.input_tokens": usage.cached_tokens,
        "gen_ai.response.id": request.request_id,
        "gen_ai.response.finish_reasons": [c.finish_reason.value for c in record.completions],
        "gen_ai.request.temperature": sampling.temperature,
        "gen_ai.request.top_p": sampling.top_p,
        "gen_ai.request.top_k": float(sampling.top_k),
        "gen_ai.output.type": "json" if _is_json(request.sampling.grammar) else "text",
    }
    for name, value in (
        ("gen_ai.request.max_tokens", sampling.max_tokens),
        ("gen_ai.request.seed", sampling.seed),
        ("gen_ai.request.stream", exchange.streaming or None),
        ("gen_ai.request.choice.count", num_choices if num_choices > 1 else None),
        ("gen_ai.request.presence_penalty", sampling.presence_penalty or None),
        ("gen_ai.request.frequency_penalty", sampling.frequency_penalty or None),
        ("gen_ai.request.stop_sequences", [s[:MAX_STOP] for s in sampling.stop] or None),
        ("gen_ai.usage.reasoning.output_tokens", usage.reasoning_tokens or None),
        ("llmkit.response_cache", record.cache or None),
    ):
        if value is not None:
            attributes[name] = value
    if exchange.streaming and record.first_token_at is not None:
        first = record.first_token_at - record.started_at
        attributes["gen_ai.response.time_to_first_chunk"] = first
    return attributes


def _is_json(grammar: Any) -> bool:
    return grammar is not None and grammar.kind == "json_schema"
