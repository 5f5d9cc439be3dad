"""`/metrics`: what is counted, under which names, and that it stays bounded."""

from __future__ import annotations

import asyncio
import math
import random
import re
import string
import urllib.request
from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fakes import FakeClient
from gateway_client import CHAT, Api, is_error, serve
from jupyter_client_http import JupyterServer
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families
from shelf import Shelf

from llmkit.gateway.directory import EngineDirectory
from llmkit.gateway.exchange import Exchange
from llmkit.gateway.ops import llamacpp
from llmkit.gateway.ops.after import after
from llmkit.gateway.ops.llamacpp import LlamaCppMetrics
from llmkit.gateway.ops.metrics import Metrics
from llmkit.gateway.ops.totals import ModelTotals
from llmkit.protocol import (
    EngineState,
    EngineStats,
    ModelDescription,
    Origin,
    RequestMetrics,
)
from llmkit.system.gpu_memory import GpuMemory

GPU = GpuMemory("nvidia0", "NVIDIA H100", 3 << 30, 80 << 30, 0.5)
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def read(text: str) -> Samples:
    return {
        (s.name, frozenset(s.labels.items())): s.value
        for family in text_string_to_metric_families(text)
        for s in family.samples
    }


async def scrape(api: Api, **headers: str) -> Samples:
    reply = await api.fetch("GET", "/metrics", headers=headers)
    assert reply.code == 200, reply.body
    assert reply.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    return read(reply.body.decode())


def value(samples: Samples, name: str, **labels: str) -> float:
    """The sum of the series that have these labels; there must be one."""
    found = [v for (n, have), v in samples.items() if n == name and have >= labels.items()]
    assert found, f"there is no {name} with {labels}"
    return sum(found)


def metrics_of(directory: EngineDirectory, **options: Any) -> tuple[Metrics, dict[str, Any]]:
    """Metrics, and what a gateway needs to have them."""
    metrics = Metrics(directory, **{"gpus": lambda: [GPU], **options})
    return metrics, {"observers": [metrics.observer], "routes": metrics.routes()}


@pytest.fixture
async def measured(model: FakeClient) -> AsyncIterator[Api]:
    directory = EngineDirectory()
    _, options = metrics_of(directory)
    async for api in serve(None, directory=directory, **options):
        yield api


def test_speeds_are_not_taken_by_another_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(llamacpp, "time", SimpleNamespace(monotonic=lambda: now[0]))
    speeds = LlamaCppMetrics()
    model = ModelTotals(defaultdict(float), defaultdict(float), is_here=True)

    def speed() -> float:
        families = {f.name: f for f in speeds.families({"m": model})}
        (sample,) = families["llamacpp:predicted_tokens_seconds"].samples
        return sample.value

    assert speed() == 0
    speeds.note_answer("m", RequestMetrics(completion_tokens=11, decode_s=2.0))
    now[0] += 15
    assert speed() == 5
    now[0] += 9
    assert speed() == 5, "to the second reader too"
    now[0] += 6
    assert speed() == 0, "nothing since"


