"""Turns of sessions over HTTP: kept, followed, resumed, cancelled, branched; real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import urlsplit

import pytest
from fake_runner import FakeRunner
from fakes import FakeClient
from gateway_client import Api, is_error, serve
from governed import CALLER, governed, until

from llmkit.bridge.server import BridgeServer

SETTINGS = {"temperature": 0, "max_tokens": 6}


@pytest.fixture
async def slow() -> AsyncIterator[Api]:
    """A gateway in front of a model that takes its time."""
    model = FakeClient(runner=FakeRunner(n_ctx=5000, step_s=0.02))
    bridge = BridgeServer(model)
    async for api in serve(None):
        api.runner = model.runner  # type: ignore[attr-defined]
        yield api
    bridge.close()
    model.close()


async def session(api: Api, **fields: Any) -> str:
    status, made = await api.post("/v1/sessions", {"settings": SETTINGS, **fields})
    assert status == 200 and made["object"] == "session", made
    return str(made["id"])


async def get(api: Api, path: str) -> Any:
    reply = await api.fetch("GET", path)
    assert reply.code == 200, reply.body
    return json.loads(reply.body)


async def told(api: Api, session_id: str, query: str = "") -> list[tuple[str, str]]:
    """Roles and texts of the branch that is shown."""
    found = await get(api, f"/v1/sessions/{session_id}/messages{query}")
    return [(m["role"], m["content"]) for m in found["data"]]


def events_of(text: str) -> list[dict[str, Any]]:
    blocks = [b for b in text.split("\n\n") if b and not b.startswith(":")]
    events = []
    for block in blocks:
        number, kind, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert number == f"id: {event['seq']}" and kind == f"event: {event['type']}"
        events.append(event)
    return events


def text_of(events: list[dict[str, Any]]) -> str:
    return "".join(e["text"] for e in events if e["type"] == "delta")


@contextlib.asynccontextmanager
async def posting(api: Api, path: str, body: dict[str, Any]) -> AsyncIterator[asyncio.StreamReader]:
    """A request over a socket of its own, torn down at the end."""
    address = urlsplit(api.url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(data)}\r\n\r\n"
    writer.write(head.encode() + data)
    try:
        yield reader
    finally:
        writer.transport.abort()


async def test_a_conversation_goes_on(api: Api) -> None:
    made = await session(api, system="Be short.", title="Talk")
    status, first = await api.post(f"/v1/sessions/{made}/messages", {"content": "hi"})
    assert status == 200 and first["object"] == "session.turn" and first["session"] == made
    reply = first["message"]
    assert reply["role"] == "assistant" and len(reply["content"]) == 6
    assert reply["status"] == "complete" and reply["finish_reason"] == "length"
    assert reply["usage"]["completion_tokens"] == 6 and reply["model"] == "fake"
    (question,) = first["messages"]
    assert question["content"] == "hi" and reply["parent"] == question["id"]
    reply = await api.fetch(
        "POST", f"/v1/sessions/{made}/messages", {"content": "m", "stream": True}
    )
    assert reply.headers["Content-Type"] == "text/event-stream" and reply.headers["x-request-id"]
    events = events_of(reply.body.decode())
    assert [e["type"] for e in (events[0], events[-1])] == ["start", "end"]
    assert events[0]["message"]["status"] == "running" and len({e["turn"] for e in events}) == 1
    end = events[-1]
    assert text_of(events) == end["message"]["content"] and end["usage"]["cached_tokens"] > 15
    expected = ["Be short.", "hi", first["message"]["content"], "m", end["message"]["content"]]
    assert [text for _, text in await told(api, made)] == expected
    shown = await get(api, f"/v1/sessions/{made}")
    assert shown["head"] == end["message"]["id"] and shown["num_messages"] == 5
    assert shown["running"] == [] and shown["settings"] == SETTINGS and shown["title"] == "Talk"
    assert (await get(api, "/sessions"))["data"] == (await get(api, "/v1/sessions"))["data"]


async def test_a_turn_can_begin_a_session(api: Api) -> None:
    body = {"content": "hi", "model": "fake", "settings": SETTINGS}
    status, turn = await api.post("/v1/sessions/new/messages", body)
    assert status == 200 and turn["message"]["status"] == "complete"
    assert (await get(api, f"/v1/sessions/{turn['session']}"))["model"] == "fake"
    status, _ = await api.post("/v1/sessions/new/messages", {**body, "model": "none"})
    assert status == 404 and len((await get(api, "/v1/sessions"))["data"]) == 1


async def test_a_client_that_left_comes_back_for_the_rest(slow: Api) -> None:
    made = await session(slow)
    ask = {"content": "hi", "stream": True, "settings": {"max_tokens": 400}}
    async with posting(slow, f"/v1/sessions/{made}/messages", ask) as reader:
        begun = await reader.readuntil(b"event: delta")
        begun += await reader.readuntil(b"\n\n")
    part = begun.decode().split("\r\n\r\n", 1)[1]
    lines = [line for line in part.split("\n") if line.startswith("data: ")]
    seen = [json.loads(line.removeprefix("data: ")) for line in lines]
    turn = seen[0]["turn"]
    assert (await get(slow, f"/v1/sessions/{made}"))["running"] == [turn]
    listed = await get(slow, f"/v1/sessions/{made}/turns")
    assert [t["id"] for t in listed["data"]] == [turn] and listed["data"][0]["status"] == "running"
    place = f"/v1/sessions/{made}/turns/{turn}/events"
    last = seen[-1]["seq"]
    slow.runner.step_s = 0.0  # type: ignore[attr-defined]  # nobody waits for the rest
    by_query, by_header = await asyncio.gather(
        slow.fetch("GET", f"{place}?after={last}"),
        slow.fetch("GET", place, headers={"Last-Event-ID": str(last)}),
    )
    rest = events_of(by_query.body.decode())
    assert rest[-1]["type"] == "end"
    whole = rest[-1]["message"]["content"]
    assert len(whole) == 400 and text_of(seen) + text_of(rest) == whole
    assert text_of(seen) + text_of(events_of(by_header.body.decode())) == whole
    again = await slow.fetch("GET", place)  # all of it, though it is over
    assert text_of(events_of(again.body.decode())) == whole
    is_error(await slow.fetch("GET", f"{place}?after=x"), 400)
    is_error(await slow.fetch("GET", f"/v1/sessions/{made}/turns/turn_0/events"), 404)


async def test_cancelling_keeps_what_there_is(slow: Api) -> None:
    made = await session(slow)
    ask = {"content": "hi", "stream": True, "settings": {"max_tokens": 2000}}
    async with posting(slow, f"/v1/sessions/{made}/messages", ask) as reader:
        await reader.readuntil(b"event: delta")
        (turn,) = (await get(slow, f"/v1/sessions/{made}"))["running"]
        status, ended = await slow.post(f"/v1/sessions/{made}/turns/{turn}/cancel", {})
        assert status == 200 and ended["status"] == "completed"
        rest = (await reader.readuntil(b"event: end")).decode()
    assert "event: error" not in rest
    message = ended["message"]
    assert message["status"] == "partial" and message["finish_reason"] == "abort"
    assert 0 < len(message["content"]) < 2000
    assert (await told(slow, made))[-1] == ("assistant", message["content"])
    status, further = await slow.post(f"/v1/sessions/{made}/messages", {"content": "go on"})
    assert status == 200 and further["message"]["status"] == "complete"


async def test_two_tabs_conflict_or_branch(slow: Api) -> None:
    made = await session(slow)
    _, first = await slow.post(f"/v1/sessions/{made}/messages", {"content": "hi"})
    ask = {"content": "a", "stream": True, "settings": {"max_tokens": 2000}}
    messages = f"/v1/sessions/{made}/messages"
    async with posting(slow, messages, ask) as reader:
        await reader.readuntil(b"event: delta")
        for parent in ({}, {"parent": first["message"]["id"]}):
            error = is_error(await slow.fetch("POST", messages, {"content": "b", **parent}), 409)
            assert error["code"] == "conflict"
        status, beside = await slow.post(messages, {"content": "b", "branch": True})
        assert status == 200 and beside["messages"][0]["parent"] == first["message"]["id"]
    await slow.fetch("DELETE", f"/v1/sessions/{made}")
    is_error(await slow.fetch("GET", f"/v1/sessions/{made}"), 404)
    assert (await get(slow, "/v1/sessions"))["data"] == []


async def test_a_stale_tab_is_told(api: Api) -> None:
    made = await session(api)
    messages = f"/v1/sessions/{made}/messages"
    _, first = await api.post(messages, {"content": "hi"})
    old = first["message"]["id"]
    await api.post(messages, {"content": "again"})
    error = is_error(await api.fetch("POST", messages, {"content": "x", "parent": old}), 409)
    assert "branch" in error["message"]
    status, turn = await api.post(messages, {"content": "x", "parent": old, "branch": True})
    assert status == 200 and turn["messages"][0]["parent"] == old
    change = {"title": "a", "version": 1}
    error = is_error(await api.fetch("PATCH", f"/v1/sessions/{made}", change), 409)
    assert error["code"] == "conflict"


async def test_edits_and_new_answers_are_branches(api: Api) -> None:
    made = await session(api)
    messages = f"/v1/sessions/{made}/messages"
    _, first = await api.post(messages, {"content": "hi"})
    question, answer = first["messages"][0], first["message"]
    reply = await api.fetch("PATCH", f"{messages}/{question['id']}", {"content": "hello"})
    edited = json.loads(reply.body)
    assert reply.code == 200 and edited["messages"][0]["parent"] == question["parent"]
    status, other = await api.post(f"{messages}/{answer['id']}/regenerate", {})
    assert status == 200 and other["messages"] == []
    assert other["message"]["parent"] == question["id"] and other["message"]["id"] != answer["id"]
    tree = {m["id"]: m for m in (await get(api, f"{messages}?tree=1"))["data"]}
    both = {question["id"], edited["messages"][0]["id"]}
    assert both <= {m["id"] for m in tree.values() if m["parent"] == question["parent"]}
    assert tree[question["id"]]["children"] == [answer["id"], other["message"]["id"]]
    assert await told(api, made) == [("user", "hi"), ("assistant", other["message"]["content"])]
    change = {"head": edited["message"]["id"]}
    assert (await api.fetch("PATCH", f"/v1/sessions/{made}", change)).code == 200
    assert (await told(api, made))[0] == ("user", "hello")
    status, fork = await api.post(f"/v1/sessions/{made}/fork", {"message": answer["id"]})
    assert status == 200 and await told(api, fork["id"]) == [
        ("user", "hi"),
        ("assistant", answer["content"]),
    ]


async def test_messages_without_an_answer(api: Api) -> None:
    made = await session(api)
    given = [{"role": "user", "content": "1+1"}, {"role": "assistant", "content": "2"}]
    body = {"messages": given, "reply": False}
    status, stored = await api.post(f"/v1/sessions/{made}/messages", body)
    assert status == 200 and [m["content"] for m in stored["data"]] == ["1+1", "2"]
    assert await told(api, made) == [("user", "1+1"), ("assistant", "2")]


async def test_another_s_session_is_not_there() -> None:
    async with governed() as g:
        mine = {CALLER: "ann"}
        reply = await g.api.fetch("POST", "/v1/sessions", {"settings": SETTINGS}, mine)
        made = json.loads(reply.body)["id"]
        reply = await g.post(f"/v1/sessions/{made}/messages", {"content": "hi"}, "ann")
        turn = json.loads(reply.body)
        theirs = {CALLER: "bob"}
        calls = [
            ("GET", "", None), ("PATCH", "", {"title": "x"}), ("DELETE", "", None),
            ("GET", "/messages", None), ("POST", "/messages", {"content": "x"}),
            ("POST", "/fork", {}), ("GET", "/export", None),
            ("PATCH", f"/messages/{turn['message']['id']}", {"content": "x"}),
            ("POST", f"/messages/{turn['message']['id']}/regenerate", {}),
            ("GET", f"/turns/{turn['id']}/events", None),
            ("POST", f"/turns/{turn['id']}/cancel", {}),
        ]  # fmt: skip
        for method, path, body in calls:
            reply = await g.api.fetch(method, f"/v1/sessions/{made}{path}", body, theirs)
            assert is_error(reply, 404)["code"] == "not_found", path
        chat = {"model": "fake", "messages": [{"role": "user", "content": "x"}], "session_id": made}
        is_error(await g.post("/v1/chat/completions", chat, "bob"), 404)
        is_error(await g.post("/v1/sessions/sess_nope/messages", {"content": "x"}, "ann"), 404)
        kept = json.loads((await g.api.fetch("GET", f"/v1/sessions/{made}", None, mine)).body)
        assert kept["num_messages"] == 2


async def test_a_turn_is_one_request_to_every_stage() -> None:
    async with governed() as g:
        made = json.loads((await g.post("/v1/sessions", {"settings": SETTINGS}, "ann")).body)["id"]
        g.records.clear()
        reply = await g.post(f"/v1/sessions/{made}/messages", {"content": "hi"}, "ann")
        assert reply.code == 200
        (record,) = g.records
        assert record.operation == "chat" and record.status == 200
        assert record.usage.completion_tokens == 6
        assert record.request_id == reply.headers["x-request-id"]
    async with governed(FakeRunner(n_ctx=5000, step_s=0.02), max_concurrent=1) as g:
        made = json.loads((await g.post("/v1/sessions", {}, "ann")).body)["id"]
        long = {"content": "hi", "settings": {"max_tokens": 500}}
        running = asyncio.create_task(g.post(f"/v1/sessions/{made}/messages", long, "ann"))
        await until(lambda: g.under_way("ann"))
        other = json.loads((await g.post("/v1/sessions", {}, "ann")).body)["id"]
        reply = await g.post(f"/v1/sessions/{other}/messages", {"content": "hi"}, "ann")
        assert reply.code == 429 and reply.headers["Retry-After"]
        assert g.gateway.num_running == 1
        await g.gateway.turns.stop_all()
        reply = await running
        ended = json.loads(reply.body)
        assert reply.code == 200 and ended["message"]["status"] == "partial"
        reply = await g.post(
            f"/v1/sessions/{other}/messages", {"content": "hi"}, "ann", x_llmkit_timeout="0.05"
        )
        assert is_error(reply, 408)["code"] == "timeout"


async def test_a_session_outlives_its_model(api: Api, model: FakeClient) -> None:
    made = await session(api, model="fake")
    await api.post(f"/v1/sessions/{made}/messages", {"content": "hi"})
    await api.fetch("PATCH", f"/v1/sessions/{made}", {"model": "gone"})
    reply = await api.fetch("POST", f"/v1/sessions/{made}/messages", {"content": "more"})
    error = is_error(reply, 404)
    assert error["code"] == "model_not_found" and "another model" in error["message"]
    assert len(await told(api, made)) == 2
    status, _ = await api.post(f"/v1/sessions/{made}/messages", {"content": "m", "model": "fake"})
    assert status == 200 and len(await told(api, made)) == 4


async def test_an_engine_that_dies_leaves_a_partial_answer() -> None:
    async with governed(FakeRunner(n_ctx=5000, step_s=0.02)) as g:
        made = await session(g.api)
        ask = {"content": "hi", "stream": True, "settings": {"max_tokens": 2000}}
        async with posting(g.api, f"/v1/sessions/{made}/messages", ask) as reader:
            await reader.readuntil(b"event: delta")
            g.model.engine.close()
            await reader.readuntil(b"event: error")
        found = (await get(g.api, f"/v1/sessions/{made}/messages"))["data"]
        assert [m["role"] for m in found] == ["user", "assistant"]
        assert found[1]["status"] == "partial" and found[1]["content"]


async def test_bad_input(api: Api) -> None:
    made = await session(api)
    messages = f"/v1/sessions/{made}/messages"
    for body, param in (
        ({}, "content"),
        ({"content": "a", "messages": [{"content": "b"}]}, "content"),
        ({"content": 1}, "content"),
        ({"content": "a", "surprise": 1}, "surprise"),
        ({"content": "a", "settings": {"temperature": -1}}, "temperature"),
        ({"content": "a", "settings": {"nope": 1}}, "settings"),
        ({"message": {"role": "king", "content": "a"}}, "message"),
        ({"message": {"role": "tool", "content": "a"}}, "messages"),
    ):
        assert is_error(await api.fetch("POST", messages, body), 400)["param"] == param, body
    is_error(await api.fetch("POST", messages, {"content": "a", "parent": "msg_nope"}), 409)
    lost = {"content": "a", "parent": "msg_nope", "branch": True}
    is_error(await api.fetch("POST", messages, lost), 404)
    is_error(await api.fetch("POST", messages, {"content": "x" * 10_000_000}), 400)
    is_error(await api.fetch("POST", messages, {"content": "x" * 20_000_000}), 413)
    assert await told(api, made) == []
    is_error(await api.fetch("POST", "/v1/sessions", {"pruning": "x"}), 400)
    is_error(await api.fetch("POST", "/v1/sessions", {"settings": {"top_p": 7}}), 400)
    is_error(await api.fetch("GET", "/v1/sessions?limit=0"), 400)
    is_error(await api.fetch("GET", f"{messages}?render=pdf"), 400)
    is_error(await api.fetch("GET", f"/v1/sessions/{made}/export?format=pdf"), 400)


async def test_export_and_import(api: Api) -> None:
    made = await session(api, title="Talk")
    await api.post(f"/v1/sessions/{made}/messages", {"content": "hi"})
    reply = await api.fetch("GET", f"/v1/sessions/{made}/export")
    assert "attachment" in reply.headers["Content-Disposition"]
    data = json.loads(reply.body)
    status, copy = await api.post("/v1/sessions/import", data)
    assert status == 200 and await told(api, copy["id"]) == await told(api, made)
    reply = await api.fetch("GET", f"/v1/sessions/{made}/export?format=markdown")
    assert reply.headers["Content-Type"].startswith("text/markdown") and b"hi" in reply.body
    status, copy = await api.post("/v1/sessions/import", {"markdown": reply.body.decode()})
    assert status == 200 and await told(api, copy["id"]) == await told(api, made)
    first, second = data["messages"][0], data["messages"][1]
    first["parent"] = second["id"]  # a cycle
    is_error(await api.fetch("POST", "/v1/sessions/import", data), 400)
    is_error(await api.fetch("POST", "/v1/sessions/import", {"messages": 7}), 400)


async def test_settings_that_nothing_can_be_answered_with_are_not_imported(api: Api) -> None:
    said = {"messages": [{"role": "user", "content": "hi"}]}
    for settings, named in (({"temperature": "hot"}, "temperature"), ({"top_p": 7}, "top_p")):
        body = {**said, "settings": settings}
        error = is_error(await api.fetch("POST", "/v1/sessions/import", body), 400)
        assert error["param"] == "settings" and named in error["message"]
    assert json.loads((await api.fetch("GET", "/v1/sessions")).body)["data"] == []
    body = {**said, "settings": {"temperature": 0, "another_program's": 1}}
    status, made = await api.post("/v1/sessions/import", body)
    assert status == 200 and made["settings"] == body["settings"]


async def test_a_part_that_nobody_reads_is_exported_all_the_same(api: Api) -> None:
    far = {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}
    content = [{"type": "text", "text": "What is this?"}, far]
    body = {"messages": [{"role": "user", "content": content}]}
    _, made = await api.post("/v1/sessions/import", body)
    reply = await api.fetch("GET", f"/v1/sessions/{made['id']}/export?format=markdown")
    assert reply.code == 200 and b"What is this?" in reply.body
    reply = await api.fetch("GET", f"/v1/sessions/{made['id']}/export")
    assert json.loads(reply.body)["messages"][0]["content"] == content


async def test_without_a_database_sessions_are_off(model: FakeClient) -> None:
    async for api in serve(None, sessions=None):
        error = is_error(await api.fetch("GET", "/v1/sessions"), 501)
        assert error["code"] == "sessions_off"
        error = is_error(
            await api.fetch("POST", "/v1/sessions/new/messages", {"content": "x"}), 501
        )
        assert error["code"] == "sessions_off"
        status, body = await api.post("/v1/responses", {"model": "fake", "input": "hi"})
        assert status == 200 and body["store"] is False


@pytest.mark.parametrize("name", ["caf%C3%A9", "%F2%91%B8%A6%0E", "a%3Fb%23c", "%25C3"])
async def test_an_id_of_any_letters_is_only_unknown(api: Api, name: str) -> None:
    for path, body in (("messages", {"content": "x"}), (f"messages/{name}/regenerate", {})):
        reply = await api.fetch("POST", f"/v1/sessions/{name}/{path}", body)
        assert is_error(reply, 404)["code"] == "not_found"
