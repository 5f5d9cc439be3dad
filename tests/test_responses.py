"""OpenAI's responses: the order and indexes of events, what is kept, and the stock client's helpers
on the real model."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
from example_tools import ADD
from fake_runner import FakeRunner
from fakes import FakeClient
from gateway_client import Api, is_error, serve
from governed import dialects, governed

from llmkit.bridge.server import BridgeServer
from llmkit.chat.parsers.events import Call, Content, Reasoning
from llmkit.errors import StoreError
from llmkit.gateway.bodies import parse
from llmkit.gateway.conversations import shelf as shelves
from llmkit.gateway.media.attached import Attached
from llmkit.gateway.openai.event_stream import EventStream
from llmkit.gateway.openai.responses import ResponsesBody, input_items
from llmkit.gateway.openai.stored import Kept, Stored
from llmkit.protocol import ModelDescription
from llmkit.runtime.local import LocalEngine
from llmkit.store.responses import ResponseStore

ASK: dict[str, Any] = {"input": "hi", "max_output_tokens": 6}


@pytest.fixture
async def api(fake: FakeClient) -> AsyncIterator[Api]:
    bridge = BridgeServer(fake)
    async for api in serve(None):
        yield api
    bridge.close()


async def stream(api: Api, body: dict[str, Any]) -> list[dict[str, Any]]:
    reply = await api.fetch("POST", "/v1/responses", {**body, "stream": True})
    assert reply.code == 200 and reply.headers["Content-Type"] == "text/event-stream", reply.body
    blocks = [b.split("\n") for b in reply.body.decode().split("\n\n")[:-1]]
    events = [json.loads(data.removeprefix("data: ")) for _, data in blocks]
    assert [name.removeprefix("event: ") for name, _ in blocks] == [e["type"] for e in events]
    assert [e["sequence_number"] for e in events] == list(range(len(events)))
    return events


async def test_a_response_and_its_stream_agree(api: Api, fake: FakeClient) -> None:
    text = fake.runner.reference(b"[user]hi", 6).decode()
    status, body = await api.post("/v1/responses", ASK)
    assert (
        status == 200
        and body["object"] == "response"
        and body["id"].startswith("resp_")
        and body["status"] == "incomplete"
    )
    assert (
        body["incomplete_details"] == {"reason": "max_output_tokens"}
        and body["usage"]["total_tokens"] == 8 + 6
    )
    (message,) = body["output"]
    assert message["type"] == "message" and message["content"] == [
        {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
    ]
    events = await stream(api, ASK)
    kinds = [e["type"].removeprefix("response.") for e in events]
    deltas = [e for e in events if e["type"] == "response.output_text.delta"]
    assert kinds[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert kinds[-4:] == ["output_text.done", "content_part.done", "output_item.done", "incomplete"]
    assert "".join(e["delta"] for e in deltas) == text and all(
        (e["output_index"], e["content_index"]) == (0, 0) and e["item_id"] for e in deltas
    )
    assert (
        events[0]["response"]["status"] == "in_progress"
        and events[-1]["response"]["output"][0]["content"][0]["text"] == text
    )


def test_items_of_each_kind_have_their_indexes() -> None:
    events = EventStream()
    found = (
        events.take(
            [Reasoning("hm"), Content("a"), Content("b"), Call("add", '{"a": 1}', "call_1")]
        )
        + events.close()
    )
    added = [
        (e["output_index"], e["item"]["type"])
        for e in found
        if e["type"] == "response.output_item.added"
    ]
    assert (
        added == [(0, "reasoning"), (1, "message"), (2, "function_call")]
        and [i["status"] for i in events.items] == ["completed"] * 3
    )
    call = events.items[2]
    assert (call["call_id"], call["name"], call["arguments"]) == (
        "call_1",
        "add",
        '{"a": 1}',
    ) and call["id"].startswith("fc_")
    assert [e["type"].rpartition(".")[2] for e in found if "arguments" in e["type"]] == [
        "delta",
        "done",
    ]


async def test_kept_continued_and_deleted(api: Api, fake: FakeClient) -> None:
    _, first = await api.post("/v1/responses", {**ASK, "instructions": "Be kind."})
    _, second = await api.post(
        "/v1/responses", {**ASK, "input": "more", "previous_response_id": first["id"]}
    )
    said = first["output"][0]["content"][0]["text"]
    prompt = f"[user]hi[assistant]{said}[user]more"
    assert second["usage"]["input_tokens"] == len(prompt), (
        "the instructions of the first do not go on"
    )
    assert (
        second["output"][0]["content"][0]["text"]
        == fake.runner.reference(prompt.encode(), 6).decode()
    )
    kept = json.loads((await api.fetch("GET", f"/v1/responses/{first['id']}")).body)
    assert kept == first
    items = json.loads((await api.fetch("GET", f"/v1/responses/{first['id']}/input_items")).body)
    assert (
        items["data"][0]["content"] == [{"type": "input_text", "text": "hi"}]
        and items["has_more"] is False
    )
    is_error(await api.fetch("GET", f"/v1/responses/{first['id']}?stream=true"), 400)
    gone = json.loads((await api.fetch("DELETE", f"/v1/responses/{first['id']}")).body)
    assert gone == {"id": first["id"], "object": "response", "deleted": True}
    assert (
        is_error(await api.fetch("GET", f"/v1/responses/{first['id']}"), 404)["code"] == "not_found"
    )
    error = is_error(
        await api.fetch("POST", "/v1/responses", {**ASK, "previous_response_id": first["id"]}), 400
    )
    assert error["param"] == "previous_response_id"
    _, secret = await api.post("/v1/responses", {**ASK, "store": False})
    is_error(await api.fetch("GET", f"/v1/responses/{secret['id']}"), 404)
    is_error(await api.fetch("POST", f"/v1/responses/{second['id']}/cancel", {}), 400)


async def test_pages_of_items(api: Api) -> None:
    given = [{"role": "user", "content": str(i)} for i in range(5)]
    _, body = await api.post("/v1/responses", {**ASK, "input": given})

    async def texts(query: str) -> tuple[list[str], dict[str, Any]]:
        found = json.loads(
            (await api.fetch("GET", f"/v1/responses/{body['id']}/input_items?{query}")).body
        )
        return [i["content"][0]["text"] for i in found["data"]], found

    first, found = await texts("order=asc&limit=2")
    assert first == ["0", "1"] and found["has_more"] and found["first_id"] == found["data"][0]["id"]
    assert (await texts(f"order=asc&limit=2&after={found['last_id']}"))[0] == ["2", "3"] and (
        await texts("")
    )[0] == ["4", "3", "2", "1", "0"]
    is_error(await api.fetch("GET", f"/v1/responses/{body['id']}/input_items?limit=0"), 400)


async def test_what_is_kept_is_bounded(api: Api) -> None:
    status, body = await api.post("/v1/responses", {**ASK, "metadata": {"a": "x"}})
    assert status == 200 and body["store"] is True
    huge = {**ASK, "input": "hi", "instructions": "hi", "user": "z" * (1 << 20)}
    status, body = await api.post("/v1/responses", huge)
    assert status == 200 and body["store"] is False
    is_error(await api.fetch("GET", f"/v1/responses/{body['id']}"), 404)


async def test_a_refused_request_keeps_nothing(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    puts: list[Any] = []
    monkeypatch.setattr(Stored, "put", lambda *args: puts.append(args))
    status, _ = await api.post("/v1/responses", {**ASK, "input": "x" * 10_000})
    assert status == 400 and not puts


async def test_a_running_response_can_be_cancelled() -> None:
    model = FakeClient(runner=FakeRunner(n_ctx=50_000, step_s=0.005))
    bridge = BridgeServer(model)
    async for api in serve(None):
        running = asyncio.create_task(stream(api, {"input": "hi"}))
        while not KEPT:
            await asyncio.sleep(0.01)
        (response_id,) = KEPT
        status, body = await api.post(f"/v1/responses/{response_id}/cancel", {})
        assert status == 200 and body["status"] == "cancelled"
        events = await asyncio.wait_for(running, 30)
        assert events[-1]["response"]["status"] == "cancelled"
    bridge.close()
    model.close()


KEPT: list[str] = []


@pytest.fixture(autouse=True)
def kept_responses(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ids of what the servers of a test keep: that of a running stream is in its first event
    only."""
    KEPT.clear()
    put = Stored.put

    async def note(self: Stored, kept: Kept, response: dict[str, Any]) -> bool:
        is_kept = await put(self, kept, response)
        KEPT.append(kept.response_id)
        return is_kept

    monkeypatch.setattr(Stored, "put", note)


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"input": [{"type": "message", "role": "king", "content": "x"}]}, "input"),
        ({"input": []}, "input"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"background": True}, "background"),
        ({"include": ["file_search_call.results"]}, "include"),
        ({"tools": [{"type": "teleport"}]}, "tools"),
        ({"max_output_tokens": 1 << 40}, "max_output_tokens"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"text": {"format": {"type": "xml"}}}, "text"),
        ({"surprise": 1}, "surprise"),
        ({"truncation": "auto"}, "truncation"),
        ({"metadata": {"a": "x" * 600}}, "metadata"),
        ({"input": [{"role": "user", "content": "x", "surprise": 1}]}, "input"),
    ],
)
async def test_bad_input_is_a_400(api: Api, change: dict[str, Any], param: str) -> None:
    assert (
        is_error(await api.fetch("POST", "/v1/responses", {**ASK, **change}), 400)["param"] == param
    )


