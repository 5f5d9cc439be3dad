"""What each request adds to the metrics, once it has ended. Tornado loop only."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping

from prometheus_client.core import Metric

from llmkit.gateway.exchange import Exchange
from llmkit.gateway.ops.after import after
from llmkit.gateway.ops.gaps import gaps
from llmkit.gateway.ops.health import PATHS
from llmkit.gateway.ops.llamacpp import LlamaCppMetrics
from llmkit.gateway.ops.series import Names, Series
from llmkit.gateway.ops.totals import ModelTotals
from llmkit.gateway.ops.vllm import FIRST_TOKEN_S, REQUEST_S, TOKEN_S, VllmMetrics
from llmkit.gateway.pipeline import Observer
from llmkit.protocol import Completion

__all__ = ["RequestMeter", "metering"]

METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
GENERATING = frozenset(
    {
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/responses",
        "/v1/messages",
        "/api/chat",
        "/api/generate",
    }
)
HTTP_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class RequestMeter:
    """Counts requests as they end, for all families of metrics.

    ``llmkit_`` times are seen from the gateway; those of ``vllm:`` and ``llamacpp:``, the queue and
    the gaps between tokens are the engine's, so an answer that was stored has none. Requests of
    notebooks do not come by here: they are in the engines' own counters only.
    """

    def __init__(self, names: Names) -> None:
        self._names = names
        self._vllm, self._llamacpp = VllmMetrics(), LlamaCppMetrics()
        self._series = series = Series()
        self._http = series.counter(
            "llmkit_http_requests", "HTTP requests answered.", ("method", "route", "status")
        )
        self._http_s = series.histogram(
            "llmkit_http_request_duration_seconds", "Duration of HTTP requests.", HTTP_S, ("route",)
        )
        self._refused = series.counter(
            "llmkit_requests_refused",
            "Requests answered with a client's error or 503, by the error's code.",
            ("reason", "status"),
        )
        self._requests = series.counter(
            "llmkit_requests",
            "Requests that used a model; the outcome is ok, error or client_gone.",
            ("model", "operation", "outcome"),
        )
        self._request_s = series.histogram(
            "llmkit_request_duration_seconds",
            "Duration of requests that used a model.",
            REQUEST_S,
            ("model", "operation"),
        )
        self._first_s = series.histogram(
            "llmkit_time_to_first_token_seconds",
            "Time from the request to its first token.",
            FIRST_TOKEN_S,
            ("model",),
        )
        self._queue_s = series.histogram(
            "llmkit_queue_seconds", "Time that answers waited in the engine.", FIRST_TOKEN_S,
            ("model",),
        )  # fmt: skip
        self._token_s = series.histogram(
            "llmkit_inter_token_seconds",
            "Time between tokens: each answer's longest gap, and the others at their mean.",
            (0.001, 0.0025, 0.005, *TOKEN_S),
            ("model",),
        )
        self._chats = series.counter("chat_completions_requests", "Chat requests.")
        self._chat_s = series.histogram(
            "chat_inference_duration_seconds", "Duration of chat requests.", REQUEST_S
        )
        self._chat_tokens = series.counter(
            "chat_generated_tokens", "Tokens generated for chat requests."
        )
        self._errors = series.counter(
            "completions_errors", "Requests for text that ended with an error."
        )

    def note(self, exchange: Exchange) -> None:
        """Count a request that has ended."""
        record, route = exchange.record, exchange.route or "unknown"
        seconds = time.monotonic() - record.started_at
        failed = record.status >= 400 and record.status != 499
        method = exchange.method if exchange.method in METHODS else "other"
        self._http.add(method, route, str(record.status))
        self._http_s.observe(seconds, route)
        if failed and record.status != 500 and route not in PATHS:  # no is an answer to a probe
            self._refused.add(record.error or "unknown", str(record.status))
        if record.operation:
            self._note_use(exchange, seconds)
        if record.operation == "chat" or route == "/v1/chat/completions":
            self._chats.add()
        if failed and (record.operation in ("chat", "text_completion") or route in GENERATING):
            self._errors.add()

    def _note_use(self, exchange: Exchange, seconds: float) -> None:
        record = exchange.record
        model, is_chat, gone = (
            self._names(record.model),
            record.operation == "chat",
            record.status == 499,
        )
        outcome = "client_gone" if gone else "error" if record.status >= 400 else "ok"
        self._requests.add(model, record.operation, outcome)
        self._request_s.observe(seconds, model, record.operation)
        if record.first_token_at is not None:
            self._first_s.observe(record.first_token_at - record.started_at, model)
        if is_chat:
            self._chat_s.observe(seconds)
        num_left = -len(record.completions)
        for request in record.requests:
            num_left += request.n
            self._vllm.note_request(model, request)
        for completion in record.completions if record.cache != "hit" else ():
            self._note_answer(model, completion)
            if is_chat:
                self._chat_tokens.add(by=completion.usage.completion_tokens)
        if num_left > 0:
            self._vllm.note_unfinished(model, num_left, gone=gone)

    def _note_answer(self, model: str, completion: Completion) -> None:
        times = completion.metrics
        self._vllm.note_answer(model, completion)
        self._llamacpp.note_answer(model, times)
        self._queue_s.observe(times.queue_s, model)
        for seconds, number in gaps(times):
            self._token_s.observe(seconds, model, times=number)

    def families(self, models: Mapping[str, ModelTotals]) -> Iterator[Metric]:
        """All of it, for a scrape; ``models`` are the engines' own counters."""
        yield from self._llamacpp.families(models)
        yield from self._vllm.families(models)
        yield from self._series.families()


def metering(meter: RequestMeter) -> Observer:
    """Has a meter count every request."""
    return after(meter.note)
