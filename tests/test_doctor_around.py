"""`llmkit doctor` looks around the machine: servers, Jupyter, ports, runtime folders."""

from __future__ import annotations

import json
import os
import socket
import stat
from pathlib import Path

import pytest
from doctor_run import only
from fakes import FakeClient
from gateway_client import Api
from terminal import Script

from llmkit.bridge.server import BridgeServer
from llmkit.cli import surroundings


def test_the_runtime_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "here"
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(place))
    assert only(surroundings.runtime_folder()).level == "ok"
    assert stat.S_IMODE(place.stat().st_mode) == 0o700
    place.chmod(0o777)
    found = only(surroundings.runtime_folder())
    assert found.level == "warn" and "chmod 700" in found.advice
    monkeypatch.setattr("os.getuid", lambda: 12345)
    assert only(surroundings.runtime_folder()).level == "warn"
    monkeypatch.setattr("os.access", lambda *_: False)
    assert only(surroundings.runtime_folder()).level == "bad"
    (tmp_path / "file").touch()
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "file" / "below"))
    found = only(surroundings.runtime_folder())
    assert found.level == "bad" and "JUPYTER_RUNTIME_DIR" in found.advice


def test_the_models_that_run(fake: FakeClient) -> None:
    assert only(surroundings.models(), "running").level == "none"
    bridge = BridgeServer(fake)
    found = only(surroundings.models(), "running")
    assert found.level == "ok" and f"fake (process {os.getpid()}, cpu)" in found.text
    bridge.close()


@pytest.fixture
def jupyter_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "config"
    (folder / "jupyter_server_config.d").mkdir(parents=True)
    monkeypatch.setattr("jupyter_core.paths.jupyter_config_path", lambda: [str(folder)])
    return folder


@pytest.mark.parametrize(
    "texts, level, words",
    [
        ({}, "warn", "not enabled"),
        ({"d/llmkit.json": '{"ServerApp": {"jpserver_extensions": {"llmkit_jupyter": true}}}'},
         "ok", "enabled by"),
        ({"json": '{"ServerApp": {"jpserver_extensions": {"llmkit_jupyter": false}}}',
          "d/llmkit.json": '{"ServerApp": {"jpserver_extensions": {"llmkit_jupyter": true}}}'},
         "warn", "disabled by"),
        ({"json": "nonsense", "d/a.json": "[]", "d/b.json": '{"ServerApp": 3}'},
         "warn", "not enabled"),
    ],
)  # fmt: skip
def test_the_extension(jupyter_config: Path, texts: dict[str, str], level: str, words: str) -> None:
    for name, text in texts.items():
        (jupyter_config / f"jupyter_server_config.{name}").write_text(text)
    found = only(surroundings.extension())
    assert found.level == level and words in found.text
    assert level == "ok" or "jupyter server extension enable llmkit_jupyter" in found.advice


def test_the_servers_that_run(private_runtime: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    monkeypatch.setattr(surroundings, "PATIENCE_S", 60.0)
    assert only(surroundings.servers()).level == "none"
    with Script((200, {}, b"{}")) as server:
        url = server.url.removesuffix("v1")
        file = private_runtime / "jpserver-1.json"
        alive = {"url": url, "pid": os.getpid(), "token": "secret"}
        file.write_text(json.dumps(alive))
        found = only(surroundings.servers())
        assert found.level == "ok" and f"{url}llmkit/v1" in found.text
        assert "secret" not in found.text
        method, path, head = server.heads[-1]
        assert (method, path) == ("GET", "/llmkit/v1/models")
        assert head["authorization"] == "Bearer secret"
        file.write_text(json.dumps({**alive, "token": ""}))
        assert only(surroundings.servers()).level == "ok"
        assert "authorization" not in server.heads[-1][2], "the user's key"
        for other in ({**alive, "pid": 2**30}, {**alive, "pid": "x"}, [], 3, {}):
            file.write_text(json.dumps(other))
            assert only(surroundings.servers()).level == "none"
        for url in ("", "javascript:x", "http://127.0.0.1:9/", "http://h\n/"):
            file.write_text(json.dumps({**alive, "url": url}))
            assert only(surroundings.servers()).level == "warn"
        file.write_text("x" * (2 << 20))
        assert only(surroundings.servers()).level == "none"


async def test_the_port(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    import asyncio

    monkeypatch.setattr(surroundings, "PATIENCE_S", 60.0)
    number = int(api.url.rsplit(":", 1)[1])
    found = only(await asyncio.to_thread(lambda: list(surroundings.port(number=number))))
    assert found.level == "warn" and "by a gateway of llmkit" in found.text
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        free = taken.getsockname()[1]
    assert only(surroundings.port(number=free)).level == "ok"
    assert only(surroundings.port(number=0)).level == "ok"
    monkeypatch.setenv("LLMKIT_API_KEY", "secret")
    with Script((404, {}, b"{}")) as other:
        number = int(other.url.split(":")[2].split("/")[0])
        found = only(surroundings.port(number=number))
        assert "another program" in found.text and "--port" in found.advice
        assert other.heads and "authorization" not in other.heads[-1][2], "the user's key"
    assert only(surroundings.port("192.0.2.1", 3000)).level == "warn"  # not an address of ours
