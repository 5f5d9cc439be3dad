"""A collector of OpenTelemetry on loopback, and a gateway that exports to one."""

from __future__ import annotations

import http.server
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from gateway_client import Api, serve
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from llmkit.gateway.ops.telemetry import start_telemetry
from llmkit.gateway.ops.tracing import Tracer, tracing

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = f"00-{TRACE}-b7ad6b7169203331-01"


class Receiver:
    """A collector on a loopback port."""

    def __init__(self, port: int = 0, delay_s: float = 0.0) -> None:
        self.spans: list[Span] = []
        self.resources: list[dict[str, Any]] = []
        self.metrics: dict[str, Any] = {}
        self.bodies: list[bytes] = []
        self.headers: list[dict[str, str]] = []
        receiver = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                time.sleep(delay_s)
                receiver.take(self.path, body, dict(self.headers))
                self.send_response(200)
                self.send_header("Content-Type", "application/x-protobuf")
                self.end_headers()

            def log_message(self, *args: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def take(self, path: str, body: bytes, headers: dict[str, str]) -> None:
        self.bodies.append(body)
        self.headers.append({name.lower(): value for name, value in headers.items()})
        if path == "/v1/traces":
            for part in ExportTraceServiceRequest.FromString(body).resource_spans:
                self.resources.append(values(part.resource.attributes))
                self.spans += [s for scope in part.scope_spans for s in scope.spans]
        else:
            assert path == "/v1/metrics"
            for part in ExportMetricsServiceRequest.FromString(body).resource_metrics:
                self.metrics |= {m.name: m for s in part.scope_metrics for m in s.metrics}

    def named(self, name: str) -> list[Span]:
        return [span for span in self.spans if span.name == name]

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def values(attributes: Any) -> dict[str, Any]:
    def plain(value: Any) -> Any:
        kind = value.WhichOneof("value")
        if kind == "array_value":
            return [plain(v) for v in value.array_value.values]
        return getattr(value, kind)

    return {a.key: plain(a.value) for a in attributes}


def forget_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever this machine exports itself."""
    for name in list(os.environ):
        if name.startswith("OTEL_"):
            monkeypatch.delenv(name)


@contextmanager
def receiving() -> Iterator[Receiver]:
    receiver = Receiver()
    yield receiver
    receiver.close()


@contextmanager
def traced(
    endpoint: str | None, service_name: str = "llmkit"
) -> Iterator[tuple[Tracer, dict[str, Any]]]:
    tracer = start_telemetry(endpoint, service_name=service_name)
    assert tracer is not None
    try:
        yield tracer, {"observers": [tracing(tracer)]}
    finally:
        tracer.close()


async def ask(receiver: Receiver, *requests: Callable[[Api], Any], **options: Any) -> None:
    """Send requests through a traced gateway, and wait for the export."""
    with traced(receiver.url) as (_, observers):
        async for api in serve(None, **observers, **options):
            for request in requests:
                await request(api)
