"""The standalone gateway on the fake model: strict shapes, choices, models, disconnects."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from fakes import FakeClient, wait_for
from gateway_client import CHAT, CHAT_TEXT, Api

from llmkit.bridge.server import BridgeServer


async def test_chat_whole(api: Api, model: FakeClient) -> None:
    code, reply = await api.post("/v1/chat/completions", CHAT)
    assert (
        code == 200
        and reply["object"] == "chat.completion"
        and reply["id"].startswith("chatcmpl-")
        and reply["model"] == "fake"
    )
    (choice,) = reply["choices"]
    assert choice == {
        "index": 0,
        "message": {
            "role": "assistant",
            "content": model.runner.reference(CHAT_TEXT, 6).decode(),
            "refusal": None,
        },
        "logprobs": None,
        "finish_reason": "length",
    }
    assert reply["usage"]["prompt_tokens"] == 8 and reply["usage"]["total_tokens"] == 14
    assert reply["system_fingerprint"].startswith("llmkit-")


async def test_null_is_not_given(api: Api) -> None:
    """Clients send null for what they do not use, also for what we do not know."""
    code, _ = await api.post(
        "/v1/chat/completions",
        {**CHAT, "tools": None, "temperature": None, "response_format": None, "stream": None},
    )
    assert code == 200
    code, _ = await api.post("/v1/chat/completions", {**CHAT, "messages": None})
    assert code == 400


async def test_chat_streamed_in_strict_order(api: Api, model: FakeClient) -> None:
    events = await api.events(
        "/v1/chat/completions", {**CHAT, "stream_options": {"include_usage": True}}
    )
    assert events[-1] == "[DONE]"
    chunks = events[:-1]
    assert (
        len({(c["id"], c["created"], c["model"], c["object"]) for c in chunks}) == 1
        and chunks[0]["object"] == "chat.completion.chunk"
    )
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["completion_tokens"] == 6
    assert all(c["usage"] is None for c in chunks[:-1])
    assert (
        chunks[-2]["choices"][0]["delta"] == {}
        and chunks[-2]["choices"][0]["finish_reason"] == "length"
    )
    assert all(c["choices"][0]["finish_reason"] is None for c in chunks[:-2])
    assert "".join(
        c["choices"][0]["delta"].get("content", "") for c in chunks[:-1]
    ).encode() == model.runner.reference(CHAT_TEXT, 6)


async def test_without_include_usage_there_is_no_usage(api: Api) -> None:
    events = await api.events("/v1/chat/completions", CHAT)
    assert all("usage" not in e for e in events[:-1]) and all(e["choices"] for e in events[:-1])


async def test_choices_interleave_and_sum(api: Api) -> None:
    events = await api.events(
        "/v1/chat/completions", {**CHAT, "n": 3, "stream_options": {"include_usage": True}}
    )
    chunks = events[:-1]
    assert {c["choices"][0]["index"] for c in chunks[:-1]} == {0, 1, 2}
    assert sum(c["choices"][0]["finish_reason"] == "length" for c in chunks[:-1]) == 3
    assert (
        chunks[-1]["usage"]["completion_tokens"] == 18 and chunks[-1]["usage"]["prompt_tokens"] == 8
    )
    code, whole = await api.post("/v1/chat/completions", {**CHAT, "n": 3})
    assert (
        code == 200
        and [c["index"] for c in whole["choices"]] == [0, 1, 2]
        and whole["usage"]["completion_tokens"] == 18
    )


@pytest.mark.parametrize(
    ("prompt", "count"), [("ab", 1), (["ab", "c"], 2), ([97, 98], 1), ([[97, 98], [99]], 2)]
)
async def test_every_form_of_prompt(api: Api, model: FakeClient, prompt: Any, count: int) -> None:
    code, reply = await api.post(
        "/v1/completions",
        {"model": "default", "prompt": prompt, "max_tokens": 4, "temperature": 0, "n": 2},
    )
    assert code == 200 and reply["object"] == "text_completion" and reply["id"].startswith("cmpl-")
    references = [model.runner.reference(p, 4).decode() for p in (b"ab", b"c")]
    assert [(c["index"], c["text"]) for c in reply["choices"]] == [
        (i, references[i // 2]) for i in range(2 * count)
    ]
    assert (
        reply["usage"]["prompt_tokens"] == (2 if count == 1 else 3)
        and reply["usage"]["completion_tokens"] == 8 * count
    )


async def test_completions_default_length_and_echo(api: Api, model: FakeClient) -> None:
    _, reply = await api.post("/v1/completions", {"prompt": "ab", "temperature": 0, "echo": True})
    assert reply["choices"][0]["text"] == "ab" + model.runner.reference(b"ab", 16).decode()
    events = await api.events("/v1/completions", {"prompt": "ab", "temperature": 0, "echo": True})
    assert "".join(e["choices"][0]["text"] for e in events[:-1]) == reply["choices"][0]["text"]
    assert all(e["object"] == "text_completion" for e in events[:-1])


async def test_the_best_of_several(api: Api) -> None:
    status, body = await api.post(
        "/v1/completions", {"prompt": ["a", "b"], "best_of": 3, "n": 2, "max_tokens": 4}
    )
    assert (
        status == 200
        and [c["index"] for c in body["choices"]] == [0, 1, 2, 3]
        and body["usage"]["completion_tokens"] == 2 * 3 * 4
    )
    assert body["usage"]["prompt_tokens"] == 2 and all(
        c["logprobs"] is None for c in body["choices"]
    )


async def test_models(api: Api) -> None:
    reply = json.loads((await api.fetch("GET", "/v1/models")).body)
    assert reply["object"] == "list" and [d["id"] for d in reply["data"]] == ["fake"]
    one = json.loads((await api.fetch("GET", "/v1/models/fake")).body)
    assert (
        one["object"] == "model"
        and one["id"] == "fake"
        and isinstance(one["created"], int)
        and one["owned_by"]
    )
    missing = await api.fetch("GET", "/v1/models/a/b%2Fc")
    assert missing.code == 404 and json.loads(missing.body)["error"]["code"] == "model_not_found"


async def test_the_newest_engine_has_the_name(api: Api, model: FakeClient) -> None:
    newer = FakeClient()
    bridge = BridgeServer(newer, kernel_id="k2")
    ids = [d["id"] for d in json.loads((await api.fetch("GET", "/v1/models")).body)["data"]]
    assert len(ids) == 2 and ids[0] == "fake" and ids[1].startswith("fake@")
    await api.post("/v1/chat/completions", CHAT)
    await api.post("/v1/chat/completions", {**CHAT, "model": ids[1]})
    await api.post("/v1/chat/completions", {**CHAT, "model": "fake@k2"})
    assert newer.stats().requests_total == 2 and model.stats().requests_total == 1
    bridge.close()
    newer.close()


@pytest.mark.parametrize("stream", [True, False])
async def test_a_disconnect_frees_the_slot(api: Api, model: FakeClient, stream: bool) -> None:
    model.runner.step_s = 0.005
    host, port = api.url.removeprefix("http://").split(":")
    _, writer = await asyncio.open_connection(host, int(port))
    body = json.dumps({"prompt": "a", "max_tokens": 4500, "stream": stream}).encode()
    writer.write(
        b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: %d\r\n\r\n"
        % len(body)
        + body
    )
    await asyncio.to_thread(wait_for, lambda: model.stats().num_running == 1)
    writer.close()
    await asyncio.to_thread(wait_for, lambda: model.stats().num_running == 0)


async def test_a_long_silence_is_bridged_by_pings(
    api: Api, model: FakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmkit.gateway.streams.PING_S", 0.05)
    model.runner.step_s = 0.2
    reply = await api.fetch(
        "POST", "/v1/completions", {"prompt": "a", "max_tokens": 3, "stream": True}
    )
    assert b": ping\n\n" in reply.body and reply.body.endswith(b"data: [DONE]\n\n")
