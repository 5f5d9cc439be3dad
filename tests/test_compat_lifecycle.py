"""What /v1/models/list and load tell of the disk, and what they cost before a model is loaded."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from compat_gateway import curl
from tiny_models import write
from tornado.netutil import bind_sockets

from llmkit.gateway.app import make_server
from llmkit.gateway.compat import lifecycle
from llmkit.gateway.composition import Composition
from llmkit.gateway.workers import Workers
from llmkit.runtime.local import LocalEngine
from llmkit.settings.gateway import GatewayOptions
from llmkit.settings.serving import ServeSettings
from llmkit.wanted import worker_task
from llmkit.workers.budget import need_of
from llmkit.workers.place import ServedModel


@dataclass
class Made:
    """A server of a models dir; ``loaded`` are the models that it was to load."""

    url: str
    folder: Path
    loaded: list[str] = field(default_factory=list)

    async def load(self, path: str, **more: Any) -> tuple[int, str]:
        reply = await curl(self.url, "/v1/models/load", {"model_path": path, **more})
        return reply.code, reply.json["error"]["message"]


@pytest.fixture
async def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Made]:
    (folder := tmp_path / "models").mkdir()
    write(folder / "one.gguf", "llama")

    def find(name: str) -> ServedModel | None:
        def task() -> dict[str, Any]:
            return worker_task(folder / "one.gguf", name=name, tuned=False, force=True, n_ctx=300)

        return ServedModel(name, task, need_of, lazy=True) if name == "one" else None

    options = GatewayOptions(admin=True, models_dir=str(folder))
    workers = Workers(options, [], find)
    loaded: list[str] = []

    def load(name: str) -> Future[None]:
        loaded.append(name)
        (future := Future[None]()).set_exception(RuntimeError("nothing is loaded here"))
        return future

    monkeypatch.setattr(workers.manager, "load", load)
    parts = Composition(ServeSettings(options), workers.directory, workers, shared=False)
    server = make_server(parts.app(), edge=parts.access.edge)
    sockets = bind_sockets(0, "127.0.0.1")
    server.add_sockets(sockets)
    yield Made(f"http://127.0.0.1:{sockets[0].getsockname()[1]}", folder, loaded)
    server.stop()
    await server.close_all_connections()
    workers.directory.close()
    await parts.close()
    await asyncio.to_thread(workers.close)


async def test_nothing_is_told_of_what_is_elsewhere(made: Made, tmp_path: Path) -> None:
    (tmp_path / "there.gguf").write_bytes(b"GGUF")
    (tmp_path / "folder.gguf").mkdir()
    (tmp_path / "ring.gguf").symlink_to(tmp_path / "ring.gguf")
    (made.folder / "out.gguf").symlink_to(tmp_path / "there.gguf")
    (made.folder / "lost.gguf").symlink_to(tmp_path / "nothing.gguf")
    names = ["there", "nothing", "folder", "ring", "there.gguf/x", "\ud800", "x" * 5000]
    answers = {
        await made.load(f"{place}/{name}.gguf")
        for name in names
        for place in (str(tmp_path), "..", "sub/../..", "/")
    }
    answers |= {await made.load("out.gguf"), await made.load("lost.gguf")}
    assert answers == {(400, "model_path must be in the models dir.")}
    for name in ("there", "nothing"):  # without a suffix it is a name
        code, message = await made.load(f"../{name}")
        assert (code, message) == (400, "model_path: only .gguf files can be loaded.")
    code, message = await made.load(f"{made.folder}/nothing.gguf")
    assert code == 404 and "nothing.gguf" in message
    assert made.loaded == []


@pytest.mark.parametrize("path", ["one.gguf", "one"])
async def test_what_cannot_be_changed_is_refused_before_a_load(made: Made, path: str) -> None:
    code, message = await made.load(path, context_size=4096)
    assert code == 400 and "context_size: 'one' has 512; set n_ctx" in message
    code, message = await made.load(path, gpu_layers=99)
    if not Path("/proc/driver/nvidia/version").exists():
        assert code == 400 and "'one' is on the CPU" in message
        assert made.loaded == []
    made.loaded.clear()
    await made.load(path, context_size=512, gpu_layers=0)
    await made.load(path)
    assert made.loaded == ["one", "one"]


@pytest.mark.model
@pytest.mark.parametrize("n_ctx", [None, 300, 512])
def test_the_context_is_known_before_a_load(tmp_path: Path, n_ctx: int | None) -> None:
    path = write(tmp_path / "m.gguf", "llama")
    task = worker_task(path, name="m", tuned=False, force=True, n_ctx=n_ctx, n_slots=1)
    engine = LocalEngine(path, n_ctx=n_ctx, n_slots=1)
    assert need_of(task).n_ctx == engine.description.n_ctx
    engine.close()
    vectors = worker_task("minilm", name="v", tuned=False, force=True)
    assert need_of(vectors).n_ctx == 0, "not known: what embeds takes what it was made for"


async def test_the_models_dir_is_looked_through_now_and_then(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    walks, walk = [], lifecycle._files

    def counted(folder: Path) -> list[str]:
        walks.append(folder)
        return walk(folder)

    monkeypatch.setattr(lifecycle, "_files", counted)
    monkeypatch.setattr(lifecycle, "LISTED_S", 60.0)
    replies = await asyncio.gather(*(curl(made.url, "/v1/models/list") for _ in range(20)))
    assert all(reply.json == {"models": ["one.gguf"]} for reply in replies)
    assert len(walks) == 1
    monkeypatch.setattr(lifecycle, "LISTED_S", 0.0)
    (made.folder / "sub").mkdir()
    (made.folder / "sub" / "two.GGUF").write_bytes(b"")
    reply = await curl(made.url, "/v1/models/list")
    assert reply.json == {"models": ["one.gguf", "sub/two.GGUF"]} and len(walks) == 2


def test_a_walk_through_the_models_dir_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(20):
        (tmp_path / f"d{i}").mkdir()
        for j in range(20):
            (tmp_path / f"d{i}" / f"{j}.gguf").write_bytes(b"")
    (tmp_path / "d0" / "ring").symlink_to(tmp_path)
    assert len(lifecycle._files(tmp_path)) == 400
    monkeypatch.setattr(lifecycle, "MAX_LISTED", 30)
    assert len(lifecycle._files(tmp_path)) == 30
    opened: list[Any] = []
    scan = os.scandir

    def scanning(path: str) -> Any:
        opened.append(path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", scanning)
    lifecycle._files(tmp_path)
    assert len(opened) <= 4, "the cut comes before the walk's end"
    monkeypatch.setattr(lifecycle, "MAX_LISTED", 1000)
    monkeypatch.setattr(lifecycle, "MAX_SEEN", 50)
    assert len(lifecycle._files(tmp_path)) <= 30
    assert lifecycle._files(tmp_path / "nowhere") == []
