"""Anthropic's routes: strict shapes on the fake model. And its own client and Ollama's on the real
one."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Annotated, Any

import anthropic
import ollama
import pytest
from example_tools import ADD, WEATHER
from fakes import FakeClient
from gateway_client import Api, serve
from pydantic import BaseModel, ConfigDict, Field

import llmkit
from llmkit.bridge.server import BridgeServer
from llmkit.chat.parsers.events import Call, Content, Reasoning
from llmkit.gateway.anthropic.blocks import BlockStream
from llmkit.gateway.anthropic.schemas import MessagesBody
from llmkit.gateway.bodies import parse
from llmkit.gateway.media.attached import Attached
from llmkit.protocol import ModelDescription, ToolCall
from llmkit.runtime.local import LocalEngine

ASK = {"model": "default", "max_tokens": 8, "messages": [{"role": "user", "content": "hi"}]}


@pytest.fixture
async def api(fake: FakeClient) -> AsyncIterator[Api]:
    bridge = BridgeServer(fake)
    async for api in serve(None):
        yield api
    bridge.close()


def reference(fake: FakeClient, prompt: bytes = b"[user]hi", count: int = 8) -> str:
    return fake.runner.reference(prompt, count).decode()


async def test_a_message(api: Api, fake: FakeClient) -> None:
    status, body = await api.post("/v1/messages", ASK)
    assert (
        status == 200
        and body["id"].startswith("msg_")
        and (body["type"], body["role"], body["model"]) == ("message", "assistant", "fake")
    )
    assert body["content"] == [{"type": "text", "text": reference(fake)}] and (
        body["stop_reason"],
        body["stop_sequence"],
    ) == ("max_tokens", None)
    assert body["usage"] == {
        "input_tokens": 8,
        "cache_read_input_tokens": 0,
        "cache_creation_input_tokens": 0,
        "output_tokens": 8,
    }
    stop = reference(fake)[3:5]
    _, stopped = await api.post("/v1/messages", {**ASK, "stop_sequences": [stop]})
    assert (stopped["stop_reason"], stopped["stop_sequence"]) == ("stop_sequence", stop)
    assert await api.post(
        "/v1/messages/count_tokens", {k: v for k, v in ASK.items() if k != "max_tokens"}
    ) == (200, {"input_tokens": 8})


async def test_a_streamed_message(api: Api, fake: FakeClient) -> None:
    reply = await api.fetch("POST", "/v1/messages", {**ASK, "stream": True})
    blocks = [b.split("\n") for b in reply.body.decode().split("\n\n")[:-1]]
    events = [json.loads(data.removeprefix("data: ")) for _, data in blocks]
    assert [name.removeprefix("event: ") for name, _ in blocks] == [e["type"] for e in events]
    kinds = [e["type"] for e in events]
    assert kinds[:2] == ["message_start", "content_block_start"] and kinds[-3:] == [
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    assert (
        events[0]["message"]["usage"]["input_tokens"] == 8 and events[0]["message"]["content"] == []
    )
    assert "".join(
        e["delta"]["text"] for e in events if e["type"] == "content_block_delta"
    ) == reference(fake)
    assert (
        events[-2]["delta"] == {"stop_reason": "max_tokens", "stop_sequence": None}
        and events[-2]["usage"]["output_tokens"] == 8
    )


def test_blocks_of_each_kind() -> None:
    stream = BlockStream()
    events = [
        Reasoning("a"),
        Reasoning("b"),
        Content("c"),
        Call("add", '{"a": 1}', "call_1"),
        Call("add", "{}", "call_2"),
    ]
    found = stream.events(events) + stream.close()  # type: ignore[arg-type]
    starts = [
        (e["index"], e["content_block"]["type"])
        for e in found
        if e["type"] == "content_block_start"
    ]
    assert starts == [(0, "thinking"), (1, "text"), (2, "tool_use"), (3, "tool_use")]
    assert [e["index"] for e in found if e["type"] == "content_block_stop"] == [0, 1, 2, 3]
    assert (
        found[-2]["delta"] == {"type": "input_json_delta", "partial_json": "{}"}
        and found[-3]["content_block"]["id"] == "toolu_2"
    )


def test_a_conversation_with_tools_is_translated() -> None:
    turns = [
        {
            "role": "user",
            "content": [{"type": "text", "text": "1+2?", "cache_control": {"type": "ephemeral"}}],
        },
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "hm", "signature": "s"},
                {"type": "tool_use", "id": "t1", "name": "add", "input": {"a": 1}},
            ],
        },
        {
            "role": "user",
            "content": [
                {
                    "type": "tool_result",
                    "tool_use_id": "t1",
                    "content": [{"type": "text", "text": "3"}],
                },
                {"type": "text", "text": "So?"},
            ],
        },
    ]
    tool = {"name": "add", "description": "adds", "input_schema": ADD.parameters}
    body = {
        **ASK,
        "system": [{"type": "text", "text": "Be kind."}],
        "messages": turns,
        "tools": [tool],
        "tool_choice": {"type": "any", "disable_parallel_tool_use": True},
    }
    plain = ModelDescription("m", "m.gguf")
    chat = parse(MessagesBody, json.dumps(body).encode()).chat(plain, Attached(plain))
    assert [m.role for m in chat.messages] == ["system", "user", "assistant", "tool", "user"]
    assert (
        chat.messages[2].tool_calls == (ToolCall("t1", "add", '{"a": 1}'),)
        and chat.messages[2].reasoning_content == "hm"
        and chat.messages[3].tool_call_id == "t1"
    )
    assert (
        chat.tool_choice == "required"
        and not chat.parallel_calls
        and chat.tools == (replace(ADD, description="adds"),)
    )


ADD_TOOL = [{"name": "add", "input_schema": ADD.parameters}]
ANYTHING = {"type": "json_schema", "schema": {}}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"temperature": 2}, "temperature"),
        ({"surprise": 1}, "surprise"),
        ({"tool_choice": {"type": "tool"}}, "tool_choice"),
        ({"stop_sequences": [""]}, "stop_sequences"),
        ({"tools": ADD_TOOL, "output_config": {"format": ANYTHING}}, "output_config.format"),
        ({"thinking": {"type": "enabled", "budget": 1000}}, "budget"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages"),
    ],
)
async def test_anthropic_errors(api: Api, change: dict[str, Any], words: str) -> None:
    reply = await api.fetch("POST", "/v1/messages", {**ASK, **change})
    body = json.loads(reply.body)
    assert (
        reply.code == 400
        and body["type"] == "error"
        and body["error"]["type"] == "invalid_request_error"
        and words in body["error"]["message"]
    )
    assert body["request_id"] == reply.headers["x-request-id"]


async def test_an_unknown_model_in_each_dialect(api: Api) -> None:
    reply = await api.fetch("POST", "/v1/messages", {**ASK, "model": "nobody"})
    assert reply.code == 404 and json.loads(reply.body)["error"]["type"] == "not_found_error"
    reply = await api.fetch(
        "POST", "/api/chat", {"model": "nobody", "messages": [{"role": "user", "content": "x"}]}
    )
    assert reply.code == 404 and "nobody" in json.loads(reply.body)["error"]


class Person(BaseModel):
    model_config = ConfigDict(extra="forbid")
    name: Annotated[str, Field(min_length=1, max_length=12)]
    age: Annotated[int, Field(ge=0, le=120)]


@pytest.mark.model
async def test_the_stock_clients(engine: LocalEngine) -> None:
    bridge = BridgeServer(engine)
    with llmkit.load("minilm") as minilm:
        async for api in serve(None):
            async with anthropic.AsyncAnthropic(base_url=api.url, api_key="none") as client:
                greedy = {"temperature": 0}
                question: Any = [{"role": "user", "content": "What is the capital of France?"}]
                message = await client.messages.create(
                    model="smollm2", max_tokens=30, messages=question, extra_body=greedy
                )
                _, same = await api.post(
                    "/v1/chat/completions",
                    {"messages": question, "max_tokens": 30, "temperature": 0, "model": "smollm2"},
                )
                assert (
                    message.content[0].type == "text"
                    and message.content[0].text == same["choices"][0]["message"]["content"]
                )
                assert (
                    message.stop_reason
                    == {"stop": "end_turn", "length": "max_tokens"}[
                        same["choices"][0]["finish_reason"]
                    ]
                )
                async with client.messages.stream(
                    model="smollm2", max_tokens=30, messages=question, extra_body=greedy
                ) as stream:
                    text = "".join([piece async for piece in stream.text_stream])
                    final = await stream.get_final_message()
                assert (
                    text == message.content[0].text
                    and final.usage.output_tokens == message.usage.output_tokens
                )
                tools: Any = [
                    {"name": t.name, "description": t.description, "input_schema": t.parameters}
                    for t in (WEATHER, ADD)
                ]
                choice: Any = {"type": "tool", "name": "get_weather"}
                async with client.messages.stream(
                    model="smollm2",
                    max_tokens=80,
                    messages=question,
                    tools=tools,
                    tool_choice=choice,
                    extra_body=greedy,
                ) as stream:
                    called = await stream.get_final_message()
                assert (
                    called.stop_reason == "tool_use"
                    and called.content[0].type == "tool_use"
                    and "city" in called.content[0].input
                )
                counted = await client.messages.count_tokens(model="smollm2", messages=question)
                assert counted.input_tokens == message.usage.input_tokens + (
                    message.usage.cache_read_input_tokens or 0
                )
                with pytest.raises(anthropic.NotFoundError):
                    await client.messages.create(model="nobody", max_tokens=1, messages=question)

            local = ollama.AsyncClient(host=api.url)
            chat = await local.chat(
                "smollm2", messages=question, options={"temperature": 0.0, "num_predict": 30}
            )
            assert (
                chat.message.content == text
                and chat.done_reason in ("stop", "length")
                and chat.eval_count
            )
            pieces = [
                part.message.content or ""
                async for part in await local.chat(
                    "smollm2", messages=question, stream=True, options={"temperature": 0.0}
                )
            ]
            assert "".join(pieces).startswith(text[:40])
            shaped = await local.chat(
                "smollm2",
                messages=[{"role": "user", "content": "Tell me of a person."}],
                format=Person.model_json_schema(),
            )
            assert Person.model_validate_json(shaped.message.content or "")
            told = await local.generate(
                "smollm2", prompt="Say hello.", options={"num_predict": 5, "temperature": 0.0}
            )
            assert told.response and told.eval_count == 5
            found = await local.embed("minilm", input=["a", "b"])
            assert len(found.embeddings) == 2 and list(found.embeddings[0]) == pytest.approx(
                minilm.embed("a").tolist(), abs=1e-6
            )
            long = await local.embed("minilm", input="word " * 2000)
            assert (
                len(long.embeddings[0]) == 384
                and len((await local.embeddings("minilm", prompt="a")).embedding) == 384
            )
            raw = (
                "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n"
                "<|im_start|>assistant\n"
            )
            templated = await local.generate(
                "smollm2", prompt=raw, raw=True, options={"num_predict": 5, "temperature": 0.0}
            )
            assert templated.prompt_eval_count and templated.prompt_eval_count < 20, (
                "control tokens, not their letters"
            )
            assert {m.model for m in (await local.list()).models} == {"smollm2", "minilm"}
            assert (await local.show("smollm2")).modelinfo and (await local.ps()).models
            with pytest.raises(ollama.ResponseError, match="nobody"):
                await local.chat("nobody", messages=question)
    bridge.close()
