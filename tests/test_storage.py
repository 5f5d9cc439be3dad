"""What lies in Hugging Face's cache and in packages, removal, and the commands on models."""

from __future__ import annotations

import asyncio
import hashlib
import http.server
import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from fakes import FakeClient
from filelock import FileLock
from gateway_client import Api, serve
from header_files import split, write

import llmkit
from llmkit.cli import main
from llmkit.errors import InvalidRequestError, ModelNotFoundError
from llmkit.gateway.exchange import Exchange
from llmkit.gateway.failures import ApiError
from llmkit.gateway.ops.openapi import Route
from llmkit.models import registry
from llmkit.models.copies import places_for
from llmkit.models.library import Library, StoredModel
from llmkit.models.quantization import TYPES, label_of
from llmkit.models.removal import remove
from llmkit.models.scanning import OWN, hub_cache
from llmkit.settings.options import WEIGHT_TYPES


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "models"
    folder.mkdir()
    return folder


@pytest.fixture
def shelf(root: Path, tmp_path: Path) -> Library:
    """A library of one folder and an empty cache."""
    return Library(root, cache=tmp_path / "hub")


def by_id(shelf: Library) -> dict[str, StoredModel]:
    return {m.id: m for m in shelf.models()}


SHA = "c" * 40


def cached(cache: Path, repo: str, revision: str, ref: str | None, **files: Path) -> Path:
    """Files in the layout of Hugging Face's cache."""
    folder = cache / f"models--{repo.replace('/', '--')}"
    for name, source in files.items():
        blob = folder / "blobs" / hashlib.sha256(source.read_bytes()).hexdigest()
        blob.parent.mkdir(parents=True, exist_ok=True)
        if not blob.exists():
            blob.write_bytes(source.read_bytes())
        pointer = (
            folder / "snapshots" / revision / name.replace("__", "/").replace("_gguf", ".gguf")
        )
        pointer.parent.mkdir(parents=True, exist_ok=True)
        pointer.symlink_to(os.path.relpath(blob, pointer.parent))
    if ref:
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / ref).write_text(revision)
    return folder


def test_the_cache_of_the_hub(root: Path, tmp_path: Path) -> None:
    cache = tmp_path / "hub"
    shelf = Library(None, cache=cache)
    one, two = write(root / "one.gguf"), write(root / "two.gguf", "qwen3")
    cached(cache, "org/repo", "a" * 40, "main", same_gguf=one, new_gguf=one, sub__x_gguf=two)
    folder = cached(cache, "org/repo", "b" * 40, "v1", same_gguf=one, new_gguf=two)
    cached(cache, "org/repo", SHA, None, old_gguf=two)
    (cache / "datasets--org--x").mkdir()
    (cache / ".locks").mkdir()
    found = by_id(shelf)
    assert [i for i in found if i.startswith("org/")] == [
        "org/repo:new.gguf",
        "org/repo:old.gguf",
        "org/repo:same.gguf",
        "org/repo:sub/x.gguf",
        "org/repo@v1:new.gguf",
    ]
    assert found["org/repo@v1:new.gguf"].architecture == "qwen3"
    assert found["org/repo:new.gguf"].name == "new"
    assert shelf.resolve("org/repo:sub/x.gguf").path.name == "x.gguf"
    for blob in (folder / "blobs").iterdir():
        blob.unlink()
    assert all("is not there" in m.fault for m in shelf.models() if m.source == "hub")
    leak = folder / "snapshots" / SHA / "leak.gguf"
    leak.symlink_to(one)
    assert "leads out" in by_id(shelf)["org/repo:leak.gguf"].fault


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delitem(sys.modules, "huggingface_hub.constants", raising=False)
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert hub_cache() == Path.home() / ".cache" / "huggingface" / "hub"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert hub_cache() == tmp_path / "x" / "huggingface" / "hub"
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    assert hub_cache() == tmp_path / "home" / "hub"
    monkeypatch.setenv("HF_HUB_CACHE", "$HF_HOME/other")
    assert hub_cache() == tmp_path / "home" / "other"


def test_packages_are_listed_and_not_prepared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    found = by_id(Library(None, cache=tmp_path / "hub"))
    assert found["smollm2"].quantization == "Q4_1" and found["smollm2"].parameters > 1e8
    assert {"smollm2", "minilm"} <= set(found) and not (tmp_path / "cache").exists()
    shelf = Library(None, cache=tmp_path / "hub")
    assert shelf.resolve("smollm2") == registry.resolve("smollm2")


