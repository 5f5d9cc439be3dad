"""One model at a time: list, load, reload and unload files of the models dir, on real models."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from compat_gateway import curl
from fakes import wait_for
from tornado.netutil import bind_sockets

from llmkit.gateway.app import make_server
from llmkit.gateway.composition import Composition
from llmkit.gateway.workers import Workers
from llmkit.models.registry import resolve
from llmkit.settings.gateway import GatewayOptions
from llmkit.settings.serving import ServeSettings
from llmkit.wanted import worker_task
from llmkit.workers.budget import Need
from llmkit.workers.place import ServedModel

pytestmark = pytest.mark.model


@dataclass
class Made:
    url: str
    workers: Workers
    parts: Composition
    folder: Path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "models"
    (made / "sub").mkdir(parents=True)
    os.link(resolve("smollm2").path, made / "one.gguf") if same_disk(made) else (
        made / "one.gguf"
    ).symlink_to(resolve("smollm2").path)
    (made / "notes.txt").write_text("x")
    (tmp_path / "outside.gguf").write_bytes(b"GGUF")
    (made / "away.gguf").symlink_to(tmp_path / "outside.gguf")
    return made


def same_disk(folder: Path) -> bool:
    return os.stat(folder).st_dev == os.stat(resolve("smollm2").path).st_dev


@pytest.fixture
async def made(folder: Path) -> AsyncIterator[Made]:
    def served(name: str) -> ServedModel:
        def task() -> dict[str, object]:
            file = folder / f"{name}.gguf" if name == "one" else "smollm2"
            return worker_task(file, name=name, tuned=False, force=True, n_ctx=512, n_slots=1)

        return ServedModel(name, task, lambda _: Need(1), lazy=name == "one")

    options = GatewayOptions(admin=True, models_dir=str(folder), compat="otron")
    workers = Workers(options, [served("first")], lambda n: served(n) if n == "one" else None)
    await asyncio.to_thread(wait_for, lambda: workers.manager.status("first").phase == "ready", 60)
    parts = Composition(ServeSettings(options), workers.directory, workers, shared=False)
    server = make_server(parts.app(), edge=parts.access.edge)
    sockets = bind_sockets(0, "127.0.0.1")
    server.add_sockets(sockets)
    yield Made(f"http://127.0.0.1:{sockets[0].getsockname()[1]}", workers, parts, folder)
    server.stop()
    await server.close_all_connections()
    workers.directory.close()
    await parts.close()
    await asyncio.to_thread(workers.close)


async def test_files_are_listed_loaded_and_unloaded(made: Made) -> None:
    listed = (await curl(made.url, "/v1/models/list")).json
    assert "one.gguf" in listed["models"] and "notes.txt" not in listed["models"]
    reply = await curl(made.url, "/v1/models/load", {"model_path": "one.gguf"})
    assert reply.code == 200 and reply.json["success"] is True, reply.text
    assert reply.json["model_info"]["context_size"] == 512
    active = (await curl(made.url, "/v1/models/active")).json
    assert active["model"] == "one" and made.workers.manager.default == "one"
    absolute = {"model_path": str(made.folder / "one.gguf"), "context_size": 512, "gpu_layers": 0}
    assert (await curl(made.url, "/v1/models/load", absolute)).code == 200
    before = made.workers.manager.status("one").pid
    reply = await curl(made.url, "/v1/models/reload", b"")
    assert reply.code == 200 and reply.json["message"] == "Model reloaded: one"
    assert made.workers.manager.status("one").pid not in (before, None)
    reply = await curl(made.url, "/v1/models/unload", b"")
    assert reply.code == 200 and reply.json["success"] is True
    assert made.workers.manager.status("one").phase == "unloaded"
    body = {"prompt": "Hi", "sampling_params": {"max_tokens": 3}}
    reply = await curl(made.url, "/v1/generate", body)
    assert reply.code == 200 and reply.objects[-1]["done"], "a request loads it again"


@pytest.mark.parametrize(
    ("path", "code", "word"),
    [
        ("../outside.gguf", 400, "models dir"),
        ("away.gguf", 400, "models dir"),
        ("/etc/passwd", 400, ".gguf"),
        ("none.gguf", 404, "none.gguf"),
        ("a\0.gguf", 400, "path"),
        ("notes.txt", 404, "notes"),
    ],
)
async def test_no_other_file_is_loaded(made: Made, path: str, code: int, word: str) -> None:
    reply = await curl(made.url, "/v1/models/load", {"model_path": path})
    # otron's ways: an unknown model is a 400.
    assert reply.code == (400 if code == 404 else code), reply.text
    assert word in reply.json["error"]["message"]
    assert made.workers.manager.default == "first"


async def test_nothing_changes_while_requests_wait(made: Made) -> None:
    body = {"model": "first", "prompt": "x", "max_tokens": 200, "ignore_eos": True}
    running = [asyncio.create_task(curl(made.url, "/v1/completions", body)) for _ in range(3)]
    waiting = made.parts._overload
    await asyncio.to_thread(wait_for, lambda: waiting.num_waiting > 0, 20)
    worker = made.workers.manager.status("first").pid or 0
    os.kill(worker, signal.SIGSTOP)  # they wait meanwhile
    try:
        for path, what in (("load", {"model_path": "one.gguf"}), ("unload", b""), ("reload", b"")):
            reply = await curl(made.url, f"/v1/models/{path}", what)
            assert reply.code == 409 and reply.json["error"]["code"] == "model_busy", reply.text
    finally:
        os.kill(worker, signal.SIGCONT)
    replies = await asyncio.gather(*running)
    assert [r.code for r in replies] == [200] * 3


async def test_settings_of_the_server_stay(made: Made) -> None:
    for more, word in (({"context_size": 4096}, "n_ctx"), ({"gpu_layers": 99}, "n_gpu_layers")):
        reply = await curl(made.url, "/v1/models/load", {"model_path": "one.gguf", **more})
        assert reply.code == 400 and word in reply.json["error"]["message"]
    assert made.workers.manager.default == "first"


async def test_only_administrators_load(folder: Path) -> None:
    options = GatewayOptions(models_dir=str(folder))
    workers = Workers(options, [], lambda _: None)
    parts = Composition(ServeSettings(options), workers.directory, workers, shared=False)
    paths = {(route.method, route.path) for route in parts.gateway.routes}
    assert ("GET", "/v1/models/list") in paths and ("POST", "/v1/models/load") not in paths
    await parts.close()
    await asyncio.to_thread(workers.close)


async def test_otron_stops_repetition(made: Made) -> None:
    body = {
        "model": "first",
        "messages": [{"role": "user", "content": "Say ha."}],
        "temperature": 0,
        "logit_bias": {"655": 100},
        "max_tokens": 400,
    }
    reply = (await curl(made.url, "/v1/chat/completions", body)).json
    assert reply["choices"][0]["finish_reason"] == "length"
    assert reply["usage"]["completion_tokens"] < 100, json.dumps(reply)
    reply = await curl(made.url, "/v1/chat/completions", {**body, "model": "unknown"})
    assert reply.code == 400 and reply.json["error"]["type"] == "model_mismatch"
