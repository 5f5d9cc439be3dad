"""Pictures through a Jupyter server's own gateway, to the model of a notebook: over HTTP in each
dialect, and over its socket."""

from __future__ import annotations

import base64
import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from jupyter_client_http import JupyterServer
from media_parts import png
from test_socket_jupyter import connect, until
from toy_models import write_colours

from llmkit.media import pictures

pytestmark = pytest.mark.model
ASKED = " is the word. Which word did I say?"


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[JupyterServer]:
    """A server with a notebook whose model knows four colours."""
    folder = tmp_path_factory.mktemp("jupyter")
    projector = write_colours(folder / "mmproj.gguf")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_DATA_HOME", str(folder / "data"))
        server = JupyterServer(folder)
    kernel = server.kernel()
    load = f"llmkit.load('smollm2', n_ctx=1024, n_slots=2, projector={str(projector)!r})"
    _, error = kernel.wait(kernel.start(f"import llmkit; llm = {load}"))
    assert error is None, error
    yield server
    server.stop()


def encoded(picture: bytes) -> str:
    return base64.b64encode(picture).decode()


def parts(picture: bytes) -> list[dict[str, Any]]:
    address = f"data:image/png;base64,{encoded(picture)}"
    image = {"type": "image_url", "image_url": {"url": address}}
    return [image, {"type": "text", "text": ASKED}]


RED, BLUE = png((255, 0, 0)), png((0, 0, 255))
LIMITS = {"max_tokens": 12, "temperature": 0}


def test_every_dialect_reaches_the_notebook(seeing: JupyterServer) -> None:
    block = {"type": "image", "source": {
        "type": "base64", "media_type": "image/png", "data": encoded(RED)}}  # fmt: skip
    image = {"type": "input_image", "image_url": f"data:image/png;base64,{encoded(RED)}"}
    asked: dict[str, dict[str, Any]] = {
        "/v1/chat/completions": {"messages": [{"role": "user", "content": parts(RED)}], **LIMITS},
        "/v1/messages": {
            "messages": [{"role": "user", "content": [block, {"type": "text", "text": ASKED}]}],
            **LIMITS,
        },
        "/v1/responses": {
            "input": [{"role": "user", "content": [image, {"type": "input_text", "text": ASKED}]}],
            "max_output_tokens": 16, "temperature": 0, "store": False,
        },
        "/api/chat": {
            "messages": [{"role": "user", "content": ASKED, "images": [encoded(RED)]}],
            "stream": False, "options": {"num_predict": 12, "temperature": 0},
        },
    }  # fmt: skip
    for path, body in asked.items():
        answer = seeing.request("POST", f"/llmkit{path}", {"model": "default", **body})
        assert "red" in json.dumps(answer).lower(), (path, answer)


def test_a_large_picture_and_one_that_is_none(seeing: JupyterServer) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (2100, 2100, 3), np.uint8)
    large = pictures.png(noise)
    assert len(large) > 12_000_000  # in base64 more than other bodies may have
    body: dict[str, Any] = {"messages": [{"role": "user", "content": parts(large)}]}
    seen = seeing.request("POST", "/llmkit/v1/chat/completions", {**body, "max_tokens": 1})
    assert seen["usage"]["prompt_tokens_details"]["image_tokens"] > 1
    body["messages"] = [{"role": "user", "content": parts(b"<svg/>")}]
    with pytest.raises(urllib.error.HTTPError) as caught:
        seeing.request("POST", "/llmkit/v1/chat/completions", body)
    error = json.load(caught.value)["error"]
    assert caught.value.code == 400 and error["param"] == "messages" and "SVG" in error["message"]


def test_a_turn_over_the_socket_sees_and_remembers(seeing: JupyterServer) -> None:
    ws = connect(seeing)
    ask = {"type": "send", "content": parts(BLUE), "settings": LIMITS}
    ws.send(json.dumps(ask))
    frames = until(ws, "end")
    session = next(f for f in frames if f["type"] == "turn")["session"]
    assert "blue" in frames[-1]["message"]["content"]
    ws.send(
        json.dumps(
            {"type": "send", "session": session, "content": "Say it again.", "settings": LIMITS}
        )
    )
    again = until(ws, "end")[-1]
    assert again["usage"]["cached_tokens"] > 0, again
    shown = seeing.request("GET", f"/llmkit/v1/sessions/{session}/messages")
    assert "image" in json.dumps(shown["data"][0])
    # The body of a request, as other services take it.
    ws.send(json.dumps({"messages": [{"role": "user", "content": parts(RED)}], **LIMITS}))
    text = "".join(
        json.loads(chunk)["choices"][0]["delta"].get("content") or ""
        for chunk in iter(ws.recv, "[DONE]")
        if json.loads(chunk)["choices"]
    )
    assert "red" in text
    ws.send(json.dumps({"type": "send", "content": parts(b"<svg/>"), "ref": "mine"}))
    error = until(ws, "error")[-1]
    assert error["ref"] == "mine" and "SVG" in error["error"]["message"]
    ws.close()


def test_a_notebooks_edits_are_refused_by_what_is_missing(seeing: JupyterServer) -> None:
    """A form is read under Jupyter too; nothing here draws."""
    boundary = "x" * 20
    fields = [
        'Content-Disposition: form-data; name="prompt"\r\n\r\na cat',
        'Content-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n'
        + RED.decode("latin-1"),
    ]
    text = "".join(f"--{boundary}\r\n{field}\r\n" for field in fields) + f"--{boundary}--\r\n"
    reply = post_form(seeing, "/llmkit/v1/images/edits", boundary, text.encode("latin-1"))
    assert reply.code == 404 and "llmkit[images]" in json.load(reply)["error"]["message"]


def post_form(server: JupyterServer, path: str, boundary: str, body: bytes) -> Any:
    kind = f"multipart/form-data; boundary={boundary}"
    head = {"Authorization": f"Bearer {server.token}", "Content-Type": kind}
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(urllib.request.Request(server.url + path, body, head), timeout=30)
    return caught.value