NAMES = set(re.findall(r"\S+", """
llamacpp:prompt_tokens_total llamacpp:prompt_tokens_cached_total llamacpp:prompt_seconds_total
llamacpp:tokens_predicted_total llamacpp:tokens_predicted_seconds_total
llamacpp:prompt_tokens_seconds llamacpp:predicted_tokens_seconds llamacpp:requests_processing
llamacpp:requests_deferred llamacpp:n_decode_total llamacpp:n_tokens_max
llamacpp:n_busy_slots_per_decode llamacpp:spec_decode_num_drafts_total
llamacpp:spec_decode_num_draft_tokens_total llamacpp:spec_decode_num_accepted_tokens_total
vllm:num_requests_running vllm:num_requests_waiting vllm:kv_cache_usage_perc
vllm:gpu_cache_usage_perc vllm:prefix_cache_queries_total vllm:prefix_cache_hits_total
vllm:gpu_prefix_cache_queries_total vllm:gpu_prefix_cache_hits_total vllm:prompt_tokens_total
vllm:generation_tokens_total vllm:request_success_total vllm:num_preemptions_total
vllm:time_to_first_token_seconds_bucket vllm:inter_token_latency_seconds_bucket
vllm:time_per_output_token_seconds_bucket vllm:request_time_per_output_token_seconds_bucket
vllm:e2e_request_latency_seconds_bucket vllm:request_queue_time_seconds_bucket
vllm:request_prefill_time_seconds_bucket vllm:request_decode_time_seconds_bucket
vllm:request_inference_time_seconds_bucket vllm:request_prompt_tokens_bucket
vllm:request_generation_tokens_bucket vllm:request_params_n_bucket
vllm:request_params_max_tokens_bucket vllm:spec_decode_num_drafts_total
vllm:spec_decode_num_draft_tokens_total vllm:spec_decode_num_accepted_tokens_total
vllm:cache_config_info
chat_completions_requests_total chat_inference_duration_seconds_bucket
chat_generated_tokens_total completions_errors_total
llmkit_http_requests_total llmkit_http_request_duration_seconds_bucket
llmkit_requests_refused_total llmkit_requests_total llmkit_request_duration_seconds_bucket
llmkit_time_to_first_token_seconds_bucket llmkit_queue_seconds_bucket
llmkit_inter_token_seconds_bucket llmkit_prompt_tokens_total llmkit_cached_tokens_total
llmkit_generation_tokens_total llmkit_draft_tokens_total llmkit_accepted_draft_tokens_total
llmkit_media_total llmkit_encoded_media_total llmkit_encode_seconds_total
llmkit_requests_encoding llmkit_encoded_bytes
llmkit_requests_running llmkit_requests_waiting llmkit_slots llmkit_kv_used_tokens
llmkit_kv_capacity_tokens llmkit_model_state llmkit_model_memory_bytes
llmkit_model_resident_memory_bytes llmkit_host_memory_bytes llmkit_gpu_memory_used_bytes
llmkit_gpu_memory_total_bytes llmkit_gpu_busy_ratio llmkit_build_info
process_resident_memory_bytes process_cpu_seconds_total process_open_fds
"""))  # fmt: skip


async def test_all_families_count_what_was_answered(measured: Api) -> None:
    api = measured
    assert (await api.post("/v1/chat/completions", {**CHAT, "n": 2}))[0] == 200
    assert (await api.events("/v1/chat/completions", CHAT))[-1] == "[DONE]"
    _, answer = await api.post("/v1/chat/completions", CHAT)
    cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert cached > 0
    text = {"model": "fake", "prompt": "hi there", "max_tokens": 4, "temperature": 0}
    assert (await api.post("/v1/completions", text))[0] == 200
    await api.post("/v1/embeddings", {"model": "fake", "input": "ab"})
    is_error(await api.fetch("POST", "/v1/chat/completions", {**CHAT, "model": "no"}), 404)
    is_error(await api.fetch("POST", "/v1/chat/completions", {**CHAT, "temperature": -1}), 400)

    async def counted() -> Samples:
        samples = await scrape(api)
        while value(samples, "vllm:generation_tokens_total") < 28:  # engines tell twice a second
            await asyncio.sleep(0.1)
            samples = await scrape(api)
        return samples

    samples = await asyncio.wait_for(counted(), 30)
    there = {name for name, _ in samples}
    assert there >= NAMES, NAMES - there

    vllm = {"model_name": "fake", "engine": "0"}
    assert value(samples, "vllm:request_success_total", finished_reason="length", **vllm) == 5
    for name in ("time_to_first_token", "e2e_request_latency", "request_queue_time"):
        assert value(samples, f"vllm:{name}_seconds_count", **vllm) == 5
    # 4 answers of 6 tokens and one of 4: gaps between tokens.
    for name in ("vllm:inter_token_latency_seconds", "llmkit_inter_token_seconds"):
        assert value(samples, f"{name}_count") == 4 * 5 + 3
        assert value(samples, f"{name}_bucket", le="+Inf") == 4 * 5 + 3
    assert value(samples, "vllm:generation_tokens_total", **vllm) == 28
    assert value(samples, "llamacpp:tokens_predicted_total", model="fake") == 28
    assert value(samples, "llmkit_generation_tokens_total", model="fake") == 28
    prompt = value(samples, "vllm:prompt_tokens_total", **vllm)
    hits = value(samples, "vllm:prefix_cache_hits_total", **vllm)
    assert prompt == 4 * 8 + 8 == value(samples, "vllm:prefix_cache_queries_total", **vllm)
    assert hits == value(samples, "vllm:gpu_prefix_cache_hits_total") >= cached
    assert value(samples, "llamacpp:prompt_tokens_total") == prompt - hits
    assert value(samples, "vllm:request_params_n_sum") == 2 + 1 + 1 + 1
    assert value(samples, "vllm:request_prompt_tokens_sum") == prompt
    assert value(samples, "llamacpp:n_tokens_max") == 14
    assert 1 <= value(samples, "llamacpp:n_busy_slots_per_decode") <= 2
    assert value(samples, "chat_completions_requests_total") == 5
    assert value(samples, "chat_generated_tokens_total") == 24
    assert value(samples, "completions_errors_total") == 2
    assert value(samples, "llmkit_requests_total", operation="chat", outcome="ok") == 3
    assert value(samples, "llmkit_requests_total", operation="embeddings", outcome="ok") == 1
    route = "/v1/chat/completions"
    for code, number in (("200", 3), ("404", 1), ("400", 1)):
        labels = {"method": "POST", "route": route, "status": code}
        assert value(samples, "llmkit_http_requests_total", **labels) == number
    assert value(samples, "llmkit_requests_refused_total", reason="model_not_found") == 1
    assert value(samples, "llmkit_gpu_memory_used_bytes", device="nvidia0") == GPU.used_bytes
    assert value(samples, "llmkit_model_state", state="ready") == 1
    assert value(samples, "llmkit_model_resident_memory_bytes", model="fake") > 1 << 20


