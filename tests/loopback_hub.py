"""A Hugging Face Hub on loopback, as far as llmkit asks one: listing, metadata, files in ranges,
and what goes wrong on the way (gates, tokens, cut and slow connections, damage, redirects)."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from llmkit.models import download

DATA = b"GGUF" + os.urandom(599_996)  # the model's file
OTHER = b"GGUF" + DATA[:3:-1]  # the same in another type
FILE = "m-Q4_K_M.gguf"
COMMIT = "a" * 40
CHUNK = 1 << 14
HELD_AT = 12 * CHUNK


@dataclass
class Hub:
    """What the server has and how it behaves. ``content`` is by repository and file."""

    content: dict[str, dict[str, bytes]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    token: str | None = None  # needed for everything, if set
    commit: str = COMMIT
    by_git: bool = False  # files are not stored by LFS
    ranges: bool = True
    cut_after: list[int] = field(default_factory=list)  # bytes of the next answers, then the end
    statuses: list[int] = field(default_factory=list)  # of the next answers to GET
    retry_after: str = "0"  # with those
    damage: int = 0  # so many answers have a wrong byte
    pause_s: float = 0.0  # after each chunk
    held: threading.Event | None = None  # which the chunks after `HELD_AT` bytes wait for
    cdn: str = ""  # where to redirect to
    requests: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    url: str = ""

    def add(self, repo: str, **files: bytes) -> None:
        self.content.setdefault(repo, {}).update(files)

    def gets(self, word: str = "/resolve/") -> list[dict[str, str]]:
        """The headers of the GETs of a file so far."""
        return [h for method, path, h in self.requests if method == "GET" and word in path]


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        hub = self.hub
        path = unquote(self.path.split("?")[0])
        headers = {name.title(): value for name, value in self.headers.items()}
        hub.requests.append((self.command, path, headers))
        api = path.startswith("/api/models/")
        parts = path.removeprefix("/api/models").strip("/").split("/")
        repo = "/".join(parts[:2])
        if path.startswith("/cdn/"):
            return self.send_file(path.removeprefix("/cdn/"))
        if hub.token and self.headers.get("Authorization") != f"Bearer {hub.token}":
            return self.fail(401, "", "Invalid credentials in Authorization header")
        if repo in hub.gated:
            return self.fail(403, "GatedRepo")
        if repo not in hub.content:
            return self.fail(404, "RepoNotFound")
        files = hub.content[repo]
        if api:
            if len(parts) > 3 and parts[3] not in ("main", hub.commit):
                return self.fail(404, "RevisionNotFound")
            siblings = [
                {"rfilename": n, "size": len(d), "blobId": "b" * 40,
                 "lfs": {"sha256": hashlib.sha256(d).hexdigest(), "size": len(d), "pointerSize": 9}}
                for n, d in files.items()
            ]  # fmt: skip
            listed = {"id": repo, "sha": hub.commit, "siblings": siblings}
            return self.send(200, json.dumps(listed).encode())
        revision, name = parts[3], "/".join(parts[4:])
        if revision not in ("main", hub.commit):
            return self.fail(404, "RevisionNotFound")
        if name not in files:
            return self.fail(404, "EntryNotFound")
        data = files[name]
        digest = (
            hashlib.sha1(f"blob {len(data)}\0".encode() + data)
            if hub.by_git
            else hashlib.sha256(data)
        ).hexdigest()
        headers = {"ETag": f'"{digest}"', "X-Repo-Commit": hub.commit}
        if hub.cdn:
            headers |= {
                "X-Linked-Etag": f'"{digest}"',
                "X-Linked-Size": str(len(data)),
                "Location": f"{hub.cdn}/cdn/{repo}/{name}",
            }
            return self.send(302, b"", headers)
        if self.command == "HEAD":
            return self.send(200, data, headers)
        return self.send_file(f"{repo}/{name}", headers)

    def send_file(self, place: str, headers: dict[str, str] | None = None) -> None:
        hub = self.hub
        org, repo, name = place.split("/", 2)
        data = hub.content[f"{org}/{repo}"][name]
        if hub.statuses:
            return self.send(hub.statuses.pop(0), b"{}", {"Retry-After": hub.retry_after})
        if hub.damage:
            hub.damage -= 1
            data = data[:-1] + bytes([data[-1] ^ 1])
        start, status = 0, 200
        headers = dict(headers or {})
        if hub.ranges and "Range" in self.headers:
            start = int(self.headers["Range"].removeprefix("bytes=").split("-")[0])
            status = 206
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            if start >= len(data):
                return self.send(416, b"", {"Content-Range": f"bytes */{len(data)}"})
        cut = hub.cut_after.pop(0) if hub.cut_after else None
        self.send(status, data[start:], headers, cut)

    def fail(self, code: int, kind: str, message: str = "") -> None:
        headers = {"X-Error-Message": message or kind}
        self.send(code, b"{}", headers | ({"X-Error-Code": kind} if kind else {}))

    def send(
        self, code: int, data: bytes, headers: dict[str, str] | None = None, cut: int | None = None
    ) -> None:
        self.send_response(code)
        for key, value in {**(headers or {}), "Content-Length": str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        with contextlib.suppress(OSError):
            for at in range(0, len(data if cut is None else data[:cut]), CHUNK):
                end = at + CHUNK if cut is None else min(at + CHUNK, cut)
                if self.hub.held is not None and at >= HELD_AT:
                    self.hub.held.wait(60)
                self.wfile.write(data[at:end])
                if self.hub.pause_s:
                    time.sleep(self.hub.pause_s)
        if cut is not None:
            self.close_connection = True
            with contextlib.suppress(OSError):
                self.connection.shutdown(2)

    def log_message(self, *_: Any) -> None: ...


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: Any) -> None: ...  # clients leave in some tests


@contextlib.contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """The hub at ``hub.url``."""
    server = Server(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": hub}))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def use(hub_url: str, home: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let huggingface_hub, in this process, ask this hub and keep its cache in ``home``."""
    from huggingface_hub import constants

    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    template = hub_url + "/{repo_id}/resolve/{revision}/{filename}"
    for name, value in {
        "ENDPOINT": hub_url,
        "HUGGINGFACE_CO_URL_TEMPLATE": template,
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_TOKEN_PATH": str(home / "token"),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_DOWNLOAD_TIMEOUT": 30,
    }.items():
        monkeypatch.setattr(constants, name, value)
    forget_session()


def forget_session() -> None:
    """The next request sees changed settings."""
    from huggingface_hub import utils

    forget: Any = getattr(utils, "close_session", None) or utils.reset_sessions  # below 1.0
    forget()


def fetch(name: str = f"org/m:{FILE}", **more: Any) -> Path:
    return download.download(name, **more).path


def parts(tmp_path: Path) -> list[Path]:
    """Files that are not fetched whole."""
    return [p for p in tmp_path.rglob("*") if p.suffix in (".incomplete", ".part")]