def test_removing_from_the_folder(root: Path, shelf: Library, tmp_path: Path) -> None:
    parts = split(root / "deep" / "er", "m", 2)
    eye = write(root / "deep" / "er" / "mmproj-f16.gguf", "clip")
    copy = places_for(parts, "Q8_0")[0]
    write(copy)
    other = write(root / "deep" / "other.gguf")
    done = remove(shelf, shelf.find("deep/er/m"))
    assert set(done.files) == {*parts, eye, copy} and done.size_bytes > 0
    assert not (root / "deep" / "er").exists() and other.exists() and root.exists()
    twins = [write(root / "t" / f"gemma-{n}.gguf") for n in ("Q4_0", "Q8_0")]
    eye = write(root / "t" / "mmproj-gemma.gguf", "clip")
    remove(shelf, shelf.find("t/gemma-Q4_0"))
    assert eye.exists() and twins[1].exists(), "the other model needs it"
    real = write(tmp_path / "elsewhere" / "real.gguf")
    (root / "link.gguf").symlink_to(real)
    remove(shelf, shelf.find("link"))
    assert real.exists() and not (root / "link.gguf").is_symlink()
    inside = write(root / "a" / "m.gguf")
    model = shelf.find("a/m")
    inside.unlink()
    inside.parent.rmdir()
    (root / "a").symlink_to(real.parent)
    (real.parent / "m.gguf").write_bytes(b"precious")
    with pytest.raises(InvalidRequestError, match="is not removed: it leads out"):
        remove(shelf, model)
    assert (real.parent / "m.gguf").exists()
    with pytest.raises(InvalidRequestError, match="pip uninstall"):
        remove(shelf, shelf.find("smollm2"))


def test_a_download_in_the_folder_of_what_is_removed_keeps_its_lock(
    root: Path, shelf: Library
) -> None:
    write(root / "org" / "m" / "a.gguf")
    own = root / "org" / "m" / OWN
    own.mkdir()
    idle, held, part = own / "a.lock", own / "b.lock", own / "b.part"
    for file in (idle, held, part):
        file.touch()
    with FileLock(held):
        remove(shelf, shelf.find("org/m/a"))
        assert idle.exists() and held.exists() and part.exists()
        write(root / "org" / "m" / "a.gguf")
        part.unlink()  # it is about to begin, or has just ended
        remove(shelf, shelf.find("org/m/a"))
        assert held.exists()
    write(root / "org" / "m" / "a.gguf")
    remove(shelf, shelf.find("org/m/a"))
    assert not (root / "org").exists()


def test_removing_from_the_cache(root: Path, tmp_path: Path) -> None:
    cache = tmp_path / "hub"
    shelf = Library(None, cache=cache)
    one, two = write(root / "one.gguf"), write(root / "two.gguf", "qwen3")
    folder = cached(cache, "org/repo", "a" * 40, "main", one_gguf=one, twin_gguf=one, two_gguf=two)
    cached(cache, "org/repo", "b" * 40, None, two_gguf=two)
    blobs = folder / "blobs"
    remove(shelf, shelf.find("org/repo:one.gguf"))
    assert len(list(blobs.iterdir())) == 2, "its twin has the same data"
    done = remove(shelf, shelf.find("org/repo:two.gguf"))
    assert len(list(blobs.iterdir())) == 1 and done.size_bytes == two.stat().st_size
    assert next(iter(by_id(shelf))) == "org/repo:twin.gguf"
    remove(shelf, shelf.find("org/repo:twin.gguf"))
    assert not folder.exists() and cache.exists()