async def test_the_format_never_renames(measured: Api) -> None:
    """Asked for OpenMetrics, prometheus_client would write vllm_x in place of vllm:x."""
    for accept in (
        "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8,text/plain;q=0.1",
        "text/plain;version=1.0.0;escaping=underscores",
        "*/*",
    ):
        samples = await scrape(measured, Accept=accept)
        assert (
            "vllm:num_requests_running",
            frozenset({("model_name", "fake"), ("engine", "0")}),
        ) in (samples)
        assert not any(name.startswith(("vllm_", "llamacpp_")) for name, _ in samples)


async def test_labels_are_bounded_and_name_nobody(model: FakeClient) -> None:
    directory = EngineDirectory()
    _, options = metrics_of(directory)
    letters = random.Random(7)

    async def ask(api: Api, times: int) -> str:
        for _ in range(times):
            word = "".join(letters.choices(string.ascii_letters, k=20))
            await api.fetch("GET", f"/{word}")
            await api.fetch("GET", f"/v1/models/{word}")
            await api.fetch("GET", f"/v1/responses/{word}")
            await api.fetch("POST", "/v1/chat/completions", {**CHAT, "model": word})
            await api.fetch("POST", "/v1/chat/completions", {**CHAT, "user": word})
        await Api(api.url, word).fetch("GET", "/v1/models")
        await api.fetch("GET", "/metrics")
        return word

    async for api in serve("secret-key", directory=directory, **options):
        await ask(api, 2)
        before = set(await scrape(api))
        word = await ask(api, 50)
        text = (await api.fetch("GET", "/metrics")).body.decode()
        samples = read(text)
        assert set(samples) == before
        assert value(samples, "llmkit_http_requests_total", route="unknown", status="404") == 52
        route = {"route": "/v1/models/{id}", "status": "404"}
        assert value(samples, "llmkit_http_requests_total", **route) == 52
        assert value(samples, "llmkit_requests_refused_total", reason="invalid_api_key") == 2
        assert "secret" not in text and "127.0.0.1" not in text and word not in text


async def test_the_metrics_need_the_key(model: FakeClient) -> None:
    directory = EngineDirectory()
    _, options = metrics_of(directory)
    async for api in serve("secret-key", directory=directory, **options):
        is_error(await Api(api.url).fetch("GET", "/metrics"), 401)
        assert value(await scrape(api), "llmkit_requests_refused_total", status="401") == 1


async def test_models_that_a_caller_may_not_use_are_not_shown(model: FakeClient) -> None:
    directory = EngineDirectory()
    metrics, options = metrics_of(directory)
    allowed = ["*"]
    async for api in serve(None, directory=directory, allowed_models=lambda: allowed, **options):
        assert (await api.post("/v1/chat/completions", CHAT))[0] == 200
        allowed[:] = ["another"]
        reply = await api.fetch("GET", "/metrics")
        assert b"llmkit_build_info" in reply.body and b"fake" not in reply.body
        assert value(read(metrics.text().decode()), "llmkit_requests_total", model="fake") == 1


