"""The Postman collection and the .http file: current, complete, and what the server takes."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import pytest
from conftest import ROOT
from fakes import wait_for
from pictures import picture
from test_cli import Served


@pytest.fixture(scope="module")
def made() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("ci_requests", ROOT / ".ci" / "requests.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["ci_requests"] = module  # dataclasses look for it
    spec.loader.exec_module(module)
    yield module
    del sys.modules["ci_requests"]


@pytest.fixture(scope="module")
def files(made: ModuleType) -> dict[Path, str]:
    found: dict[Path, str] = made.files()
    return found


def test_the_files_are_current(files: dict[Path, str]) -> None:
    for path, text in files.items():
        assert path.read_text(encoding="utf-8") == text, "run `.venv/bin/python .ci/requests.py`"


def items(files: dict[Path, str]) -> list[dict[str, Any]]:
    collection = json.loads(next(text for path, text in files.items() if path.suffix == ".json"))
    assert collection["info"]["schema"].endswith("/v2.1.0/collection.json")
    assert {v["key"] for v in collection["variable"]} == {"base_url", "key"}
    return [item["request"] for folder in collection["item"] for item in folder["item"]]


def test_the_collection_has_every_route(made: ModuleType, files: dict[Path, str]) -> None:
    import asyncio

    described = made.requests(asyncio.run(made.document()))
    found = items(files)
    assert len(found) == len(described) > 60
    raw = {(r["method"], r["url"]["raw"].removeprefix("{{base_url}}")) for r in found}
    assert len(raw) == len(found)
    for request in described:
        assert (request.method, re.sub(r"\{(\w+)\}", r":\1", request.path)) in raw
    for request in found:
        variables = [v["key"] for v in request["url"].get("variable", [])]
        assert variables == re.findall(r":(\w+)", request["url"]["raw"].removeprefix("{{"))
        if request.get("body", {}).get("mode") == "formdata":
            assert [f["type"] for f in request["body"]["formdata"]].count("file") == 1
        elif "body" in request:
            json.loads(request["body"]["raw"])
            assert request["header"] == [{"key": "Content-Type", "value": "application/json"}]


def test_the_http_file_has_the_same(files: dict[Path, str]) -> None:
    text = next(text for path, text in files.items() if path.suffix == ".http")
    blocks = text.split("\n### ")[1:]
    declared = {*re.findall(r"^@(\w+) = ", text, re.MULTILINE)}
    assert {*re.findall(r"\{\{(\w+)\}\}", text)} <= declared
    found = items(files)
    assert len(blocks) == len(found)
    for block, request in zip(blocks, found, strict=True):
        _, line, auth, *rest = block.rstrip("\n").split("\n")
        path = re.sub(r"\{\{(?!base_url)(\w+)\}\}", r":\1", line.partition(" ")[2])
        assert line.partition(" ")[0] == request["method"] and path == request["url"]["raw"]
        assert auth == "Authorization: Bearer {{key}}"
        body = "\n".join(rest).partition("\n\n")[2]
        if request.get("body", {}).get("mode") == "formdata":
            names = [f["key"] for f in request["body"]["formdata"]]
            assert re.findall(r'form-data; name="(\w+)"', body) == names
            assert body.endswith("--part--")
        else:
            assert body == request.get("body", {}).get("raw", "")


# What a server without these cannot do, and says so.
ELSEWHERE = (404, 405, 409, 501)


def test_an_echo_takes_every_request(files: dict[Path, str], tmp_path: Path) -> None:
    database = f"sqlite:///{tmp_path}/llmkit.db"
    server = Served("echo", "--port", "0", "--db-url", database, "--log-level", "warning")
    base = server.url.removesuffix("/v1")

    def send(method: str, path: str, body: str | None) -> tuple[int, bytes]:
        data = None if body is None else body.encode()
        request = urllib.request.Request(base + path, data, method=method)
        request.add_header("Content-Type", "application/json")
        try:
            with urllib.request.urlopen(request, timeout=30) as reply:
                return reply.status, reply.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    try:
        wait_for(lambda: server.health() == 200, 30)
        said = json.dumps({"messages": [{"role": "user", "content": "hi"}]})
        status, data = send("POST", "/v1/sessions", said)
        assert status < 300, data
        session = json.loads(data)
        places = {"session_id": session["id"], "message_id": session["head"]}
        # What deletes or ends comes last, so that the others find what they need.
        ordered = sorted(items(files), key=lambda r: r["method"] == "DELETE")
        assert len(ordered) == len(items(files))
        answered, refused = 0, []
        for request in ordered:
            path = request["url"]["raw"].removeprefix("{{base_url}}")
            for variable in request["url"].get("variable", []):
                value = places.get(variable["key"]) or variable["value"] or "none"
                path = path.replace(f":{variable['key']}", value)
            if request.get("body", {}).get("mode") == "formdata":
                fields = request["body"]["formdata"]
                form = {f["key"]: f["value"] for f in fields if f["type"] == "text"}
                files_of = {f["key"]: (f["src"], picture()) for f in fields if "src" in f}
                reply = httpx.post(base + path, data=form, files=files_of, timeout=30)
                status, data = reply.status_code, reply.content
            else:
                status, data = send(request["method"], path, request.get("body", {}).get("raw"))
            fine = status < 300 or status in ELSEWHERE
            refused += [] if fine else [(request["method"], path, status, data[:300])]
            answered += status < 300
        assert not refused and answered > 45
    finally:
        server.stop()
