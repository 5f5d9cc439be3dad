"""A real `llmkit serve` as its operators see it: health, metrics, a log in JSON, and traces."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import tiny_models
from fakes import wait_for
from otlp_receiver import PARENT, TRACE, Receiver, forget_variables, receiving, values
from prometheus_client.parser import text_string_to_metric_families

KEY = "operators-key"


class Server:
    """`llmkit serve` with a tiny model; its standard error goes to a file."""

    def __init__(self, folder: Path, collector: str) -> None:
        model = tiny_models.write(folder / "tiny.gguf", "llama")
        self.log = folder / "log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [
                    sys.executable, "-m", "llmkit", "serve", str(model), "--port", "0",
                    "--n-ctx", "256", "--n-slots", "2", "--log-format", "json",
                    "--otlp-endpoint", collector,
                ],
                env={**os.environ, "LLMKIT_API_KEY": KEY}, text=True,
                stdout=subprocess.PIPE, stderr=log,
            )  # fmt: skip
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert " at " in line, self.log.read_text()
        self.url = line.rsplit(" at ", 1)[1].strip().removesuffix("/v1")

    def fetch(
        self, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, str]:
        request = urllib.request.Request(
            self.url + path,
            None if body is None else json.dumps(body).encode(),
            {"Content-Type": "application/json", **(headers or {})},
        )
        try:
            with urllib.request.urlopen(request, timeout=30) as reply:
                return reply.status, reply.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def ask(self, **headers: str) -> int:
        body = {"model": "tiny", "prompt": "hello", "max_tokens": 4, "ignore_eos": True}
        return self.fetch("/v1/completions", body, {"Authorization": f"Bearer {KEY}", **headers})[0]

    def metric(self, name: str, **labels: str) -> float:
        code, text = self.fetch("/metrics", headers={"Authorization": f"Bearer {KEY}"})
        assert code == 200, text
        return sum(
            s.value
            for family in text_string_to_metric_families(text)
            for s in family.samples
            if s.name == name and labels.items() <= s.labels.items()
        )

    def ready(self) -> str:
        """The state that a load balancer is told, without a key."""
        return str(json.loads(self.fetch("/health/ready")[1])["status"])

    def stop(self) -> list[dict[str, Any]]:
        """End it; every line that it wrote, as an object."""
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(30) == 0
        assert self.process.stdout is not None
        self.process.stdout.close()
        return [json.loads(line) for line in self.log.read_text().splitlines()]


@pytest.fixture
def receiver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Receiver]:
    forget_variables(monkeypatch)
    with receiving() as receiver:
        yield receiver


def test_operators_see_a_server_from_start_to_end(tmp_path: Path, receiver: Receiver) -> None:
    server = Server(tmp_path, receiver.url)
    try:
        assert server.fetch("/health/live")[0] == 200
        assert server.ready() in ("loading", "ready")
        wait_for(lambda: server.ready() == "ready", 60)
        assert server.ask(traceparent=PARENT) == 200
        assert server.fetch("/v1/models")[0] == 401
        assert server.fetch("/metrics")[0] == 401
        wait_for(lambda: server.metric("llmkit_generation_tokens_total", model="tiny") == 4)
        assert server.metric("vllm:request_success_total", model_name="tiny") == 1
        assert server.metric("llamacpp:n_busy_slots_per_decode", model="tiny") == 1
        assert server.metric("llmkit_requests_refused_total", reason="invalid_api_key") == 2
        assert server.metric("llmkit_model_loads_total", model="tiny") == 1
        assert server.metric("llmkit_model_resident_memory_bytes", model="tiny") > 1 << 20

        (worker,) = psutil.Process(server.process.pid).children()
        worker.kill()

        def is_restarting() -> bool:  # or has been, where that took less than a look at it
            restarts = server.metric("llmkit_model_restarts_total", model="tiny")
            return server.ready() == "loading" or restarts == 1

        wait_for(is_restarting)
        wait_for(lambda: server.ready() == "ready", 60)
        assert server.ask() == 200
        for name in ("crashes", "restarts"):
            assert server.metric(f"llmkit_model_{name}_total", model="tiny") == 1
        wait_for(lambda: server.metric("llmkit_generation_tokens_total", model="tiny") == 8)
        assert server.metric("llmkit_model_failures_total", model="tiny") == 0
    finally:
        lines = server.stop()
    access = [line for line in lines if line["logger"] == "llmkit.access"]
    asked = [line for line in access if line.get("operation") == "text_completion"]
    assert [(a["status"], a["completion_tokens"], a["model"]) for a in asked] == [
        (200, 4, "tiny")
    ] * 2
    assert any("was ended by SIGKILL" in line["message"] for line in lines), "why it was restarted"
    assert KEY not in server.log.read_text() and "hello" not in server.log.read_text()
    first, second = receiver.named("text_completion tiny")
    assert first.trace_id.hex() == TRACE != second.trace_id.hex()
    assert values(first.attributes)["gen_ai.usage.output_tokens"] == 4
    assert len(receiver.named("decode")) == 2
    assert "gen_ai.server.time_to_first_token" in receiver.metrics
