"""`llm.serve()` in a notebook: what may answer where a Jupyter server is said to be."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from fakes import FakeClient
from remote_gateway import RemoteGateway

from llmkit.cli import main
from llmkit.errors import EngineError
from llmkit.notebook import serving
from llmkit.notebook.sharing import Sharing
from llmkit.protocol import ModelDescription, Origin
from llmkit.sessions.conversation import open_store

MODEL = ModelDescription("m", "m.gguf", created=5)


@pytest.fixture
def listings(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """What the gateway of this kernel's Jupyter server lists, one answer after the other."""
    answers: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            data = answers.pop(0) if len(answers) > 1 else answers[0]
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(data).encode())

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        known = {"pid": os.getpid(), "url": f"http://127.0.0.1:{server.server_port}/", "token": "t"}
        monkeypatch.setenv("JPY_PARENT_PID", str(os.getpid()))
        monkeypatch.setattr("jupyter_server.serverapp.list_running_servers", lambda log: [known])
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield answers
        server.shutdown()
        thread.join(30)


def listing(**models: int) -> dict[str, Any]:
    """Names, ``__`` for @, and when each was loaded."""
    data = [{"id": name.replace("__", "@"), "created": at} for name, at in models.items()]
    return {"object": "list", "data": data}


@pytest.mark.parametrize(
    ("found", "name"),
    [
        (listing(m=5), "m"),
        (listing(m=5, m__other=4), "m"),
        (listing(m=9, m__k=5, m__other=5), "m@k"),
        (listing(m=5, m__k=5), "m@k"),  # loaded in the same second
        ({"data": [{"id": "m", "created": 9}, {"id": "m@k-1", "created": 5}]}, "m@k-1"),
        (listing(m=9), None),
        (listing(m=9, m__other=5), None),
        ({"data": [{"id": "m"}, 5, None]}, None),
        ([], None),
        ({"data": None}, None),
    ],
)
def test_the_name_is_that_of_this_very_model(
    listings: list[Any], monkeypatch: pytest.MonkeyPatch, found: Any, name: str | None
) -> None:
    monkeypatch.setattr(serving, "LISTED_AFTER_S", (0.0, 0.0))
    listings.append(found)
    endpoint = serving._in_jupyter(MODEL, "m@k")
    assert (endpoint and endpoint.model) == name


def test_a_model_that_was_loaded_just_now_is_listed_a_moment_later(
    listings: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    listings += [listing(), listing(m=5), listing(m=9, m__k=5)]
    client = FakeClient("m")
    client.description = MODEL
    origin = Origin("kernel", os.getpid(), "k")
    monkeypatch.setattr(FakeClient, "origin", origin)
    sharing = Sharing(None)
    assert sharing.serve(client, 0).model == "m"
    assert sharing.serve(client, 0).model == "m@k", "another notebook has loaded one since"
    sharing.close()
    client.close()


@pytest.mark.parametrize("place", ["variable", "file", "neither", "broken"])
def test_a_gateway_of_its_own_has_the_database_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, place: str
) -> None:
    url = f"sqlite:///{tmp_path}/mine.db"
    for name in [n for n in os.environ if n.startswith("LLMKIT_")]:
        monkeypatch.delenv(name)
    (tmp_path / "llmkit.toml").write_text(f'db_url = "{url}"\nport = 1234\n')
    if place in ("variable", "broken"):
        monkeypatch.setenv("LLMKIT_DB_URL", url)
    if place == "file":
        monkeypatch.setenv("LLMKIT_CONFIG", str(tmp_path / "llmkit.toml"))
    monkeypatch.setenv("LLMKIT_API_KEY", "theirs")
    monkeypatch.setenv("LLMKIT_PORT", "no port" if place == "broken" else "1234")
    seen: dict[str, str] = {}

    def start(command: list[str], env: dict[str, str], **_: Any) -> Any:
        seen.update({k: v for k, v in env.items() if k.startswith("LLMKIT_")})
        raise EngineError("enough")

    if place == "file":
        open_store().database.close()
        assert (tmp_path / "mine.db").exists()
    monkeypatch.setattr(subprocess, "Popen", start)
    with pytest.raises(EngineError, match="enough"):
        serving._start(MODEL, 0, os.getpid())
    assert seen.pop("LLMKIT_API_KEY") != "theirs" and seen.pop("LLMKIT_HOST") == "127.0.0.1"
    assert seen == ({} if place == "neither" else {"LLMKIT_DB_URL": url})


def test_whoever_talks_garbage_there_is_no_jupyter_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JPY_PARENT_PID", str(os.getpid()))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = {
            "pid": os.getpid(),
            "url": f"http://127.0.0.1:{listening.getsockname()[1]}/",
            "token": "t",
        }
        monkeypatch.setattr("jupyter_server.serverapp.list_running_servers", lambda log: [server])

        def answer() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.recv(1 << 16)
                connection.sendall(b"SSH-2.0-OpenSSH_9.6\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        assert serving._in_jupyter(ModelDescription("m", "m.gguf"), "m@k") is None
        thread.join()


def test_keys_of_its_database_do_not_open_a_gateway_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(serving.DB_URL, f"sqlite:///{tmp_path}/team.db")
    assert main(["keys", "add", "ann"]) == 0
    of_ann = capsys.readouterr().out.strip()
    gateway = RemoteGateway(api_key="fresh", db_url=os.environ[serving.DB_URL])

    def asked(key: str) -> int:
        headers = {"Authorization": f"Bearer {key}"}
        request = urllib.request.Request(f"{gateway.url}/v1/models", headers=headers)
        try:
            return int(serving.DIRECT.open(request, timeout=30).status)
        except urllib.error.HTTPError as refused:
            return refused.code

    try:
        assert (asked("fresh"), asked(of_ann)) == (200, 401)
    finally:
        gateway.stop()
