"""Whether a server lives and can be used, and how little a stranger is told."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from types import SimpleNamespace
from typing import Any

import pytest
from access_client import served
from fakes import FakeClient
from gateway_client import Api, is_error, serve
from shelf import Shelf, status

from llmkit.gateway.app import Gateway
from llmkit.gateway.directory import EngineDirectory
from llmkit.protocol import EngineState, ModelDescription, Origin
from llmkit.settings.entries import KeyEntry
from llmkit.workers.place import ModelStatus


async def health(api: Api, path: str = "/health/ready") -> tuple[int, dict[str, Any]]:
    reply = await Api(api.url).fetch("GET", path)  # without a key
    return reply.code, json.loads(reply.body)


async def test_health_without_a_model_and_with_one() -> None:
    async for api in serve("secret-key"):
        for path in ("/health/ready", "/readiness"):
            code, body = await health(api, path)
            assert (code, body["status"]) == (503, "unavailable") and body["reason"]
        assert await health(api, "/health/live") == (200, {"status": "ok"})
        for path in ("/health", "/v1/health"):
            assert (await health(api, path))[0] == 503
    client = FakeClient()
    shelf = Shelf()
    shelf.engines = [client]
    directory = EngineDirectory([shelf])
    async for api in serve("secret-key", directory=directory):
        for path in ("/health", "/v1/health", "/health/live"):
            assert await health(api, path) == (200, {"status": "ok"})
        for path in ("/health/ready", "/readiness"):
            assert await health(api, path) == (200, {"status": "ready"})


@pytest.mark.parametrize(
    ("phases", "code", "state"),
    [
        (["unloaded"], 200, "ready"),  # the first request loads it
        (["loading"], 503, "loading"),
        (["restarting"], 503, "loading"),
        (["ready"], 503, "loading"),  # not found yet
        (["failed"], 503, "unavailable"),
        (["failed", "unloaded"], 200, "ready"),
        ([], 503, "unavailable"),
    ],
)
async def test_readiness_knows_what_can_be_loaded(phases: list[str], code: int, state: str) -> None:
    offered = [replace(status(phase), name=f"m{i}") for i, phase in enumerate(phases)]
    async for api in serve(None, directory=EngineDirectory([]), offered=lambda: offered):
        got, body = await health(api)
        assert (got, body["status"]) == (code, state)


async def test_an_engine_that_has_not_answered_yet_is_not_ready() -> None:
    shelf = Shelf()
    shelf.engines = [SimpleNamespace(description=ModelDescription("m", ""), origin=Origin("host"))]
    [engine] = shelf.engines
    engine.close = lambda: None
    engine.state = EngineState("loading", "it has not answered yet")
    async for api in serve(None, directory=EngineDirectory([shelf])):
        got, body = await health(api)
        assert (got, body["status"]) == (503, "loading")
        engine.state = EngineState()
        got, body = await health(api)
        assert (got, body["status"]) == (200, "ready")


async def test_a_draining_server_is_not_ready(
    model: FakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Gateway] = []

    def kept(*args: Any, **options: Any) -> Gateway:
        made.append(Gateway(*args, **options))
        return made[-1]

    monkeypatch.setattr("gateway_client.Gateway", kept)
    async for api in serve(None):
        assert (await health(api))[0] == 200
        made[0].draining = True
        code, body = await health(api)
        assert (code, body["status"]) == (503, "draining")
        assert (await health(api, "/health/live"))[0] == 200, "a live server must not be killed"


async def test_strangers_learn_the_state_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmkit.gateway.directory.REFRESH_S", 0)
    shelf = Shelf()
    client = FakeClient("secret-model")
    shelf.engines = [client]
    directory = EngineDirectory([shelf])
    async for api in serve("secret-key", directory=directory):
        assert (await health(api))[0] == 200
        shelf.engines = []
        for path in ("/health", "/v1/health", "/health/ready", "/readiness", "/health/live"):
            assert "secret" not in json.dumps((await health(api, path))[1])
        # Whoever has the key is told the reason.
        known = is_error(await api.fetch("GET", "/health"), 503)
        assert "secret-model" in known["message"]
    client.close()


async def test_a_key_sees_no_processes_use_or_failures_of_models() -> None:
    entries = [
        KeyEntry(name="user", key="user"),
        KeyEntry(name="both", key="both", scopes=("inference", "admin")),
    ]
    offered = [
        ModelStatus(
            "large", "failed", "there is no file /srv/ann/large.gguf", pid=4242, pids=(4242,)
        ),
        ModelStatus("small", "ready", num_used=7171, ram_bytes=3_000_000_000, restarts=8181),
    ]
    async with served(entries, gateway={"offered": lambda: offered}) as api:
        seen = {}
        for key in ("user", "both"):
            reply = await api.by(key).fetch("GET", "/status")
            seen[key] = json.loads(reply.body)["offered"]
            part = (await api.by(key).fetch("GET", "/status?part=1")).body.decode()
            for secret in ("/srv/ann", "7171", "8181"):
                assert (secret in reply.body.decode()) is (secret in part) is (key == "both")
    assert seen["both"] == json.loads(json.dumps([asdict(each) for each in offered]))
    failed, small = seen["user"]
    assert failed.keys() == seen["both"][0].keys(), "one schema for all"
    assert failed["pid"] is None and failed["pids"] == [] and "log says why" in failed["reason"]
    assert (small["phase"], small["num_used"], small["reason"]) == ("ready", None, "")
