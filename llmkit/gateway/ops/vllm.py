"""vLLM's metrics, by its names, buckets and labels, so that its dashboards and routers work here.

Tornado loop only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from llmkit.gateway.ops.gaps import gaps
from llmkit.gateway.ops.series import Series
from llmkit.gateway.ops.totals import ModelTotals
from llmkit.protocol import Completion, FinishReason, GenerationRequest

__all__ = ["FIRST_TOKEN_S", "REQUEST_S", "TOKEN_S", "VllmMetrics"]

FIRST_TOKEN_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40,
    80, 160, 640, 2560,
)  # fmt: skip
TOKEN_S = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80,
)  # fmt: skip
REQUEST_S = (
    0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680,
)  # fmt: skip
TOKENS = tuple(m * 10**e for e in range(6) for m in (1, 2, 5))[:-2]  # to 100,000
LABELS = ("model_name", "engine")
ENGINE = "0"  # vLLM numbers its engines; here a model has one
BLOCK = 64  # tokens; routers think in blocks of cells
REASONS = {
    FinishReason.STOP: "stop",
    FinishReason.TOOL_CALLS: "stop",
    FinishReason.LENGTH: "length",
    FinishReason.REPETITION: "repetition",
    FinishReason.ABORT: "abort",
    FinishReason.ERROR: "error",
}
COUNTERS = (
    ("prompt_tokens", "Number of prefill tokens processed.", "prompt_tokens_total"),
    ("generation_tokens", "Number of generation tokens processed.", "generation_tokens_total"),
    ("prefix_cache_queries", "Prefix cache queries, in tokens.", "prompt_tokens_total"),
    ("prefix_cache_hits", "Prefix cache hits, in tokens.", "cached_tokens_total"),
    (
        "gpu_prefix_cache_queries",
        "Deprecated: use vllm:prefix_cache_queries.",
        "prompt_tokens_total",
    ),
    ("gpu_prefix_cache_hits", "Deprecated: use vllm:prefix_cache_hits.", "cached_tokens_total"),
    ("num_preemptions", "Cumulative number of preemptions.", "preemptions_total"),
    ("spec_decode_num_drafts", "Number of drafts.", "drafts_total"),
    ("spec_decode_num_draft_tokens", "Number of draft tokens.", "draft_tokens_total"),
    ("spec_decode_num_accepted_tokens", "Number of accepted tokens.", "accepted_tokens_total"),
)


class VllmMetrics:
    """``vllm:`` metrics: histograms of answers that came through the gateway, and the engines'."""

    def __init__(self) -> None:
        self._series = series = Series()
        self._success = series.counter(
            "vllm:request_success",
            "Count of finished requests, by the reason.",
            (*LABELS, "finished_reason"),
        )
        self._first_s = series.histogram(
            "vllm:time_to_first_token_seconds",
            "Histogram of time to first token in seconds.",
            FIRST_TOKEN_S,
            LABELS,
        )
        self._token_s = series.histogram(
            "vllm:inter_token_latency_seconds",
            "Histogram of inter-token latency in seconds.",
            TOKEN_S,
            LABELS,
        )
        self._mean_s = series.histogram(
            "vllm:request_time_per_output_token_seconds",
            "Histogram of a request's mean time per output token in seconds.",
            TOKEN_S,
            LABELS,
        )
        self._whole_s, self._queue_s, self._prefill_s, self._decode_s, self._run_s = (
            series.histogram(
                f"vllm:{name}_seconds", f"Histogram of {what} in seconds.", REQUEST_S, LABELS
            )
            for name, what in (
                ("e2e_request_latency", "end-to-end request latency"),
                ("request_queue_time", "time spent waiting"),
                ("request_prefill_time", "time spent in prefill"),
                ("request_decode_time", "time spent in decode"),
                ("request_inference_time", "time spent running"),
            )
        )
        self._prompt, self._answer, self._max_tokens = (
            series.histogram(f"vllm:request_{name}", f"Histogram of {what}.", TOKENS, LABELS)
            for name, what in (
                ("prompt_tokens", "prefill tokens of a request"),
                ("generation_tokens", "generation tokens of a request"),
                ("params_max_tokens", "the max_tokens request parameter"),
            )
        )
        self._n = series.histogram(
            "vllm:request_params_n", "Histogram of the n request parameter.", (1, 2, 5, 10, 20),
            LABELS,
        )  # fmt: skip

    def note_request(self, model: str, request: GenerationRequest) -> None:
        self._n.observe(request.n, model, ENGINE)
        if request.sampling.max_tokens:
            self._max_tokens.observe(request.sampling.max_tokens, model, ENGINE)

    def note_unfinished(self, model: str, number: int, *, gone: bool) -> None:
        """Answers that did not end: the client went away, or there was an error."""
        self._success.add(model, ENGINE, "abort" if gone else "error", by=number)

    def note_answer(self, model: str, completion: Completion) -> None:
        times = completion.metrics
        prefill_s = max(0.0, times.ttft_s - times.queue_s)
        self._success.add(model, ENGINE, REASONS[completion.finish_reason])
        self._first_s.observe(times.ttft_s, model, ENGINE)
        self._queue_s.observe(times.queue_s, model, ENGINE)
        self._prefill_s.observe(prefill_s, model, ENGINE)
        self._decode_s.observe(times.decode_s, model, ENGINE)
        self._run_s.observe(prefill_s + times.decode_s, model, ENGINE)
        self._whole_s.observe(times.ttft_s + times.decode_s, model, ENGINE)
        self._prompt.observe(times.prompt_tokens, model, ENGINE)
        self._answer.observe(times.completion_tokens, model, ENGINE)
        if times.completion_tokens > 1:
            self._mean_s.observe(times.tpot_s, model, ENGINE)
            for seconds, number in gaps(times):
                self._token_s.observe(seconds, model, ENGINE, times=number)

    def families(self, models: Mapping[str, ModelTotals]) -> Iterator[Metric]:
        """All of it, for a scrape."""
        yield from self._series.families()
        yield self._token_s.family(
            "vllm:time_per_output_token_seconds",
            "Deprecated: use vllm:inter_token_latency_seconds.",
        )
        for name, text, field in COUNTERS:
            counter = CounterMetricFamily(f"vllm:{name}", text, labels=LABELS)
            for model, totals in models.items():
                counter.add_metric((model, ENGINE), totals.counted[field])
            yield counter
        here = {model: totals.now for model, totals in models.items() if totals.is_here}
        for name, text, value in (
            (
                "num_requests_running",
                "Number of requests in execution batches.",
                lambda now: now["num_running"],
            ),
            (
                "num_requests_waiting",
                "Number of requests waiting to be processed.",
                lambda now: now["num_waiting"],
            ),
            ("kv_cache_usage_perc", "KV-cache usage. 1 means 100 percent usage.", _usage),
            ("gpu_cache_usage_perc", "Deprecated: use vllm:kv_cache_usage_perc.", _usage),
        ):
            gauge = GaugeMetricFamily(f"vllm:{name}", text, labels=LABELS)
            for model, now in here.items():
                gauge.add_metric((model, ENGINE), value(now))
            yield gauge
        info = GaugeMetricFamily(
            "vllm:cache_config_info",
            "The KV cache in blocks.",
            labels=(*LABELS, "block_size", "num_gpu_blocks"),
        )
        for model, now in here.items():
            blocks = int(now["kv_capacity_tokens"]) // BLOCK
            info.add_metric((model, ENGINE, str(BLOCK), str(blocks)), 1)
        yield info


def _usage(now: Mapping[str, float]) -> float:
    return now["kv_used_tokens"] / now["kv_capacity_tokens"] if now["kv_capacity_tokens"] else 0.0
