"""Downloading and deleting models through the gateway, from a hub on loopback."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import Future
from pathlib import Path

import media_models
import pytest
import tiny_models
from fakes import wait_for
from gateway_client import Api
from loopback_hub import Hub, serving, use
from tornado.netutil import bind_sockets

from llmkit.cli.offering import finder
from llmkit.errors import ModelBusyError, ModelNotFoundError
from llmkit.gateway.app import make_server
from llmkit.gateway.composition import Composition
from llmkit.gateway.directory import EngineDirectory
from llmkit.gateway.storage import Storage
from llmkit.models.copies import places_for
from llmkit.models.library import Library
from llmkit.settings.gateway import GatewayOptions
from llmkit.settings.serving import ServeSettings, read_settings
from llmkit.wanted import worker_task
from llmkit.workers.budget import Need
from llmkit.workers.models import ModelManager
from llmkit.workers.place import ServedModel


@pytest.fixture
def models_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "models"
    folder.mkdir()
    return folder


async def gateway(models_dir: Path, **options: bool) -> AsyncIterator[Api]:
    settings = ServeSettings(GatewayOptions(models_dir=str(models_dir), **options))
    directory = EngineDirectory([])
    parts = Composition(settings, directory)
    server = make_server(parts.app(), edge=parts.access.edge)
    sockets = bind_sockets(0, "127.0.0.1")
    server.add_sockets(sockets)
    yield Api(f"http://127.0.0.1:{sockets[0].getsockname()[1]}")
    server.stop()
    await server.close_all_connections()
    await parts.close()


@pytest.fixture
async def api(models_dir: Path) -> AsyncIterator[Api]:
    async for api in gateway(models_dir, admin=True):
        yield api


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[bytes]:
    """The bytes of a model that the hub has."""
    data = tiny_models.write(tmp_path / "tiny.gguf", "llama").read_bytes()
    with serving(hub := Hub({"org/tiny": {"tiny-Q8_0.gguf": data}})):
        use(hub.url, tmp_path / "hf", monkeypatch)
        yield data


async def test_a_model_is_pulled_listed_and_deleted(
    api: Api, tiny: bytes, models_dir: Path
) -> None:
    events = await api.events("/admin/storage/pull", {"model": "org/tiny:tiny-Q8_0.gguf"})
    assert events[-1] == "[DONE]" and events[-2]["phase"] == "done"
    assert events[-2]["id"] == "org/tiny/tiny-Q8_0"
    (file,) = models_dir.rglob("*.gguf")
    assert file.read_bytes() == tiny
    stored = json.loads((await api.fetch("GET", "/admin/storage")).body)["models"]
    (mine,) = [m for m in stored if m["source"] == "folder"]
    assert mine["architecture"] == "llama" and mine["size_bytes"] == len(tiny)
    reply = await api.fetch("DELETE", f"/admin/storage/{mine['id']}")
    assert reply.code == 200 and json.loads(reply.body)["size_bytes"] == len(tiny)
    assert not list(models_dir.rglob("*.gguf"))
    assert (await api.fetch("DELETE", f"/admin/storage/{mine['id']}")).code == 404


async def test_ollamas_pull_and_delete(api: Api, tiny: bytes, models_dir: Path) -> None:
    reply = await api.fetch("POST", "/api/pull", {"model": "hf.co/org/tiny:tiny-Q8_0.gguf"})
    lines = [json.loads(line) for line in reply.body.splitlines()]
    assert reply.code == 200 and lines[0]["status"] == "pulling manifest"
    assert lines[-1] == {"status": "success"}
    (file,) = models_dir.rglob("*.gguf")
    name = str(file.relative_to(models_dir).with_suffix(""))
    named = {"name": "org/tiny:tiny-Q8_0.gguf", "model": "", "username": "", "password": ""}
    code, again = await api.post("/api/pull", {**named, "stream": False})
    assert code == 200 and again == {"status": "success"}
    assert (await api.fetch("DELETE", "/api/delete", {"model": name})).code == 200
    assert not file.exists()
    assert (await api.fetch("DELETE", "/api/delete", {"model": name})).code == 404


async def test_what_was_pulled_is_found_by_the_name_it_was_pulled_by(
    api: Api, tiny: bytes, models_dir: Path
) -> None:
    name = "org/tiny:Q8_0"
    code, done = await api.post("/admin/storage/pull", {"model": name, "stream": False})
    assert code == 200 and done["id"] == "org/tiny/tiny-Q8_0"
    settings = read_settings({"models_dir": str(models_dir)}, None, {})
    manager = ModelManager((), find=finder(settings), start=False)
    for spelled in (name, "org/tiny:tiny-Q8_0.gguf", "hf.co/org/tiny:Q8_0", "org/tiny"):
        assert manager.known(spelled) is None and manager.name_of(spelled) == done["id"]
        assert manager.known(spelled) == done["id"], "kept, so that the disk is not looked at again"
    assert manager.names() == [done["id"]]
    assert (await api.fetch("DELETE", f"/admin/storage/{name}")).code == 200
    assert not list(models_dir.rglob("*.gguf")) and manager.known(name) is None
    code, _ = await api.post("/api/pull", {"model": f"hf.co/{name}", "stream": False})
    assert code == 200 and list(models_dir.rglob("*.gguf"))
    assert (await api.fetch("DELETE", "/api/delete", {"model": f"hf.co/{name}"})).code == 200
    assert not list(models_dir.rglob("*.gguf"))


@pytest.mark.parametrize("name", ["org/none:Q4_K_M", "../../etc/passwd", "org/tiny:none.gguf", ""])
async def test_what_is_not_there_is_an_error_before_the_first_byte(
    api: Api, tiny: bytes, name: str
) -> None:
    for path in ("/admin/storage/pull", "/api/pull"):
        reply = await api.fetch("POST", path, {"model": name})
        assert reply.code in (400, 404) and json.loads(reply.body)["error"]


async def test_nothing_outside_the_folder_is_deleted(
    api: Api, models_dir: Path, tmp_path: Path
) -> None:
    outside = tiny_models.write(tmp_path / "outside.gguf", "llama")
    (models_dir / "link.gguf").symlink_to(outside)
    for name in ("../outside", "../outside.gguf", str(outside), "link"):
        await api.fetch("DELETE", f"/admin/storage/{name}")
        await api.fetch("DELETE", "/api/delete", {"model": name})
    assert outside.exists()


async def test_the_model_of_a_loaded_copy_stays(
    models_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = tiny_models.write(models_dir / "tiny.gguf", "llama")
    place = places_for([file], "Q8_0")[0]
    place.parent.mkdir()
    copy = tiny_models.write(place, "llama")
    storage = Storage(Library(models_dir, cache=tmp_path / "hub"))
    with pytest.raises(ModelBusyError, match="'tiny' is in use"):
        await storage.remove("tiny", frozenset({copy.resolve()}))
    assert file.exists() and copy.exists()
    await storage.remove("tiny", frozenset())
    assert not file.exists() and not copy.exists()


@pytest.mark.parametrize("used", ["tiny", "draft", "eye"])
async def test_a_model_stays_while_it_is_being_loaded_or_another_needs_it(
    models_dir: Path, tmp_path: Path, used: str
) -> None:
    for name in ("tiny", "draft"):
        tiny_models.write(models_dir / f"{name}.gguf", "llama")
    (models_dir / "eye").mkdir()
    tiny_models.write(models_dir / "eye" / "eye.gguf", "llama")
    eye = media_models.write_vision(models_dir / "eye" / "mmproj-eye.gguf", "phi4")
    options = {"draft": str(models_dir / "draft.gguf"), "projector": str(eye)}
    file = models_dir / "tiny.gguf"
    task = worker_task(file, name="tiny", tuned=False, force=False, **options)
    other = ServedModel("other", lambda: task, lambda _: Need(1), lazy=True)
    manager = ModelManager([other], start=False)
    storage = Storage(Library(models_dir, cache=tmp_path / "hub"), manager.files)
    place = manager._places["other"]
    place.want(Future())
    wait_for(lambda: place.need() is not None)
    assert manager.files() >= {file.resolve(), eye.resolve()}
    with pytest.raises(ModelBusyError, match="is in use"):
        await storage.remove("eye/eye" if used == "eye" else used, frozenset())
    place.refuse(ModelBusyError("no room"))
    await storage.remove("eye/eye" if used == "eye" else used, frozenset())


def test_a_model_whose_file_was_deleted_is_not_offered(tmp_path: Path) -> None:
    file = tiny_models.write(tmp_path / "tiny.gguf", "llama")
    settings = read_settings({"models_dir": str(tmp_path)}, None, {})
    manager = ModelManager((), find=finder(settings), start=False)
    assert manager.name_of("tiny") == "tiny" and manager.names() == ["tiny"]
    content = file.read_bytes()
    file.unlink()
    assert manager.names() == [] == manager.statuses() and manager.known("tiny") is None
    with pytest.raises(ModelNotFoundError, match="none is offered"):
        manager.load("tiny")
    file.write_bytes(content)
    assert manager.name_of("tiny") == "tiny" and manager.status("tiny").phase == "unloaded"


def test_another_file_under_a_deleted_models_name_is_offered(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in "ab"]
    for folder in folders:
        folder.mkdir()
    files = [tiny_models.write(folder / "tiny.gguf", "llama") for folder in folders]
    found = [finder(read_settings({"models_dir": str(f)}, None, {})) for f in folders]
    manager = ModelManager((), find=lambda name: found[0](name), start=False)  # type: ignore[misc]
    assert manager.name_of("tiny") == "tiny"
    files[0].unlink()
    del found[0]
    assert manager.name_of("tiny") == "tiny" and manager.names() == ["tiny"]


async def test_without_admin_the_routes_are_not_there(models_dir: Path, tiny: bytes) -> None:
    async for api in gateway(models_dir):
        for method, path in (
            ("GET", "/admin/storage"),
            ("POST", "/admin/storage/pull"),
            ("POST", "/api/pull"),
            ("DELETE", "/api/delete"),
        ):
            body = None if method == "GET" else {"model": "org/tiny:tiny-Q8_0.gguf"}
            assert (await api.fetch(method, path, body)).code == 404
        assert not list(models_dir.rglob("*.gguf"))