def test_items_become_a_conversation() -> None:
    items: list[dict[str, Any]] = [
        {"role": "user", "content": "1+2?"},
        {
            "type": "reasoning",
            "id": "rs_1",
            "summary": [],
            "content": [{"type": "reasoning_text", "text": "hm"}],
        },
        {"type": "function_call", "call_id": "c1", "name": "add", "arguments": '{"a": 1, "b": 2}'},
        {"type": "function_call_output", "call_id": "c1", "output": "3"},
        {
            "type": "message",
            "role": "assistant",
            "content": [{"type": "output_text", "text": "3.", "annotations": []}],
        },
    ]
    body = parse(ResponsesBody, json.dumps({"input": items, "instructions": "Be kind."}).encode())
    plain = ModelDescription("m", "m.gguf")
    chat = body.chat(input_items(body), plain, Attached(plain))
    assert [m.role for m in chat.messages] == [
        "system",
        "user",
        "assistant",
        "tool",
        "assistant",
    ]
    assert (
        chat.messages[2].reasoning_content == "hm"
        and chat.messages[2].tool_calls
        and chat.messages[3].tool_call_id == "c1"
    )


@pytest.mark.model
async def test_the_stock_client(engine: LocalEngine) -> None:
    bridge = BridgeServer(engine)
    async for api in serve(None):
        async with openai.AsyncOpenAI(base_url=f"{api.url}/v1", api_key="none") as client:
            first = await client.responses.create(
                model="smollm2", input="The capital of France?", temperature=0, max_output_tokens=40
            )
            assert first.output_text and first.usage and first.usage.output_tokens > 0
            more = await client.responses.create(
                model="smollm2",
                input="And of Spain?",
                previous_response_id=first.id,
                max_output_tokens=5,
            )
            assert more.usage and more.usage.input_tokens > first.usage.input_tokens
            assert (await client.responses.retrieve(first.id)).output_text == first.output_text
            assert len((await client.responses.input_items.list(first.id)).data) == 1
            small = {"type": "integer", "minimum": 0, "maximum": 99}
            parameters = {**ADD.parameters, "properties": {"a": small, "b": small}}
            tool: Any = {
                "type": "function",
                "name": "add",
                "parameters": parameters,
                "strict": True,
            }
            alone: Any = {"parallel_tool_calls": False, "temperature": 0, "max_output_tokens": 80}
            async with client.responses.stream(
                model="smollm2", input="1+2?", tools=[tool], tool_choice="required", **alone
            ) as events:
                called = await events.get_final_response()
            assert called.output[0].type == "function_call" and json.loads(
                called.output[0].arguments
            ).keys() == {"a", "b"}
            schema = {
                "type": "object",
                "properties": {"age": {"type": "integer", "minimum": 0, "maximum": 120}},
                "required": ["age"],
                "additionalProperties": False,
            }
            text: Any = {
                "format": {"type": "json_schema", "name": "p", "schema": schema, "strict": True}
            }
            shaped = await client.responses.create(
                model="smollm2", input="A person's age?", text=text, max_output_tokens=40
            )
            assert json.loads(shaped.output_text).keys() == {"age"} and shaped.status == "completed"
            async with client.responses.stream(
                model="smollm2",
                input="A person's age?",
                text=text,
                temperature=0,
                max_output_tokens=40,
            ) as events:
                kinds = [event.type async for event in events]
                final = await events.get_final_response()
            assert (
                json.loads(final.output_text).keys() == {"age"}
                and "response.output_text.delta" in kinds
                and "response.output_text.done" in kinds
            )
            await client.responses.delete(first.id)
            with pytest.raises(openai.NotFoundError):
                await client.responses.retrieve(first.id)
    bridge.close()


async def test_a_response_whose_end_is_not_stored_is_not_in_progress_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shelves, "RENEW_S", 0.01)
    put = ResponseStore._put

    def begins_only(
        self: ResponseStore, owner: str, response_id: str, response: dict[str, Any], *rest: Any
    ) -> bool:
        if response["status"] != "in_progress":
            raise StoreError("the database is locked")
        return put(self, owner, response_id, response, *rest)

    async with governed() as gate:
        with monkeypatch.context() as patch:
            patch.setattr(ResponseStore, "_put", begins_only)
            asked = dialects(5, stream=True)["/v1/responses"]
            reply = await gate.post("/v1/responses", asked)
            assert reply.code == 200 and b"response.incomplete" in reply.body
        last = json.loads(reply.body.decode().strip().split("data: ")[-1])["response"]
        assert last["store"] is False
        async with asyncio.timeout(30):
            while True:
                kept = await gate.api.fetch("GET", f"/v1/responses/{last['id']}")
                if json.loads(kept.body)["status"] == "incomplete":
                    break
                await asyncio.sleep(0.02)
        assert json.loads(kept.body)["output"] == last["output"]
