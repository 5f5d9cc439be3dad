"""The routes' own description: valid, complete, and the same as what is written in docs/api.md; the
page needs no network."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from pathlib import Path

import jsonschema
import pytest
from fakes import FakeClient
from gateway_client import Api, serve

from llmkit.bridge.server import BridgeServer
from llmkit.gateway.access.clock import SteadyClock
from llmkit.gateway.app import Gateway
from llmkit.gateway.directory import EngineDirectory
from llmkit.gateway.openai.chat import ChatRequest
from llmkit.gateway.openai.schemas import CompletionRequest
from llmkit.gateway.ops.openapi import describe
from llmkit.gateway.ops.status import fragment
from llmkit.gateway.ops.usage import UsageRoutes

ROUTES = Gateway(EngineDirectory()).routes
USAGE = UsageRoutes(None, SteadyClock()).routes()  # type: ignore[arg-type]  # where use is kept
LLAMA_SERVERS = ("fail_on_no_slot",)


@pytest.fixture
async def api(fake: FakeClient) -> AsyncIterator[Api]:
    bridge = BridgeServer(fake)
    async for api in serve(None):
        yield api
    bridge.close()


async def test_the_document(api: Api) -> None:
    document = json.loads((await api.fetch("GET", "/openapi.json")).body)
    assert document == json.loads(json.dumps(describe(ROUTES))) and document["openapi"] == "3.1.0"
    operations = [
        (path, method, operation)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    ]
    assert len(operations) == len(ROUTES) and len(
        {o["operationId"] for _, _, o in operations}
    ) == len(ROUTES)
    for schema in document["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(schema)
    text = json.dumps(document)
    for name in re.findall(r'"#/components/schemas/([^"]+)"', text):
        assert name in document["components"]["schemas"]
    for path, _, operation in operations:
        parameters = operation.get("parameters", [])
        in_path = [p["name"] for p in parameters if p["in"] == "path"]
        assert re.findall(r"\{(\w+)\}", path) == in_path and "default" in operation["responses"]
        assert all(p["description"] for p in parameters if p["in"] == "query")
    chat = document["components"]["schemas"]["ChatRequest"]["properties"]
    assert {"messages", "tools", "response_format", "logprobs", "dry_multiplier"} <= chat.keys()


def test_what_routes_read_of_a_query_is_described() -> None:
    read: set[str] = set()
    for path in (Path(__file__).parents[1] / "llmkit" / "gateway").rglob("*.py"):
        reading = r'(?:\.query\(|number_of\(exchange, |_flag\(exchange, )"(\w+)"'
        read.update(re.findall(reading, path.read_text()))
    described = {query.name for route in ROUTES for query in route.query}
    days = {query.name for route in USAGE for query in route.query}
    assert read - {"part"} == described | days, "part is the page's own"


async def test_the_page_runs_nothing_and_fetches_nothing(api: Api) -> None:
    for path in ("/docs", "/swagger-ui"):
        reply = await api.fetch("GET", path)
        page = reply.body.decode()
        assert (
            reply.code == 200 and "default-src 'none'" in reply.headers["Content-Security-Policy"]
        )
        assert (
            "<script" not in page
            and "http:" not in page
            and "https:" not in page
            and all(f"<code>{r.template}</code>" in page for r in ROUTES)
        )


def test_the_written_docs_know_every_route_and_parameter() -> None:
    docs = Path(__file__).parents[1] / "docs"
    text = "".join((docs / page).read_text() for page in ("api.md", "reference/sessions.md"))
    for route in [*ROUTES, *USAGE]:
        assert (
            re.sub(r"\{\w+\+?\}", "{id}", route.path) in text
            or f"/{route.path.rpartition('/')[2]}`" in text
        ), route.path
        for query in route.query:
            assert f"`{query.name}" in text or query.name in LLAMA_SERVERS, query.name
    for schema in (ChatRequest, CompletionRequest):
        for name in schema.model_fields:
            assert re.search(rf"^\|.*`{name}`.*\|", text, re.MULTILINE), name


async def test_the_status_page_shows_models_and_requests(api: Api, fake: FakeClient) -> None:
    await api.post("/v1/completions", {"prompt": "hi", "max_tokens": 2})
    while True:  # the engine tells its counters twice a second
        state = json.loads((await api.fetch("GET", "/status")).body)
        (found,) = state["models"]
        if found["generation_tokens_total"] == 2:  # the request itself is counted before
            break
        await asyncio.sleep(0.05)
    assert found["id"] == "fake" and found["requests_total"] == 1 and found["rss_bytes"] > 1e6
    assert state["callers"] == [{"caller": "local", "requests": 1}] and state["requests"] == []
    part = (await api.fetch("GET", "/status?part=1")).body.decode()
    assert part.startswith("<h2>Models</h2>") and "<script" not in part and "local" in part
    assert "<code>fake</code>" in part


async def test_what_runs_is_seen_and_escaped(api: Api, fake: FakeClient) -> None:
    fake.runner.step_s = 0.5
    running = asyncio.create_task(api.post("/v1/completions", {"prompt": "hi", "max_tokens": 100}))
    while not (requests := json.loads((await api.fetch("GET", "/status")).body)["requests"]):
        await asyncio.sleep(0.02)
    assert requests[0]["route"] == "POST /v1/completions"
    fake.runner.step_s = 0.0
    await running
    assert (
        fragment(
            {
                "models": [],
                "requests": [{"caller": "<b>", "route": "<i>", "seconds": 1}],
                "callers": [],
                "offered": [],
                "gone": [],
                "version": "1",
                "up_s": 1,
            }
        ).count("&lt;")
        == 2
    )