class Remote:
    """An engine that only has counters."""

    def __init__(self, name: str, created: int, pid: int = 1) -> None:
        self.description = ModelDescription(name, f"{name}.gguf", created=created)
        self.origin = Origin("process", pid=pid)
        self.state = EngineState()
        self.now = EngineStats()

    def stats(self) -> EngineStats:
        return self.now

    def close(self) -> None:
        pass


def test_counters_never_fall_and_gauges_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmkit.gateway.directory.REFRESH_S", 0)
    shelf = Shelf()
    metrics = Metrics(EngineDirectory([shelf]), gpus=tuple)

    def tokens() -> float:
        return value(read(metrics.text().decode()), "llmkit_generation_tokens_total", model="m")

    def running() -> list[float]:
        name = "llmkit_requests_running"
        return [v for (n, _), v in read(metrics.text().decode()).items() if n == name]

    first, other = Remote("m", 1), Remote("m", 2)
    shelf.engines = [first, other]
    first.now, other.now = (
        EngineStats(generation_tokens_total=100, num_running=2),
        EngineStats(generation_tokens_total=10, num_running=1),
    )
    assert tokens() == 110 and running() == [3]
    first.now = EngineStats(generation_tokens_total=150)
    shelf.engines = [other]  # it ends with 50 more than was scraped
    assert tokens() == 160 and running() == [1]
    shelf.engines = []
    assert tokens() == 160 and running() == []
    third = Remote("m", 3)  # loaded again: its counters begin at zero
    third.now = EngineStats(generation_tokens_total=5)
    shelf.engines = [third]
    assert tokens() == 165
    again = Remote("m", 3)  # a connection made anew to the same engine knows nothing at first
    shelf.engines = [again]
    assert tokens() == 165
    again.now = EngineStats(generation_tokens_total=8, step_seconds_total=math.nan)
    assert tokens() == 168


def test_model_names_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmkit.gateway.directory.REFRESH_S", 0)
    shelf = Shelf()
    metrics = Metrics(EngineDirectory([shelf]), gpus=tuple)
    for i in range(400):
        shelf.engines = [Remote(f'm{i}"\n\\', i)]
        metrics.text()
    samples = read(metrics.text().decode())
    models = {dict(labels).get("model") for _, labels in samples} - {None}
    assert len(models) == 201 and "other" in models and 'm7"\n\\' in models


def test_one_fault_leaves_the_other_metrics(caplog: pytest.LogCaptureFixture) -> None:
    def broken() -> Sequence[GpuMemory]:
        raise RuntimeError("the driver is gone")

    samples = read(Metrics(EngineDirectory([]), gpus=broken).text().decode())
    assert value(samples, "process_resident_memory_bytes") > 0
    assert value(samples, "chat_completions_requests_total") == 0
    assert "the driver is gone" in caplog.text


async def test_an_observer_that_fails_fails_no_request(
    model: FakeClient, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(_: Exchange) -> None:
        raise RuntimeError("no room")

    async for api in serve(None, observers=[after(broken)]):
        assert (await api.post("/v1/chat/completions", CHAT))[0] == 200
        is_error(await api.fetch("GET", "/nothing"), 404)
    assert caplog.text.count("an observer of requests failed") == 2


def test_another_registry_takes_them_once() -> None:
    metrics, registry = Metrics(EngineDirectory([]), gpus=tuple), CollectorRegistry()
    registry.register(metrics)
    with pytest.raises(ValueError, match="uplicate"):
        registry.register(Metrics(EngineDirectory([]), gpus=tuple))
    registry.unregister(metrics)
    registry.register(metrics)


def test_jupyter_has_them_too(tmp_path: Path) -> None:
    server = JupyterServer(tmp_path)
    try:
        for place in ("/metrics", "/llmkit/metrics"):
            request = urllib.request.Request(
                server.url + place, headers={"Authorization": f"Bearer {server.token}"}
            )
            with urllib.request.urlopen(request, timeout=30) as reply:
                text, kind = reply.read().decode(), reply.headers["Content-Type"]
            samples = read(text)
            assert value(samples, "chat_completions_requests_total") == 0
            assert value(samples, "process_resident_memory_bytes") > 0
            assert "vllm:num_requests_running" in text and "llmkit_build_info" in text
            if place == "/llmkit/metrics":
                assert kind == "text/plain; version=0.0.4; charset=utf-8"
            else:
                assert "http_request_duration_seconds" in text, "Jupyter's own are still there"
    finally:
        server.stop()
