"""OpenTelemetry asked for, missing, sampled, or without anybody to send it to."""

from __future__ import annotations

import asyncio
import logging
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from fakes import FakeClient
from gateway_client import CHAT, serve
from jupyter_client_http import JupyterServer
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from otlp_receiver import PARENT, TRACE, Receiver, ask, forget_variables, receiving, traced

from llmkit.errors import InvalidRequestError
from llmkit.gateway.ops.telemetry import start_telemetry, wants_telemetry


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    forget_variables(monkeypatch)


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as receiver:
        yield receiver


@pytest.mark.parametrize(
    ("sampler", "parent", "number"),
    [
        ("always_off", PARENT, 0),
        ("always_on", None, 4),
        ("parentbased_always_off", PARENT, 4),
        ("parentbased_always_on", PARENT.removesuffix("01") + "00", 0),
        ("parentbased_traceidratio", None, 0),
        ("", "00-nonsense", 4),
        ("", "00-" + "0" * 32 + "-" + "0" * 16 + "-01", 4),
        ("", "ff" * 4000, 4),
    ],
)
async def test_the_standard_variables_sample(
    model: FakeClient, receiver: Receiver, monkeypatch: pytest.MonkeyPatch,
    sampler: str, parent: str | None, number: int,
) -> None:  # fmt: skip
    if sampler:
        monkeypatch.setenv("OTEL_TRACES_SAMPLER", sampler)
        monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", "0")
    headers = {"traceparent": parent} if parent else {}
    await ask(receiver, lambda api: api.fetch("POST", "/v1/chat/completions", CHAT, headers))
    assert len(receiver.spans) == number
    assert "gen_ai.server.request.duration" in receiver.metrics, "metrics count all"


async def test_the_environment_says_where_and_who(
    model: FakeClient, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.url)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "authorization=Bearer%20abc")
    monkeypatch.setenv("OTEL_SERVICE_NAME", "class-101")
    monkeypatch.setenv("OTEL_METRICS_EXPORTER", "none")
    with traced(None, service_name="ours") as (_, observers):
        async for api in serve(None, **observers):
            await api.fetch("POST", "/v1/chat/completions", CHAT)
    assert receiver.resources[0]["service.name"] == "class-101", "the variable goes before"
    assert receiver.headers[0]["authorization"] == "Bearer abc"
    assert len(receiver.spans) == 4 and not receiver.metrics


def test_jupyter_traces_too(receiver: Receiver, tmp_path: Path) -> None:
    traits = {"otlp_endpoint": receiver.url, "service_name": "labs"}
    server = JupyterServer(tmp_path, *(f"--LLMKitExtension.{k}={v}" for k, v in traits.items()))
    headers = {"Authorization": f"Bearer {server.token}", "traceparent": PARENT}
    try:
        request = urllib.request.Request(f"{server.url}/llmkit/v1/models", headers=headers)
        with urllib.request.urlopen(request, timeout=30) as reply:
            assert reply.status == 200
    finally:
        server.stop()
    (span,) = receiver.named("GET /v1/models")
    assert span.trace_id.hex() == TRACE and span.kind == Span.SPAN_KIND_SERVER
    assert receiver.resources[0]["service.name"] == "labs"


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


