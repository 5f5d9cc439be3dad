"""The spans and metrics that a real receiver of OTLP over HTTP gets."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from fakes import FakeClient
from gateway_client import CHAT, Api
from governed import until
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status
from otlp_receiver import PARENT, TRACE, Receiver, ask, forget_variables, receiving, values

from llmkit.gateway.exchange import Exchange
from llmkit.gateway.ops.tracing import DURATION_S, FIRST_S, TOKEN_S

INTERNAL, SERVER = Span.SPAN_KIND_INTERNAL, Span.SPAN_KIND_SERVER


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    forget_variables(monkeypatch)


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as receiver:
        yield receiver


async def test_a_request_and_its_phases(model: FakeClient, receiver: Receiver) -> None:
    body = {**CHAT, "seed": 7, "stop": ["never"], "top_p": 0.5, "stream": True}
    before = time.time_ns()
    await ask(
        receiver,
        lambda api: api.fetch("POST", "/v1/chat/completions", CHAT),
        lambda api: api.fetch("POST", "/v1/chat/completions", body, {"traceparent": PARENT}),
    )
    after = time.time_ns()
    root, span = receiver.named("chat fake")
    assert root.kind == span.kind == SERVER
    assert not root.parent_span_id and len(root.trace_id) == 16 and root.trace_id.hex() != TRACE
    assert span.trace_id.hex() == TRACE and span.parent_span_id.hex() == "b7ad6b7169203331"
    assert span.status.code == Status.STATUS_CODE_UNSET
    said = values(span.attributes)
    first = said.pop("gen_ai.response.time_to_first_chunk")
    assert 0 < first < 10 and said.pop("gen_ai.response.id").startswith("chatcmpl-")
    assert said.pop("llmkit.request_id") and said.pop("gen_ai.usage.cache_read.input_tokens") > 0
    assert said == {
        "gen_ai.operation.name": "chat", "gen_ai.provider.name": "llmkit",
        "gen_ai.request.model": "fake", "gen_ai.response.model": "fake",
        "gen_ai.request.max_tokens": 6, "gen_ai.request.temperature": 0.0,
        "gen_ai.request.top_p": 0.5, "gen_ai.request.top_k": said["gen_ai.request.top_k"],
        "gen_ai.request.seed": 7, "gen_ai.request.stream": True,
        "gen_ai.request.stop_sequences": ["never"], "gen_ai.output.type": "text",
        "gen_ai.response.finish_reasons": ["length"],
        "gen_ai.usage.input_tokens": 8, "gen_ai.usage.output_tokens": 6,
        "http.request.method": "POST", "http.route": "/v1/chat/completions",
        "http.response.status_code": 200,
    }  # fmt: skip
    assert isinstance(said["gen_ai.request.top_k"], float)

    for parent in (root, span):
        children = [s for s in receiver.spans if s.parent_span_id == parent.span_id]
        assert [c.name for c in children] == ["queue", "prefill", "decode"]
        assert all(c.kind == INTERNAL and c.trace_id == parent.trace_id for c in children)
        times = [parent.start_time_unix_nano, *(c.start_time_unix_nano for c in children)]
        assert times == sorted(times)
        for one, after_it in itertools.pairwise(children):
            assert abs(one.end_time_unix_nano - after_it.start_time_unix_nano) < 1000
        assert before <= parent.start_time_unix_nano < children[-1].end_time_unix_nano
        assert children[-1].end_time_unix_nano <= parent.end_time_unix_nano <= after
        prefill, decode = values(children[1].attributes), values(children[2].attributes)
        assert prefill["gen_ai.usage.input_tokens"] == 8
        assert decode["gen_ai.usage.output_tokens"] == 6
    assert len({s.span_id for s in receiver.spans}) == len(receiver.spans) == 8
    assert receiver.resources[0]["service.name"] == "llmkit"
    assert receiver.resources[0]["service.version"]


async def test_no_prompt_and_no_answer_leaves(model: FakeClient, receiver: Receiver) -> None:
    secret = "Ann Example has the flu"
    chat = {**CHAT, "messages": [{"role": "user", "content": secret}], "user": "ann@example.org"}
    await ask(
        receiver,
        lambda api: api.fetch("POST", "/v1/chat/completions", chat),
        lambda api: api.fetch("POST", "/v1/chat/completions", {**chat, "temperature": secret}),
        lambda api: api.fetch("POST", "/v1/embeddings", {"model": "fake", "input": secret}),
    )
    assert receiver.spans and not any(b"nn " in b or b"ann@" in b for b in receiver.bodies)


async def test_other_operations_and_refusals(model: FakeClient, receiver: Receiver) -> None:
    def broken(exchange: Exchange) -> Any:
        if exchange.path == "/v1/completions":
            raise RuntimeError("unforeseen")
        return contextmanager(lambda: iter([None]))()

    await ask(
        receiver,
        lambda api: api.fetch("POST", "/v1/embeddings", {"model": "fake", "input": "ab"}),
        lambda api: api.fetch("POST", "/v1/chat/completions", {**CHAT, "model": "no"}),
        lambda api: api.fetch("POST", "/v1/completions", {"model": "fake", "prompt": "a"}),
        lambda api: api.fetch("GET", "/v1/models"),
        lambda api: api.fetch("GET", "/no/such/route"),
        lambda api: api.fetch("GET", "/health"),
        lambda api: api.fetch("GET", "/"),
        stages=[broken],
    )
    (vectors,) = receiver.named("embeddings fake")
    said = values(vectors.attributes)
    assert said["gen_ai.operation.name"] == "embeddings" and said["gen_ai.usage.input_tokens"] == 2
    assert "gen_ai.usage.output_tokens" not in said and "error.type" not in said
    (refused,) = receiver.named("POST /v1/chat/completions")
    assert values(refused.attributes)["error.type"] == "model_not_found"
    assert refused.status.code == Status.STATUS_CODE_UNSET, "the client's fault, not ours"
    (failed,) = receiver.named("POST /v1/completions")
    assert values(failed.attributes)["error.type"] == "internal_error"
    assert failed.status.code == Status.STATUS_CODE_ERROR
    assert receiver.named("GET /v1/models") and receiver.named("GET")
    assert len(receiver.spans) == 5, "health and pages are not traced"


async def test_each_choice_has_its_phases(model: FakeClient, receiver: Receiver) -> None:
    await ask(receiver, lambda api: api.fetch("POST", "/v1/chat/completions", {**CHAT, "n": 3}))
    (span,) = receiver.named("chat fake")
    assert values(span.attributes)["gen_ai.request.choice.count"] == 3
    assert values(span.attributes)["gen_ai.response.finish_reasons"] == ["length"] * 3
    decodes = receiver.named("decode")
    assert [values(d.attributes)["llmkit.choice.index"] for d in decodes] == [0, 1, 2]
    assert len(receiver.spans) == 10


async def test_the_metrics_of_the_conventions(model: FakeClient, receiver: Receiver) -> None:
    await ask(
        receiver,
        lambda api: api.fetch("POST", "/v1/chat/completions", {**CHAT, "n": 2}),
        lambda api: api.fetch("POST", "/v1/embeddings", {"model": "fake", "input": "ab"}),
    )
    for name, bounds, count in (
        ("gen_ai.server.request.duration", DURATION_S, 2),
        ("gen_ai.server.time_to_first_token", FIRST_S, 2),
        ("gen_ai.server.time_per_output_token", TOKEN_S, 2),
    ):
        metric = receiver.metrics[name]
        points = metric.histogram.data_points
        assert metric.unit == "s" and sum(p.count for p in points) == count
        assert all(tuple(p.explicit_bounds) == bounds for p in points)
        said = values(points[0].attributes)
        assert said["gen_ai.provider.name"] == "llmkit"
        assert said["gen_ai.request.model"] == "fake" and said["gen_ai.operation.name"] == "chat"
    assert DURATION_S[0] == 0.01 and DURATION_S[-1] == 81.92


async def test_a_client_that_leaves_is_no_fault(model: FakeClient, receiver: Receiver) -> None:
    model.runner.step_s = 0.02

    async def leave(api: Api) -> None:
        host, port = api.url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        body = b'{"model":"fake","prompt":"a","max_tokens":2000,"stream":true}'
        writer.write(
            b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\n"
            b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body
        )
        await reader.readuntil(b"data: ")
        writer.close()
        await until(lambda: model.stats().num_running == 0)
        await asyncio.sleep(0.2)

    await ask(receiver, leave)
    (span,) = receiver.named("text_completion fake")
    assert values(span.attributes)["error.type"] == "client_gone"
    assert span.status.code == Status.STATUS_CODE_UNSET
