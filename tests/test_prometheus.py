"""The board and the alerts in `deploy/`, against a real Prometheus that scrapes a real gateway."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from conftest import ROOT
from fake_runner import FakeRunner
from fakes import FakeClient
from gateway_client import CHAT, Api, serve
from tornado.httpclient import AsyncHTTPClient

from llmkit.bridge.server import BridgeServer
from llmkit.gateway.directory import EngineDirectory
from llmkit.gateway.exchange import Exchange
from llmkit.gateway.failures import ApiError
from llmkit.gateway.ops.metrics import Metrics
from llmkit.gateway.response_cache import ResponseCache
from llmkit.system.gpu_memory import GpuMemory
from llmkit.workers.place import ModelStatus

DEPLOY = ROOT / "deploy"
RULES = DEPLOY / "prometheus"
KEY = "scraper-key"
SCRAPES_S, TRAFFIC_S = 0.5, 6.0


@pytest.fixture(scope="module")
def tools() -> dict[str, str]:
    """Debian's prometheus and promtool; skips loudly without them, but never in CI."""
    found = {name: shutil.which(name) or "" for name in ("prometheus", "promtool")}
    if not all(found.values()):
        if os.environ.get("CI"):
            pytest.fail("prometheus is missing, and CI may not skip")
        pytest.skip("no prometheus here: apt-get install prometheus")
    return found


def board() -> dict[str, Any]:
    value: dict[str, Any] = json.loads((DEPLOY / "grafana" / "llmkit.json").read_text())
    return value


def queries() -> list[tuple[str, str]]:
    """Every query of the board, with its panel's title."""
    return [
        (panel["title"], target["expr"])
        for panel in board()["panels"]
        for target in panel.get("targets", [])
    ]


def alerts() -> list[tuple[str, str]]:
    """Every alert and its expression."""
    text = (RULES / "alerts.yml").read_text()
    found = re.findall(
        r"- alert: (\w+)\n\s+expr: (?:>-\n)?(.+?)\n\s+(?:for|labels):", text, re.DOTALL
    )
    return [(name, " ".join(expr.split())) for name, expr in found]