async def test_without_a_receiver_nothing_is_held_up(
    model: FakeClient, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One warning, however many spans are lost; and one line when it is back."""
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "8")
    monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "8")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "0.3")
    monkeypatch.setenv("OTEL_METRICS_EXPORTER", "none")
    caplog.set_level(logging.INFO)
    port = free_port()
    with traced(f"http://user:secret@127.0.0.1:{port}") as (_, observers):
        async for api in serve(None, **observers):
            for _ in range(40):
                assert (await api.post("/v1/chat/completions", CHAT))[0] == 200

            def said(text: str) -> int:
                return sum(text in r.getMessage() for r in caplog.records)

            for _ in range(600):
                if said("cannot be exported"):
                    break
                await asyncio.sleep(0.05)
            assert said("traces cannot be exported") == 1
            assert (await api.post("/v1/chat/completions", CHAT))[0] == 200
            receiver = Receiver(port)
            for _ in range(600):
                await api.post("/v1/chat/completions", CHAT)
                if said("are exported to"):
                    break
                await asyncio.sleep(0.05)
            assert said("again") == 1 and said("cannot be exported") == 1
            assert receiver.named("chat fake")
    receiver.close()
    assert "secret" not in caplog.text and "Queue full" not in caplog.text


@pytest.mark.parametrize("delay_s", [None, 30.0])
def test_the_end_does_not_wait_for_a_receiver(delay_s: float | None) -> None:
    """Neither for one that is down nor for one that does not answer."""
    receiver = None if delay_s is None else Receiver(delay_s=delay_s)
    tracer = start_telemetry(
        f"http://127.0.0.1:{free_port()}" if receiver is None else receiver.url
    )
    assert tracer is not None
    start = time.monotonic()
    tracer.close(1.0)
    assert time.monotonic() - start < 20


def test_only_who_asks_pays() -> None:
    code = (
        "import sys, llmkit.gateway.standalone, llmkit.gateway.ops.telemetry as t; "
        "assert t.start_telemetry(None, {'OTEL_SERVICE_NAME': 'x'}) is None; "
        "print([m for m in sys.modules if m.startswith('opentelemetry')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_what_counts_as_asking() -> None:
    assert wants_telemetry("http://localhost:4318", {})
    assert wants_telemetry(None, {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://a"})
    assert wants_telemetry(None, {"OTEL_TRACES_EXPORTER": "otlp"})
    for given in ({}, {"OTEL_TRACES_EXPORTER": "none"}, {"OTEL_EXPORTER_OTLP_ENDPOINT": ""}):
        assert not wants_telemetry(None, given)
    assert not wants_telemetry("http://localhost:4318", {"OTEL_SDK_DISABLED": "true"})


@pytest.mark.parametrize(
    "endpoint",
    [
        "localhost:4318",
        "grpc://a:4317",
        "http://",
        "http://a:99999",
        "http://[",
        "",
        " ",
        "x" * 500,
    ],
)
def test_an_address_that_cannot_be_one_is_refused(endpoint: str) -> None:
    if not endpoint:
        assert start_telemetry(endpoint, {}) is None
        return
    with pytest.raises(InvalidRequestError, match="such as http://localhost:4318"):
        start_telemetry(endpoint, {})


def test_ports_and_protocols_of_grpc_are_pointed_out(caplog: pytest.LogCaptureFixture) -> None:
    environment = {"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}
    tracer = start_telemetry("http://127.0.0.1:4317", environment)
    assert tracer is not None
    tracer.close(0.5)
    assert "4318" in caplog.text and "gRPC" in caplog.text


def test_a_variable_that_is_wrong_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "-1")
    with pytest.raises(InvalidRequestError, match="max_queue_size"):
        start_telemetry("http://127.0.0.1:4318")


def test_without_the_package_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "llmkit.gateway.ops.tracing", None)
    with pytest.raises(InvalidRequestError, match=r"pip install 'llmkit\[otel\]'"):
        start_telemetry("http://localhost:4318", {})
    asked = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://localhost:4318"}
    assert start_telemetry(None, asked) is None
    assert "llmkit[otel]" in caplog.text


def test_the_loggers_of_the_sdk_are_given_back(receiver: Receiver) -> None:
    names = ("opentelemetry.exporter", "opentelemetry.sdk")
    before = [(logging.getLogger(n).propagate, logging.getLogger(n).level) for n in names]
    with traced(receiver.url):
        assert not logging.getLogger(names[0]).propagate
    assert [(logging.getLogger(n).propagate, logging.getLogger(n).level) for n in names] == before
    assert not logging.getLogger(names[0]).handlers
