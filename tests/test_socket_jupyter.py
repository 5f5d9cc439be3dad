"""The chat socket through a Jupyter server: its login, its authorizer, a kernel's model."""

from __future__ import annotations

import json
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import websocket
from fakes import wait_for
from jupyter_client_http import JupyterServer

FAKE = """
import sys; sys.path.insert(0, {tests!r})
from fakes import FakeClient
from fake_runner import FakeRunner
from llmkit.bridge.server import BridgeServer
model = FakeClient(runner=FakeRunner(n_ctx=5000, step_s=0.002))
bridge = BridgeServer(model, kernel_id=model.origin.kernel_id)
"""
AUTHORIZER = """
from jupyter_server.auth import Authorizer

class Readers(Authorizer):
    def is_authorized(self, handler, user, action, resource):
        return not (resource == "llmkit" and action == "execute")
"""

# Who is let in is written in files, as a hub would say it; what takes seconds is quick.
PROVIDER = """
from pathlib import Path

from jupyter_server.auth import Authorizer, IdentityProvider, User
from tornado import web

from llmkit.gateway.sockets import room
from llmkit_jupyter import socket

room.CHECK_S, room.IDLE_CHECKS = 0.05, 1
socket.ASK_S = 0.2
FOLDER = Path({folder!r})


def note(what):
    with open(FOLDER / "asked", "a") as file:
        file.write(what + " ")


class Hub(IdentityProvider):
    async def get_user(self, handler):
        if hasattr(handler, "_found"):  # what some remember of a request
            return handler._found
        note("user")
        socket.TRUSTED_S = float((FOLDER / "trusted").read_text())
        said = (FOLDER / "user").read_text()
        if said == "down":
            raise web.HTTPError(502, "the hub does not answer")
        handler._found = User(said) if said else None
        return handler._found


class Readers(Authorizer):
    def is_authorized(self, handler, user, action, resource):
        if resource == "llmkit":
            note(action)
        return resource != "llmkit" or not (FOLDER / "mute").exists()
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[JupyterServer]:
    folder = tmp_path_factory.mktemp("jupyter")
    home = f"--ServerApp.config_file={folder}/none"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_DATA_HOME", str(folder / "data"))
        jupyter = JupyterServer(folder, home, base_url="/user/ann/")
    yield jupyter
    jupyter.stop()


def connect(server: JupyterServer, path: str = "v1/chat/ws", **options: Any) -> Any:
    url = f"{server.url.replace('http', 'ws', 1)}/llmkit/{path}"
    options.setdefault("header", [f"Authorization: Bearer {server.token}"])
    options.setdefault("subprotocols", ["llmkit.chat"])
    return websocket.create_connection(url, timeout=30, suppress_origin=True, **options)


def frame(ws: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(ws.recv())
    return found


def until(ws: Any, kind: str) -> list[dict[str, Any]]:
    frames = [frame(ws)]
    while frames[-1]["type"] != kind:
        frames.append(frame(ws))
    return frames


@pytest.mark.parametrize("path", ["v1/chat/ws", "ws/chat", "chat/ws", "ws"])
def test_the_token_opens_it_at_each_of_its_addresses(server: JupyterServer, path: str) -> None:
    for options in (
        {"header": [f"Authorization: token {server.token}"]},
        {"header": [f"x-api-key: {server.token}"]},
    ):
        ws = connect(server, path, **options)
        assert frame(ws)["type"] == "hello"
        ws.close()


@pytest.mark.parametrize(
    ("options", "status", "code"),
    [
        ({"header": []}, 401, "invalid_api_key"),
        ({"header": ["Authorization: Bearer wrong"]}, 401, "invalid_api_key"),
        ({"host": "evil.example"}, 403, None),
    ],
)
def test_nobody_else_gets_in(
    server: JupyterServer, options: dict[str, Any], status: int, code: str | None
) -> None:
    with pytest.raises(websocket.WebSocketBadStatusException) as caught:
        connect(server, **options)
    assert caught.value.status_code == status
    error = json.loads(caught.value.resp_body)["error"]
    assert error["message"] and (code is None or error["code"] == code)


def test_a_page_of_another_site_cannot_use_the_login(server: JupyterServer) -> None:
    with urllib.request.urlopen(f"{server.url}/api/status?token={server.token}") as reply:
        cookies = [c.partition(";")[0] for c in reply.headers.get_all("Set-Cookie")]
    login = f"Cookie: {'; '.join(cookies)}"
    ws = connect(server, header=[login, f"Origin: http://{urlsplit(server.url).netloc}"])
    assert frame(ws)["type"] == "hello"
    ws.close()
    with pytest.raises(websocket.WebSocketBadStatusException) as caught:
        connect(server, header=[login, "Origin: http://evil.example"])
    assert caught.value.status_code == 403
    assert json.loads(caught.value.resp_body)["error"]["code"] == "forbidden_origin"


def test_a_kernels_model_answers_and_a_turn_is_resumed(server: JupyterServer) -> None:
    kernel = server.kernel()
    tests = Path(__file__).parent
    _, error = kernel.wait(kernel.start(FAKE.format(tests=str(tests))))
    assert error is None, error
    ws = connect(server)
    assert frame(ws)["models"] == ["fake"]
    ask = {"type": "send", "content": "hi", "settings": {"max_tokens": 200, "temperature": 0}}
    ws.send(json.dumps(ask))
    turn = until(ws, "turn")[-1]["turn"]
    first = until(ws, "delta")[-1]
    ws.sock.close()
    again = connect(server)
    frame(again)
    again.send(json.dumps({"type": "resume", "turn": turn, "after": first["seq"]}))
    frames = until(again, "end")
    rest = "".join(f["text"] for f in frames if f["type"] == "delta")
    assert first["text"] + rest == frames[-1]["message"]["content"]
    assert len(first["text"] + rest) == 200
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
    again.send(json.dumps(body))
    chunks = iter(again.recv, "[DONE]")
    assert all(json.loads(c)["object"] == "chat.completion.chunk" for c in chunks)
    again.close()


def test_the_authorizer_is_asked(tmp_path: Any) -> None:
    (tmp_path / "readers.py").write_text(AUTHORIZER)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(tmp_path))
        patch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
        server = JupyterServer(tmp_path, "--ServerApp.authorizer_class=readers.Readers")
    try:
        ws = connect(server)
        assert frame(ws)["type"] == "hello"
        for message in (
            {"type": "send", "content": "hi"},
            {"type": "cancel", "turn": "turn_0"},
            {"messages": [{"role": "user", "content": "hi"}]},
        ):
            ws.send(json.dumps(message))
            assert frame(ws)["error"]["code"] == "forbidden"
        ws.send(json.dumps({"type": "resume", "turn": "turn_0"}))
        assert frame(ws)["error"]["code"] == "not_found"
        ws.close()
    finally:
        server.stop()


def say(user: Path, name: str) -> None:
    """At once: it is read all the time."""
    (new := user.with_suffix(".new")).write_text(name)
    new.replace(user)


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[JupyterServer, Path]]:
    """A server whose identity provider lets in whoever a file names."""
    folder = tmp_path_factory.mktemp("hub")
    (folder / "provider.py").write_text(PROVIDER.format(folder=str(folder)))
    user = folder / "user"
    say(user, "ann")
    say(folder / "trusted", "1")  # seconds
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(folder))
        patch.setenv("XDG_DATA_HOME", str(folder / "data"))
        jupyter = JupyterServer(
            folder,
            "--ServerApp.identity_provider_class=provider.Hub",
            "--ServerApp.authorizer_class=provider.Readers",
        )
    yield jupyter, user
    jupyter.stop()


@pytest.mark.parametrize(
    ("said", "code"),
    [
        ("", "invalid_api_key"),  # logged out
        ("bob", "invalid_api_key"),  # somebody else by now
        ("down", "identity_unknown"),  # for longer than a moment
    ],
)
def test_a_login_that_ends_ends_its_sockets(
    hub: tuple[JupyterServer, Path], said: str, code: str
) -> None:
    server, user = hub
    say(user, "ann")
    ws = connect(server)
    assert frame(ws)["type"] == "hello"
    for _ in range(3):  # it is asked for again, and found again
        time.sleep(0.15)
        ws.send(json.dumps({"type": "ping"}))
        assert frame(ws)["type"] == "pong"
    say(user, said)
    assert frame(ws)["error"]["code"] == code
    opcode, data = ws.recv_data()
    assert opcode == websocket.ABNF.OPCODE_CLOSE and data[:2] == (1008).to_bytes(2, "big")
    ws.close()


def test_a_hub_that_is_away_for_a_moment_ends_nothing(hub: tuple[JupyterServer, Path]) -> None:
    server, user = hub
    log = user.parent / "asked"

    def asked(times: int) -> None:
        last = log.read_text().count("user") + times
        wait_for(lambda: log.read_text().count("user") >= last)

    say(user, "ann")
    say(user.parent / "trusted", "600")  # a moment on any machine
    ws = connect(server)
    assert frame(ws)["type"] == "hello"
    say(user, "down")
    asked(3)
    say(user, "ann")
    asked(3)
    for _ in range(5):
        ws.send(json.dumps({"type": "ping"}))
        assert frame(ws)["type"] == "pong"
    ws.close()
    say(user.parent / "trusted", "1")


def test_the_authorizer_is_asked_as_seldom_as_the_provider(
    hub: tuple[JupyterServer, Path],
) -> None:
    """Not with each look at the sockets, of which there are more."""
    server, user = hub
    say(user, "ann")
    ws = connect(server)
    assert frame(ws)["type"] == "hello"
    log = user.parent / "asked"
    before = log.read_text().split()
    asked: list[str] = []
    while asked.count("user") < 6:
        time.sleep(0.1)
        asked = log.read_text().split()[len(before) :]
    assert asked.count("user") - 1 <= asked.count("read") <= asked.count("user") + 1
    ws.close()


def test_what_the_authorizer_says_now_counts(hub: tuple[JupyterServer, Path]) -> None:
    server, user = hub
    say(user, "ann")
    ws = connect(server)
    assert frame(ws)["type"] == "hello"
    mute = user.parent / "mute"
    mute.touch()
    try:
        assert frame(ws)["error"]["code"] == "forbidden"
        assert ws.recv_data()[0] == websocket.ABNF.OPCODE_CLOSE
        ws.close()
        with pytest.raises(websocket.WebSocketBadStatusException) as caught:
            connect(server)
        assert caught.value.status_code == 403
    finally:
        mute.unlink()