def test_the_rules_are_valid_and_fire_when_they_should(tools: dict[str, str]) -> None:
    for arguments in (
        ["check", "rules", "alerts.yml"],
        ["check", "config", "--syntax-only", "prometheus.yml"],
        ["test", "rules", "alerts.test.yml"],
    ):
        done = subprocess.run(
            [tools["promtool"], *arguments], cwd=RULES, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_each_alert_is_tested_and_says_what_to_do() -> None:
    text, tests = (RULES / "alerts.yml").read_text(), (RULES / "alerts.test.yml").read_text()
    names = [name for name, _ in alerts()]
    assert len(names) == text.count("- alert:") == len(set(names)) >= 12
    for name in names:
        assert f"alertname: {name}\n" in tests, f"no test in which {name} fires"
    for part in ("severity:", "summary:", "description:"):
        assert text.count(part) == len(names)


def test_the_board_is_whole() -> None:
    panels = board()["panels"]
    assert len({p["id"] for p in panels}) == len(panels)
    variables = {v["name"] for v in board()["templating"]["list"]} | {"__rate_interval"}
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken and place["x"] + place["w"] <= 24, panel["title"]
        taken |= cells
        if panel["type"] != "row":
            assert panel["title"] and panel["description"] and panel["targets"]
            assert panel["datasource"]["uid"] == "${datasource}"
    for title, expr in queries():
        assert set(re.findall(r"\$\{?(\w+)", expr)) <= variables, (title, expr)
        assert 'job=~"$job"' in expr, f"{title} would mix up services"


class Gpu:
    """Memory of a GPU that this machine does not have."""

    def __call__(self) -> list[GpuMemory]:
        return [GpuMemory("nvidia0", "NVIDIA H100", 3 << 30, 80 << 30, 0.5)]


def life(*phases: tuple[str, int]) -> list[ModelStatus]:
    return [
        ModelStatus("fake", phase, restarts=restarts, loads=1, load_s=2.0)  # type: ignore[arg-type]
        for phase, restarts in phases
    ]


@contextlib.contextmanager
def broken(exchange: Exchange) -> Iterator[None]:
    """A stage that refuses some requests, and fails for others."""
    if exchange.header("x-trouble") == "busy":
        raise ApiError(429, "too many", "rate_limit_error", code="rate_limited")
    if exchange.header("x-trouble") == "fault":
        raise RuntimeError("on purpose")
    yield


@pytest.fixture
async def gateway() -> AsyncIterator[tuple[Api, Metrics]]:
    client = FakeClient(runner=FakeRunner(n_ctx=5000, step_s=0.002))
    client.description.gpu_bytes["CUDA0"] = 1 << 30
    bridge = BridgeServer(client)
    directory = EngineDirectory()
    metrics = Metrics(
        directory,
        offered=lambda: life(("ready", 1)),
        response_cache=ResponseCache(1 << 20, 60.0),
        gpus=Gpu(),
    )
    async for api in serve(
        KEY,
        directory=directory,
        stages=[broken],
        observers=[metrics.observer],
        routes=metrics.routes(),
    ):
        yield api, metrics
    bridge.close()
    client.close()


class Prometheus:
    """Debian's Prometheus on a free port, with the configuration of `deploy/`."""

    def __init__(self, program: str, folder: Path, target: str) -> None:
        config = (RULES / "prometheus.yml").read_text()
        changed = re.sub(
            r"(scrape|evaluation)_interval: \w+", rf"\1_interval: {SCRAPES_S:g}s", config
        )
        changed = changed.replace("0.5s", "500ms").replace("localhost:3000", target)
        assert changed.count("500ms") == 2 and target in changed
        (folder / "prometheus.yml").write_text(changed)
        (folder / "llmkit.key").write_text(KEY)
        shutil.copy(RULES / "alerts.yml", folder)
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.log = (folder / "log").open("w+")
        self._process = subprocess.Popen(
            [
                program, f"--config.file={folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={folder / 'data'}", f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=self.log, stderr=self.log,
        )  # fmt: skip

    async def get(self, path: str) -> Any:
        reply = await AsyncHTTPClient(force_instance=True).fetch(self.url + path, raise_error=False)
        body = json.loads(reply.body)
        assert body["status"] == "success", (path, body)
        return body["data"]

    async def query(self, expr: str) -> list[Any]:
        found: list[Any] = (await self.get(f"/api/v1/query?query={quote(expr)}"))["result"]
        return found

    async def rules(self) -> dict[str, Any]:
        found = await self.get("/api/v1/rules")
        return {rule["name"]: rule for group in found["groups"] for rule in group["rules"]}

    async def ready(self) -> None:
        for _ in range(600):
            with contextlib.suppress(Exception):
                if await self.query("1"):
                    return
            assert self._process.poll() is None, self.output()
            await asyncio.sleep(0.1)
        raise AssertionError(self.output())

    def output(self) -> str:
        self.log.seek(0)
        return self.log.read()

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(30)
        self.log.close()


async def traffic(api: Api, seconds: float) -> None:
    """Requests of all kinds, again and again."""
    end, i = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        i += 1
        chat = {**CHAT, "messages": [{"role": "user", "content": f"hi {i % 3}"}], "max_tokens": 12}
        await asyncio.gather(
            api.fetch("POST", "/v1/chat/completions", {**chat, "n": 2}),
            api.fetch("POST", "/v1/chat/completions", {**chat, "stream": True}),
            api.fetch("POST", "/v1/completions", {"model": "fake", "prompt": "a", "max_tokens": 5}),
            api.fetch("POST", "/v1/embeddings", {"model": "fake", "input": "ab"}),
            api.fetch("POST", "/v1/chat/completions", {**chat, "model": "no"}),
            api.fetch("POST", "/v1/chat/completions", chat, {"x-trouble": "busy"}),
            api.fetch("POST", "/v1/chat/completions", chat, {"x-trouble": "fault"}),
        )


@pytest.fixture
async def prometheus(
    tools: dict[str, str], gateway: tuple[Api, Metrics], tmp_path: Path
) -> AsyncIterator[Prometheus]:
    """A Prometheus that has watched a gateway at work."""
    api, metrics = gateway
    server = Prometheus(tools["prometheus"], tmp_path, api.url.removeprefix("http://"))
    try:
        for change in life(("loading", 0), ("ready", 0), ("restarting", 1), ("ready", 1)):
            metrics.changed(change)
        await server.ready()
        await traffic(api, TRAFFIC_S)
        await asyncio.sleep(2 * SCRAPES_S)
        yield server
    finally:
        server.close()


async def test_every_query_finds_data_of_a_real_run(prometheus: Prometheus) -> None:
    async with asyncio.timeout(60):  # one scrape may fail of a machine that stalls
        while (await prometheus.get("/api/v1/targets"))["activeTargets"][0]["health"] != "up":
            await asyncio.sleep(SCRAPES_S)

    faults = []
    values = {"$__rate_interval": "60s", "$job": ".*", "$instance": ".*", "$model": ".*"}
    for title, expr in queries():
        filled = re.sub(r"\$\w+", lambda m: values[m[0]], expr)
        found = await prometheus.query(filled)
        numbers = [float(series["value"][1]) for series in found]
        if not numbers or not all(map(math.isfinite, numbers)):
            faults.append((title, expr, numbers))
    assert not faults, f"{len(faults)} of {len(queries())} queries: {faults}"

    for variable in board()["templating"]["list"]:
        if variable["type"] == "query":
            call = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["definition"])
            assert call is not None
            filled = re.sub(r"\$\w+", lambda m: values[m[0]], call[1])
            assert any(s["metric"].get(call[2]) for s in await prometheus.query(filled))

    for name, expr in alerts():
        # With bool a comparison tells how it ended, rather than dropping what does not fulfil it.
        told = re.sub(r" (==|<|>) ", r" \1 bool ", expr)
        assert told != expr and await prometheus.query(told), f"{name} has nothing to look at"
    async with asyncio.timeout(60):
        while (states := await prometheus.rules())["LlmkitDown"]["state"] != "inactive":
            await asyncio.sleep(SCRAPES_S)
    assert set(states) == {name for name, _ in alerts()}
    assert all(rule["health"] == "ok" for rule in states.values()), states
    assert states["LlmkitErrors"]["state"] == "pending", "a seventh of the requests failed"


async def test_the_names_with_colons_arrive(prometheus: Prometheus) -> None:
    """Prometheus negotiates the format; see the trap in `Metrics`."""
    names = await prometheus.get("/api/v1/label/__name__/values")
    for name in (
        "vllm:time_to_first_token_seconds_bucket",
        "vllm:prefix_cache_hits_total",
        "vllm:gpu_cache_usage_perc",
        "llamacpp:tokens_predicted_total",
        "llamacpp:n_busy_slots_per_decode",
        "chat_completions_requests_total",
    ):
        assert name in names
    assert not [name for name in names if name.startswith(("vllm_", "llamacpp_"))]
    same = "sum(vllm:generation_tokens_total) == sum(llmkit_generation_tokens_total) > 0"
    assert await prometheus.query(same), "of one scrape"