def test_the_command_asks_before_it_removes(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(root / "a.gguf")
    monkeypatch.setenv("LLMKIT_MODELS_DIR", str(root))
    with open(os.devnull) as nothing:
        monkeypatch.setattr(sys, "stdin", nothing)
        assert main(["models", "rm", "a"]) == 1 and path.exists()
    assert "--yes" in capsys.readouterr().err
    assert main(["models", "rm", "b", "--yes"]) == 1
    assert "no model 'b'" in capsys.readouterr().err
    assert main(["models", "rm", "a", "--yes", "--json"]) == 0 and not path.exists()
    assert json.loads(capsys.readouterr().out)["files"] == [str(path)]


def test_the_table(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(root / "a-<b>.gguf")
    (root / "bad.gguf").write_text("no")
    table = llmkit.models(root)
    assert "a-<b>" in repr(table) and "bad" in repr(table) and len(table) >= 3
    assert "a-&lt;b&gt;" in table._repr_html_()
    assert list(table.df["id"][:2]) == ["a-<b>", "bad"] and table[0].id == "a-<b>"
    assert table.df["fault"][1] and len(table[:1].df) == 1
    monkeypatch.setenv("LLMKIT_MODELS_DIR", str(root))
    assert [m.id for m in llmkit.models()][:2] == ["a-<b>", "bad"]
    assert registry.resolve("a-<b>").path == root / "a-<b>.gguf"
    with pytest.raises(ModelNotFoundError, match="did you mean 'bad'"):
        registry.resolve("badd")


def test_info_of_the_command(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(root / "a.gguf", general__license="mit")
    (root / "bad.gguf").write_text("no")
    folder = ["--models-dir", str(root)]
    assert main(["models", "info", "a", *folder]) == 0
    out = capsys.readouterr().out
    assert "mit" in out and str(path) in out and "F16" in out
    assert main(["models", "info", "bad", "--json", *folder]) == 0
    assert "looks like text" in json.loads(capsys.readouterr().out)["fault"]
    assert main(["models", "info", str(path), "--json"]) == 0, "any file, by its path"
    assert json.loads(capsys.readouterr().out)["metadata"]["general.license"] == "mit"
    assert main(["models", "info", "nope", *folder]) == 1


def test_types_of_weights() -> None:
    assert set(WEIGHT_TYPES) == set(TYPES), "the setting offers what can be made"
    names = {
        "m-q4_0.gguf": "Q4_0",
        "Model.i1-Q4_K_M.gguf": "Q4_K_M",
        "m-UD-Q4_K_XL-00001-of-00002.gguf": "UD-Q4_K_XL",
        "gpt-oss-20b-mxfp4.gguf": "MXFP4",
        "m-FP16.gguf": "F16",
        "Q8_0": "Q8_0",
        "qwen2.5-q.gguf": "",
        "": "",
    }
    assert {name: label_of(name) for name in names} == names


async def command(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    """What the command prints, while the gateway of this thread runs on."""
    code = await asyncio.to_thread(main, ["models", *argv])
    out = capsys.readouterr()
    return code, out.out, out.err


async def test_models_of_a_running_gateway(
    api: Api, model: FakeClient, capsys: pytest.CaptureFixture[str]
) -> None:
    url = ["--base-url", f"{api.url}/v1"]
    code, out, _ = await command(capsys, "list", *url)
    assert code == 0 and "fake" in out and "loaded" in out
    code, out, _ = await command(capsys, "list", "--json", *url)
    assert json.loads(out)["models"][0]["id"] == "fake"
    code, _, err = await command(capsys, "load", "fake", *url)
    assert code == 1 and "--admin" in err, "no admin routes"
    for wrong, words in (
        ("nonsense", "looks like"),
        ("http://127.0.0.1:9/v1", "nothing answers"),
        (f"{api.url}/v2", "no route GET /v2/models"),
    ):
        code, _, err = await command(capsys, "list", "--base-url", wrong)
        assert code == 1 and words in err


async def test_models_of_a_gateway_that_may_be_administered(
    model: FakeClient, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []

    async def admin(exchange: Exchange) -> None:
        states = [
            {"id": "fake", "phase": "ready", "is_default": True, "ram_bytes": 5_000_000},
            {"id": "other", "phase": "unloaded", "reason": "idle\x1b[31m"},
        ]
        exchange.send_json({"default": "fake", "models": states})

    async def act(exchange: Exchange) -> None:
        asked.append(json.loads(exchange.body))
        if asked[-1]["model"] == "none":
            raise ApiError(404, "there is no model 'none' here.", code="model_not_found")
        if asked[-1]["model"] == "evil":
            raise ApiError(404, "no\x1b]52;c;x\x07pe", code="model_not_found")
        name = "evil\x1b[2J" if asked[-1]["model"] == "odd" else asked[-1]["model"]
        exchange.send_json({"id": name})

    routes = [
        Route("GET", "/admin/models", admin, "Models", "Admin"),
        Route("POST", "/admin/models/load", act, "Load", "Admin"),
        Route("POST", "/admin/models/unload", act, "Unload", "Admin"),
    ]
    async for api in serve("secret", routes=routes, admin=True):
        url = ["--base-url", f"{api.url}/v1/"]
        code, _, err = await command(capsys, "list", *url)
        assert code == 1 and "LLMKIT_API_KEY" in err
        monkeypatch.setenv("LLMKIT_API_KEY", "secret")
        code, out, err = await command(capsys, "list", *url)
        assert code == 0, err
        lines = [line.split() for line in out.splitlines()]
        assert lines[1][:3] == ["fake", "ready", "yes"] and "5 MB" in out
        assert lines[2] == ["other", "unloaded", "idle\\x1b[31m"]
        assert await command(capsys, "load", "other", *url) == (0, "loaded other\n", "")
        assert await command(capsys, "unload", "fake", "--force", *url) == (
            0,
            "unloaded fake\n",
            "",
        )
        code, _, err = await command(capsys, "unload", "none", *url)
        assert code == 1 and "no model 'none'" in err
        code, _, err = await command(capsys, "load", "evil", *url)
        assert code == 1 and err.startswith("llmkit: no]52;c;xpe ("), (
            "nothing for the terminal to obey"
        )
        assert await command(capsys, "load", "odd", *url) == (0, "loaded evil\\x1b[2J\n", "")
    assert asked[:2] == [{"model": "other"}, {"model": "fake", "force": True}]


@pytest.mark.parametrize("body", [b"[1, 2]", b"null", b'{"data": null}', b'{"choices": []}'])
def test_a_server_that_is_no_gateway(body: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    class Other(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.do_GET()

        def log_message(self, *_: Any) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Other)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        url = ["--base-url", f"http://127.0.0.1:{server.server_port}/v1"]
        for words, what in ((["list"], "lists no models"), (["load", "x"], "what it did")):
            assert main(["models", *words, *url]) == 1
            out, err = capsys.readouterr()
            assert out == "" and what in err, "nothing was loaded"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
