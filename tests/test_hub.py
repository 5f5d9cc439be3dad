"""Names on the Hugging Face hub: the real huggingface_hub against a small hub on loopback."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import tiny_models

from llmkit.models.hub import is_hub_name

pytestmark = pytest.mark.model
COMMIT = "a" * 40


class Hub(BaseHTTPRequestHandler):
    """Just enough of the hub: resolve, model information, a gated and a missing repository."""

    content = b""
    requests: list[str] = []  # noqa: RUF012 - one hub a test session

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        Hub.requests.append(f"{self.command} {self.path}")
        path = self.path.split("?")[0]
        if path.startswith(("/gated/", "/api/models/gated/")):
            return self.fail(403, "GatedRepo")
        if not path.startswith(("/org/tiny/", "/api/models/org/tiny")):
            return self.fail(404, "RepoNotFound")
        if path.startswith("/api/models/"):
            data = json.dumps(
                {"id": "org/tiny", "sha": COMMIT, "siblings": [{"rfilename": "tiny-f32.gguf"}]}
            ).encode()
            return self.send(200, data, {"Content-Type": "application/json"}, body)
        _, _, _, _, revision, name = path.split("/", 5)
        if revision not in ("main", COMMIT):
            return self.fail(404, "RevisionNotFound")
        if name != "tiny-f32.gguf":
            return self.fail(404, "EntryNotFound")
        start = (
            int(self.headers["Range"].removeprefix("bytes=").split("-")[0])
            if "Range" in self.headers
            else 0
        )
        etag = hashlib.sha256(Hub.content).hexdigest()
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        return self.send(206 if start else 200, Hub.content[start:], headers, body)

    def fail(self, code: int, kind: str) -> None:
        self.send(code, b"{}", {"X-Error-Code": kind, "X-Error-Message": kind}, True)

    def send(self, code: int, data: bytes, headers: dict[str, str], body: bool) -> None:
        self.send_response(code)
        for key, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        if body and self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    Hub.content = tiny_models.write(
        tmp_path_factory.mktemp("hub") / "tiny.gguf", "llama"
    ).read_bytes()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def load(name: str, hub: str, home: Path) -> subprocess.CompletedProcess[str]:
    """In a process of its own: huggingface_hub reads its settings when it is imported."""
    code = f"""
import llmkit
try:
    with llmkit.load({name!r}, n_ctx=256, n_slots=1, share=False) as llm:
        print(llm.name, llm.generate("a", max_tokens=3, ignore_eos=True).usage.completion_tokens)
except llmkit.ModelNotFoundError as error: print("not found:", error)
"""
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "NO_PROXY": "*",
    }
    environment.pop("HF_TOKEN", None)
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environment
    )


def test_a_file_of_the_hub_is_fetched_once(hub: str, tmp_path: Path) -> None:
    done = load("org/tiny:tiny-f32.gguf", hub, tmp_path)
    assert done.stdout == "tiny-f32 3\n", done
    fetched = [r for r in Hub.requests if r.startswith("GET") and "resolve" in r]
    assert load("org/tiny:tiny-f32.gguf", hub, tmp_path).stdout == "tiny-f32 3\n"
    assert [r for r in Hub.requests if r.startswith("GET") and "resolve" in r] == fetched
    assert (
        load("org/tiny:tiny-f32.gguf", "http://127.0.0.1:9", tmp_path).stdout == "tiny-f32 3\n"
    ), "what is here needs no hub"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("org/tiny:other.gguf", "no file 'other.gguf'; it has tiny-f32.gguf"),
        ("org/none:x.gguf", "no repository org/none"),
        ("gated/model:x.gguf", "accept its terms"),
        ("org/tiny@v9:tiny-f32.gguf", "no revision 'v9'"),
    ],
)
def test_what_is_not_there_is_said(hub: str, tmp_path: Path, name: str, words: str) -> None:
    done = load(name, hub, tmp_path)
    assert done.stdout.startswith("not found:") and words in done.stdout, done


def test_no_way_to_the_hub(tmp_path: Path) -> None:
    assert (
        "cannot be reached" in load("org/tiny:tiny-f32.gguf", "http://127.0.0.1:9", tmp_path).stdout
    )


def test_names() -> None:
    assert is_hub_name("org/repo:file.gguf") and is_hub_name("org/repo@main:sub/file-Q4_0.gguf")
    assert not any(
        is_hub_name(n)
        for n in ("smollm2", "/a/b.gguf", "org/repo", "C:/x.gguf", "org/repo:file.bin")
    )
