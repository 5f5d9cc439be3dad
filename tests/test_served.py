"""Several models behind one gateway: loaded by a request, listed, switched, unloaded."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest
from fakes import wait_for
from gateway_client import Api, serve
from test_turns import posting
from tornado.netutil import bind_sockets

from llmkit.errors import InvalidRequestError
from llmkit.gateway.access.identity import Allowance, Identity
from llmkit.gateway.access.permission import Allowed, may_use, seeing
from llmkit.gateway.app import make_server
from llmkit.gateway.composition import Composition
from llmkit.gateway.ops.models import ModelRoutes
from llmkit.gateway.workers import Workers
from llmkit.settings.entries import KeyEntry
from llmkit.settings.gateway import GatewayOptions
from llmkit.settings.serving import ServeSettings
from llmkit.wanted import worker_task
from llmkit.workers.budget import Budget, Need
from llmkit.workers.place import ServedModel

pytestmark = pytest.mark.model


def served(name: str, model: str = "smollm2", **options: bool | tuple[str, ...]) -> ServedModel:
    def task() -> dict[str, object]:
        return worker_task(model, name=name, tuned=False, force=True, n_ctx=512, n_slots=2)

    return ServedModel(name, task, lambda _: Need(1), **options)  # type: ignore[arg-type]


@pytest.fixture
async def workers() -> AsyncIterator[Workers]:
    models = [
        served("first"),
        served("second", lazy=True, aliases=("two",)),
        served("vectors", "minilm", lazy=True),
    ]
    workers = Workers(GatewayOptions(), models, None)
    await asyncio.to_thread(wait_for, lambda: phase(workers, "first") == "ready", 60)
    yield workers
    await asyncio.to_thread(workers.close)


@pytest.fixture
async def api(workers: Workers) -> AsyncIterator[Api]:
    settings = ServeSettings(GatewayOptions(admin=True))
    parts = Composition(settings, workers.directory, workers)
    server = make_server(parts.app(), edge=parts.access.edge)
    sockets = bind_sockets(0, "127.0.0.1")
    server.add_sockets(sockets)
    yield Api(f"http://127.0.0.1:{sockets[0].getsockname()[1]}")
    server.stop()
    await server.close_all_connections()
    workers.directory.close()
    await parts.close()


def phase(workers: Workers, name: str) -> str:
    return workers.manager.status(name).phase


def chat(model: str, tokens: int = 4) -> dict[str, object]:
    return {
        "model": model,
        "messages": [{"role": "user", "content": "Hello"}],
        "max_tokens": tokens,
        "ignore_eos": True,
    }


async def test_a_request_loads_the_model_it_names(api: Api, workers: Workers) -> None:
    code, reply = await api.post("/v1/chat/completions", chat("two"))
    assert code == 200 and reply["model"] == "second"
    assert phase(workers, "second") == "ready" and phase(workers, "vectors") == "unloaded"
    code, reply = await api.post("/v1/embeddings", {"model": "vectors", "input": "a"})
    assert code == 200 and len(reply["data"][0]["embedding"]) == 384
    code, reply = await api.post("/v1/chat/completions", chat("default"))
    assert code == 200 and reply["model"] == "first"
    code, reply = await api.post("/v1/chat/completions", chat("third"))
    assert code == 404 and reply["error"]["code"] == "model_not_found"


async def test_models_that_are_not_loaded_are_listed(api: Api) -> None:
    reply = json.loads((await api.fetch("GET", "/v1/models")).body)
    listed = {m["id"]: m.get("status", {}).get("value") for m in reply["data"]}
    assert listed == {"first": "loaded", "second": "unloaded", "vectors": "unloaded"}
    tags = json.loads((await api.fetch("GET", "/api/tags")).body)
    assert {m["name"] for m in tags["models"]} == {"first", "second", "vectors"}
    loaded = json.loads((await api.fetch("GET", "/api/ps")).body)
    assert {m["name"] for m in loaded["models"]} == {"first"}
    page = (await api.fetch("GET", "/status")).body
    states = {m["name"]: m["phase"] for m in json.loads(page)["offered"]}
    assert states == {"first": "ready", "second": "unloaded", "vectors": "unloaded"}


async def test_switching_the_default_waits_for_its_requests(api: Api, workers: Workers) -> None:
    running = asyncio.create_task(api.post("/v1/chat/completions", chat("default", 150)))
    await asyncio.to_thread(wait_for, lambda: workers.manager.status("first").num_used == 1)
    code, reply = await api.post("/admin/models/switch", {"model": "second", "drain": False})
    assert code == 409 and reply["error"]["code"] == "model_busy"
    assert workers.manager.default == "first"
    code, reply = await api.post("/admin/models/switch", {"model": "two"})
    assert code == 200 and (reply["id"], reply["phase"]) == ("second", "ready")
    code, reply = await running
    assert code == 200 and reply["usage"]["completion_tokens"] > 50
    assert workers.manager.default == "second" and phase(workers, "first") == "unloaded"
    code, reply = await api.post("/v1/chat/completions", chat("default"))
    assert reply["model"] == "second"


async def test_a_switch_need_not_be_waited_for(api: Api, workers: Workers) -> None:
    code, reply = await api.post("/admin/models/switch", {"model": "two", "wait": False})
    assert code == 202 and reply["id"] == "second" and reply["phase"] != "ready"
    await asyncio.to_thread(wait_for, lambda: workers.manager.default == "second", 60)
    await asyncio.to_thread(wait_for, lambda: phase(workers, "first") == "unloaded", 60)
    assert phase(workers, "second") == "ready"


async def test_a_switch_to_what_cannot_be_loaded_leaves_the_default(
    api: Api, workers: Workers, caplog: pytest.LogCaptureFixture
) -> None:
    def broken() -> dict[str, object]:
        return {**worker_task("smollm2", name="bad", tuned=False, force=True), "path": "/none"}

    workers.manager.add(ServedModel("bad", broken, lambda _: Need(1), lazy=True))
    code, reply = await api.post("/admin/models/switch", {"model": "bad"})
    assert code == 503 and reply["error"]["code"] == "model_load_failed"
    assert "could not switch to the model 'bad'" in caplog.text
    code, reply = await api.post("/v1/chat/completions", chat("default"))
    assert code == 200 and reply["model"] == "first"


async def test_unload_reload_and_bad_bodies(api: Api, workers: Workers) -> None:
    code, reply = await api.post("/admin/models/unload", {"model": "first"})
    assert code == 200 and reply["phase"] == "unloaded" and reply["ram_bytes"] == 0
    code, reply = await api.post("/admin/models/load", {"model": "first", "wait": False})
    assert code == 202
    code, reply = await api.post("/admin/models/load", {"model": "first"})
    assert code == 200 and reply["phase"] == "ready"
    before = reply["pid"]
    code, reply = await api.post("/admin/models/reload", {"model": "first"})
    assert code == 200 and reply["pid"] not in (before, None)
    code, reply = await api.post("/admin/models/load", {"model": "nothing"})
    assert code == 404
    code, reply = await api.post("/admin/models/unload", {"model": "first", "forse": True})
    assert code == 400 and "force" in reply["error"]["message"]
    listed = json.loads((await api.fetch("GET", "/admin/models")).body)
    assert listed["default"] == "first" and len(listed["models"]) == 3
    one = json.loads((await api.fetch("GET", "/admin/models/second")).body)
    assert one["id"] == "second" and one["aliases"] == ["two"]


async def test_a_client_that_leaves_while_its_model_loads_holds_nothing(
    api: Api, workers: Workers
) -> None:
    async with posting(api, "/v1/chat/completions", chat("second")):
        # By a worker: one whose file is only looked at is not loaded when nobody waits any more.
        await asyncio.to_thread(wait_for, lambda: workers.manager.status("second").pids)
    await asyncio.to_thread(wait_for, lambda: workers.manager.status("second").num_used == 0)
    await asyncio.to_thread(wait_for, lambda: phase(workers, "second") == "ready", 300)


async def test_ollamas_keep_alive_pins_and_unloads(api: Api, workers: Workers) -> None:
    body = {"model": "second:latest", "prompt": "Hi", "options": {"num_predict": 2}}
    code, reply = await api.post("/api/generate", {**body, "stream": False, "keep_alive": "10m"})
    assert code == 200 and reply["done_reason"] in ("length", "stop")
    expires = workers.manager.status("second").expires_s
    assert expires is not None and 500 < expires <= 600
    code, reply = await api.post("/api/generate", {**body, "stream": False, "keep_alive": -1})
    assert code == 200 and workers.manager.status("second").expires_s is None
    code, reply = await api.post("/api/generate", {"model": "second", "keep_alive": 0})
    assert code == 200 and reply["done_reason"] == "unload"
    await asyncio.to_thread(wait_for, lambda: phase(workers, "second") == "unloaded", 30)
    # What is not loaded is not loaded to be unloaded.
    code, reply = await api.post("/api/chat", {"model": "second", "keep_alive": "0s"})
    assert code == 200 and workers.manager.status("second").loads == 1
    code, reply = await api.post("/api/generate", {**body, "keep_alive": "soon"})
    assert code == 400 and "keep_alive" in reply["error"]


async def test_a_switch_without_room_serves_the_new_one() -> None:
    def big(name: str, **options: bool) -> ServedModel:
        return replace(served(name, **options), need=lambda _: Need(500 << 20))

    workers = Workers(
        GatewayOptions(), [big("old"), big("new", lazy=True)], budget=Budget(800 << 20)
    )
    await asyncio.to_thread(wait_for, lambda: phase(workers, "old") == "ready", 60)
    routes = ModelRoutes(workers.served)
    async for api in serve(None, directory=workers.directory, routes=routes.routes(), admin=True):
        switching = asyncio.create_task(api.post("/admin/models/switch", {"model": "new"}))
        await asyncio.sleep(0.2)
        workers.manager.load("default")  # somebody asks for the default meanwhile
        code, reply = await switching
        assert code == 200 and (reply["id"], reply["phase"]) == ("new", "ready")
        assert workers.manager.default == "new" and phase(workers, "old") == "unloaded"
    await asyncio.to_thread(workers.close)


@pytest.mark.parametrize("name", ["Found", "found.gguf", "./found", "nothing"])
async def test_another_spelling_loads_nothing(name: str) -> None:
    workers = Workers(
        GatewayOptions(), [], lambda asked: served("found", lazy=True) if asked == "found" else None
    )
    assert await workers.served.name_of(name) is None
    assert await workers.served.name_of("found:latest") == "found"
    assert workers.served.names("found:latest") == "found"
    await asyncio.to_thread(workers.close)


def test_the_default_model_is_found_at_the_start() -> None:
    models = [served("first", lazy=True), served("second", lazy=True, aliases=("two",))]
    workers = Workers(GatewayOptions(default_model="two"), models)
    assert workers.manager.default == "second"
    workers.close()
    with pytest.raises(InvalidRequestError, match="there are first, second"):
        Workers(GatewayOptions(default_model="thrid"), models, start=False)


@pytest.mark.parametrize("allowed", [{"allowed_models": ("t?o",)}, {}])
async def test_a_model_may_be_used_by_whoever_may_use_its_alias(
    allowed: dict[str, tuple[str, ...]],
) -> None:
    models = [served("first", lazy=True), served("second", lazy=True, aliases=("two",))]
    workers = Workers(GatewayOptions(), models, start=False)
    key = KeyEntry(name="ann", key="ann", models=("*",) if allowed else ("two",))
    settings = ServeSettings(GatewayOptions(**allowed), keys=(key,))
    parts = Composition(settings, workers.directory, workers, shared=False)
    server = make_server(parts.app(), edge=parts.access.edge)
    sockets = bind_sockets(0, "127.0.0.1")
    server.add_sockets(sockets)
    ann = Api(f"http://127.0.0.1:{sockets[0].getsockname()[1]}", "ann")
    listed = json.loads((await ann.fetch("GET", "/v1/models")).body)["data"]
    assert [m["id"] for m in listed] == ["second"]
    assert (await ann.post("/v1/chat/completions", chat("first")))[0] == 404
    server.stop()
    await server.close_all_connections()
    await parts.close()
    workers.directory.close()


def test_aliases_count_in_each_list() -> None:
    aliases = {"second": ("two", "zwei")}
    allowed = Allowed(lambda: ("two",), lambda name: aliases.get(name, ()))
    for own, may in (("zwei", True), ("second", True), ("first", False)):
        identity = Identity("ann", allowance=Allowance(models=(own,)))
        with seeing(identity, allowed):
            assert may_use("second@kernel") == may_use("second") == may
            assert not may_use("first")


async def test_a_default_model_that_was_never_asked_for_is_looked_for_at_a_reload() -> None:
    def find(name: str) -> ServedModel | None:
        return served("found", lazy=True) if name == "found" else None

    workers = Workers(GatewayOptions(), [served("first", lazy=True)], find, start=False)
    before = ServeSettings(GatewayOptions(allowed_models=("*",)))
    parts = Composition(before, workers.directory, workers)

    def applied(default: str | None) -> str | None:
        options = replace(before.gateway, default_model=default)
        parts.apply(replace(before, gateway=options))
        return workers.manager.default

    assert applied("found") == "found"
    with pytest.raises(InvalidRequestError, match="default_model: there is no model 'none'"):
        applied("none")
    assert workers.manager.default == "found"
    assert applied(None) == "first", "as at a start"
    workers.manager.set_default("found")  # by an administrator
    assert applied(None) == "found"
    await parts.close()
    workers.directory.close()
