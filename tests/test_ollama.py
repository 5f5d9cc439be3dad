"""Ollama's routes: strict shapes on the fake model."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest
from fakes import FakeClient
from gateway_client import Api, serve
from test_dialects import reference

from llmkit.bridge.server import BridgeServer
from llmkit.gateway.bodies import parse
from llmkit.gateway.media.attached import Attached
from llmkit.gateway.ollama.routes import OLLAMA_VERSION
from llmkit.gateway.ollama.schemas import ChatBody, GenerateBody
from llmkit.protocol import Grammar, ModelDescription


@pytest.fixture
async def api(fake: FakeClient) -> AsyncIterator[Api]:
    bridge = BridgeServer(fake)
    async for api in serve(None):
        yield api
    bridge.close()


async def test_ollama_chat_in_lines_and_whole(api: Api, fake: FakeClient) -> None:
    ask = {
        "model": "fake:latest",
        "messages": [{"role": "user", "content": "hi"}],
        "options": {"num_predict": 8, "temperature": 0.0},
    }
    reply = await api.fetch("POST", "/api/chat", ask)
    lines = [json.loads(line) for line in reply.body.decode().splitlines()]
    assert reply.headers["Content-Type"] == "application/x-ndjson" and [
        line["done"] for line in lines
    ] == [False] * (len(lines) - 1) + [True]
    assert (
        "".join(line["message"]["content"] for line in lines) == reference(fake)
        and lines[-1]["done_reason"] == "length"
    )
    assert (
        lines[-1]["eval_count"] == 8
        and lines[-1]["prompt_eval_count"] == 8
        and lines[-1]["total_duration"] >= lines[-1]["eval_duration"] > 0
    )
    status, whole = await api.post("/api/chat", {**ask, "stream": False})
    assert (
        status == 200
        and whole["message"] == {"role": "assistant", "content": reference(fake)}
        and whole["done"] is True
    )
    _, text = await api.post(
        "/api/generate",
        {
            "model": "fake",
            "prompt": "hi",
            "raw": True,
            "stream": False,
            "options": {"num_predict": 5},
        },
    )
    assert text["response"] == reference(fake, b"hi", 5) and text["done_reason"] == "length"
    _, load = await api.post("/api/generate", {"model": "fake", "stream": False})
    assert load["done_reason"] == "load"


async def test_ollama_negatives_and_nulls_are_defaults(api: Api) -> None:
    options = {"seed": -1, "num_predict": 3, "repeat_last_n": -1, "temperature": None}
    ask = {
        "model": "fake",
        "messages": [{"role": "user", "content": "x", "images": []}],
        "options": options,
        "stream": False,
    }
    assert (await api.post("/api/chat", ask))[0] == 200
    refused = await api.fetch(
        "POST", "/api/generate", {"model": "fake", "prompt": "x", "raw": True, "system": "y"}
    )
    assert refused.code == 400 and "raw" in json.loads(refused.body)["error"]


# What Ollama's own client, which is in Go, sends with every request.
EMPTY: dict[str, Any] = {"suffix": "", "system": "", "template": "", "options": None}


async def test_empty_texts_are_as_if_they_were_not_there(api: Api, fake: FakeClient) -> None:
    few = {"options": {"num_predict": 5, "temperature": 0}}
    ask = {"model": "fake", "stream": False, "prompt": "hi", **few}
    _, plain = await api.post("/api/generate", ask)
    status, same = await api.post("/api/generate", {**EMPTY, **ask})
    assert status == 200 and same["response"] == plain["response"]
    status, text = await api.post("/api/generate", {**EMPTY, **ask, "raw": True})
    assert status == 200 and text["response"] == reference(fake, b"hi", 5)
    status, load = await api.post("/api/generate", {**EMPTY, **ask, "prompt": ""})
    assert status == 200 and load["done_reason"] == "load"
    ending = {"model": "fake", "keep_alive": 0, "prompt": "", "suffix": "", "system": ""}
    body = parse(GenerateBody, json.dumps(ending).encode())
    assert body.ends_model and not body.uses_model


@pytest.mark.parametrize(
    "options",
    [
        {"num_ctx": True},
        {"num_ctx": 0},
        {"num_predict": 0},
        {"num_cores": 2},
        {"temperature": "hot"},
        {"repeat_penalty": 0},
        {"stop": [1]},
    ],
)
async def test_ollama_options_are_honoured_or_refused(api: Api, options: dict[str, Any]) -> None:
    reply = await api.fetch(
        "POST",
        "/api/chat",
        {"model": "fake", "messages": [{"role": "user", "content": "x"}], "options": options},
    )
    assert reply.code == 400 and next(iter(options)) in json.loads(reply.body)["error"]


ADD = {"type": "function", "function": {"name": "add"}}


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"think": True}, "think"),
        ({"tools": [ADD], "format": "json"}, "format"),
        ({"tools": [ADD, ADD]}, "tools"),
    ],
)
async def test_ollama_faults_are_named_as_the_caller_named_them(
    api: Api, change: dict[str, Any], field: str
) -> None:
    asked = {"model": "fake", "messages": [{"role": "user", "content": "x"}], **change}
    reply = await api.fetch("POST", "/api/chat", asked)
    assert reply.code == 400 and field in json.loads(reply.body)["error"]


def test_ollama_words_are_translated() -> None:
    given: dict[str, Any] = {
        "model": "m",
        "messages": [
            {"role": "user", "content": "x"},
            {
                "role": "assistant",
                "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1}}}],
            },
            {"role": "tool", "content": "1", "tool_name": "add"},
        ],
        "format": {"type": "object"},
        "options": {"num_predict": -1, "stop": ["x"], "repeat_penalty": 1.1, "num_ctx": 100},
        "think": False,
    }
    model = ModelDescription("m", "m.gguf", n_ctx=200)
    chat = parse(ChatBody, json.dumps(given).encode()).chat(model, Attached(model))
    sampling = chat.sampling
    assert (
        sampling.max_tokens is None
        and sampling.stop == ("x",)
        and sampling.repetition_penalty == 1.1
        and sampling.grammar == Grammar("json_schema", '{"type": "object"}', origin="format")
    )
    assert [c.arguments for c in chat.messages[1].tool_calls] == ['{"a": 1}']


async def test_what_ollama_lists(api: Api) -> None:
    tags, ps = [
        json.loads((await api.fetch("GET", f"/api/{what}")).body)["models"]
        for what in ("tags", "ps")
    ]
    assert (
        tags[0]["name"] == ps[0]["model"] == "fake"
        and tags[0]["details"]["format"] == "gguf"
        and ps[0]["size_vram"] == 0
    )
    assert json.loads((await api.fetch("GET", "/api/version")).body) == {"version": OLLAMA_VERSION}
    status, show = await api.post("/api/show", {"model": "fake"})
    assert (
        status == 200
        and "completion" in show["capabilities"]
        and show["details"]["families"] is not None
    )


@pytest.mark.parametrize(
    ("kind", "capabilities"), [({"ranks": True}, []), ({"embedding_size": 2}, ["embedding"])]
)
async def test_what_does_not_complete_does_not_say_so(
    fake: FakeClient, kind: dict[str, Any], capabilities: list[str]
) -> None:
    fake.description = replace(fake.description, **kind)
    bridge = BridgeServer(fake)
    async for api in serve(None):
        _, show = await api.post("/api/show", {"model": "fake"})
        assert show["capabilities"] == capabilities
    bridge.close()
