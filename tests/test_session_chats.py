"""Sessions in chats of every dialect, fitted into the context, and after the process was killed."""

from __future__ import annotations

import asyncio
import itertools
import json
import signal
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from fake_runner import FakeRunner
from fakes import FakeClient, wait_for
from gateway_client import Api, is_error, serve
from governed import CALLER, Governed, dialects, governed, message_of, until
from test_cli import Served
from test_overload import fill, hurry, slow
from test_turns import SETTINGS, get, posting, session, told

from llmkit.bridge.server import BridgeServer
from llmkit.errors import ConflictError, DrainingError, ModelBusyError, ModelUnloadedError
from llmkit.gateway import rules
from llmkit.gateway.response_cache import ResponseCache
from llmkit.runtime.local import LocalEngine
from llmkit.store.conversations import ConversationStore

CHATS = ("/v1/chat/completions", "/v1/responses", "/v1/messages", "/api/chat")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", CHATS)
async def test_a_chat_goes_on_with_a_session(api: Api, path: str, stream: bool) -> None:
    made = await session(api, system="Be short.")
    await api.post(f"/v1/sessions/{made}/messages", {"content": "hi"})
    before = await told(api, made)
    chat = dialects(5, stream=stream, text="more")[path]
    reply = await api.fetch("POST", path, {**chat, "session_id": made})
    assert reply.code == 200, reply.body
    found = (await get(api, f"/v1/sessions/{made}/messages"))["data"]
    assert [(m["role"], m["content"]) for m in found[:3]] == before
    assert (found[3]["role"], found[3]["content"]) == ("user", "more")
    answer = found[4]
    assert answer["status"] == "complete" and len(answer["content"]) == 5
    assert answer["usage"]["cached_tokens"] > 15 and len(found) == 5
    # The same conversation sent whole has the same answer.
    messages = [{"role": m["role"], "content": m["content"]} for m in found[:4]]
    whole = {**dialects(5)["/v1/chat/completions"], "messages": messages}
    _, reference = await api.post("/v1/chat/completions", whole)
    assert answer["content"] == reference["choices"][0]["message"]["content"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", CHATS)
async def test_an_answer_whose_question_cannot_be_stored_is_not_given(
    api: Api, path: str, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = await session(api)

    def refuse(*_: Any, **__: Any) -> None:
        raise ConflictError("somebody was faster")

    # The engine has the request by then.
    with monkeypatch.context() as patch:
        patch.setattr(ConversationStore, "begin_turn", refuse)
        chat = {**dialects(5, stream=stream)[path], "session_id": made}
        reply = await api.fetch("POST", path, chat)
        assert reply.code == 409 and b"somebody was faster" in reply.body
    assert await told(api, made) == []
    status, _ = await api.post(path, {**chat, **({"stream": False} if stream else {})})
    assert status == 200 and len(await told(api, made)) == 2


async def test_a_session_may_be_named_otherwise(api: Api) -> None:
    made = await session(api)
    chat = dialects(5)["/v1/chat/completions"]
    status, _ = await api.post("/v1/chat/completions", {**chat, "session-id": made})
    assert status == 200 and len(await told(api, made)) == 2
    reply = await api.fetch("POST", "/v1/chat/completions", chat, {"session-id": made})
    assert reply.code == 200 and len(await told(api, made)) == 4
    # What clients call a session of their own in a header is not ours.
    reply = await api.fetch("POST", "/v1/chat/completions", chat, {"session_id": "0198-abcd"})
    assert reply.code == 200
    lost = {**chat, "session_id": f"sess_{'0' * 24}"}
    is_error(await api.fetch("POST", "/v1/chat/completions", lost), 404)
    two = {**chat, "session_id": made, "n": 2}
    is_error(await api.fetch("POST", "/v1/chat/completions", two), 400)
    assert len(await told(api, made)) == 4


async def test_a_name_begins_a_session_and_finds_it_again(api: Api) -> None:
    chat = {**dialects(5)["/v1/chat/completions"], "session_id": "garden"}
    _, first = await api.post("/v1/chat/completions", chat)
    answer = first["choices"][0]["message"]
    _, second = await api.post("/v1/chat/completions", chat)
    assert second["usage"]["prompt_tokens"] > first["usage"]["prompt_tokens"]
    (made,) = (await get(api, "/v1/sessions?query=garden"))["data"]
    assert made["title"] == "garden" and made["num_messages"] == 4 and made["model"] == "fake"
    # A client that sends all of the conversation each time doubles nothing.
    again = second["choices"][0]["message"]
    hi = {"role": "user", "content": "hi"}
    known = [hi, answer, hi, again, {"role": "user", "content": "more"}]
    status, _ = await api.post("/v1/chat/completions", {**chat, "messages": known})
    assert status == 200 and len(await told(api, made["id"])) == 6


@pytest.mark.parametrize("title", ["sess_garden", "sess_" + "a" * 25, "x" * 1000])
async def test_what_is_no_id_is_a_title_wherever_it_is_given(api: Api, title: str) -> None:
    for path in CHATS:
        status, _ = await api.post(path, {**dialects(3)[path], "session_id": title})
        assert status == 200, path
    (made,) = (await get(api, "/v1/sessions"))["data"]
    assert made["title"] == title and made["num_messages"] == 2 * len(CHATS)
    status, _ = await api.post("/v1/sessions", {"title": title})
    assert status == 200
    is_error(await api.fetch("POST", "/v1/sessions", {"title": "x" * 1001}), 400)


async def test_a_system_prompt_goes_before_the_session_s_own(api: Api) -> None:
    made = await session(api, system="One.")
    chat = dialects(5)["/v1/messages"]
    await api.post("/v1/messages", {**chat, "system": "Two.", "session_id": made})
    found = await told(api, made)
    assert [role for role, _ in found] == ["system", "user", "assistant"] and found[0][1] == "One."
    asked = [{"role": "system", "content": "Two."}, {"role": "user", "content": "hi"}]
    whole = {**dialects(5)["/v1/chat/completions"], "messages": asked}
    _, reference = await api.post("/v1/chat/completions", whole)
    assert found[2][1] == reference["choices"][0]["message"]["content"]


@pytest.mark.parametrize("path", CHATS)
async def test_a_client_that_leaves_ends_its_answer(path: str) -> None:
    model = FakeClient(runner=FakeRunner(n_ctx=5000, step_s=0.02))
    bridge = BridgeServer(model)
    async for api in serve(None):
        made = await session(api)
        chat = dialects(2000, stream=True)[path]
        async with posting(api, path, {**chat, "session_id": made}) as reader:
            await reader.readuntil(b"\r\n\r\n")
            await reader.readuntil(b"\n")
            while len(model.runner.batches) < 20:
                await asyncio.sleep(0.02)
            error = await api.fetch("POST", path, {**chat, "session_id": made})
            assert error.code == 409
        async with asyncio.timeout(30):
            while True:
                found = (await get(api, f"/v1/sessions/{made}/messages"))["data"]
                if found[-1]["status"] != "running":
                    break
                await asyncio.sleep(0.05)
        assert found[-1]["status"] == "partial" and 0 < len(found[-1]["content"]) < 2000
        wait_for(lambda: not model.stats().num_running)
    bridge.close()
    model.close()


async def test_a_conversation_with_parts_of_others_goes_on(api: Api) -> None:
    far = {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}
    said = [
        {"role": "user", "content": [{"type": "text", "text": "What is this? "}, far]},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "I do not say."}]},
        {"role": "user", "content": [{"type": "input_text", "text": "And "}, {"type": "video"}]},
        {"role": "assistant", "content": "A film."},
    ]
    _, made = await api.post("/v1/sessions/import", {"messages": said, "settings": SETTINGS})
    status, turn = await api.post(f"/v1/sessions/{made['id']}/messages", {"content": "Yes?"})
    assert status == 200, turn
    texts = [
        "What is this? (a picture that was not kept)", "I do not say.",
        "And (a part of type video)", "A film.", "Yes?",
    ]  # fmt: skip
    roles = ["user", "assistant", "user", "assistant", "user"]
    told = [{"role": r, "content": t} for r, t in zip(roles, texts, strict=True)]
    body = {"model": "fake", "messages": told, **SETTINGS}
    _, reference = await api.post("/v1/chat/completions", body)
    assert turn["message"]["content"] == reference["choices"][0]["message"]["content"]
    found = json.loads((await api.fetch("GET", "/v1/sessions?query=do+not+say")).body)["data"]
    assert [each["id"] for each in found] == [made["id"]]


PATH = "/v1/chat/completions"


async def kept(gate: Governed, made: str) -> list[str]:
    """The texts of eve's session, once nothing of it is under way."""
    async with asyncio.timeout(30):
        while gate.gateway.turns._finishing:
            await asyncio.sleep(0.005)
    reply = await gate.api.fetch("GET", f"/v1/sessions/{made}/messages", None, {CALLER: "eve"})
    return [message["content"] for message in json.loads(reply.body)["data"]]


async def eves(gate: Governed) -> str:
    reply = await gate.post("/v1/sessions", {}, "eve")
    return str(json.loads(reply.body)["id"])


@pytest.mark.parametrize("path", CHATS)
async def test_a_question_that_is_to_be_sent_again_is_there_once(path: str) -> None:
    cache = ResponseCache(1 << 20, 600)  # with it a request is read before there is a place
    async with governed(slow(), max_queue=1, cache=cache) as gate:
        made = await eves(gate)
        ask = {**dialects(5, text="mine")[path], "session_id": made}
        running = await fill(gate, 2)
        for _ in range(3):
            reply = await gate.post(path, ask, "eve")
            assert reply.code == 503 and reply.headers["Retry-After"]
            assert await kept(gate, made) == []
        hurry(gate)
        await asyncio.gather(*running)
        assert (await gate.post(path, ask, "eve")).code == 200
        assert len(await kept(gate, made)) == 2


async def test_the_question_of_a_request_that_made_way_is_taken_back() -> None:
    async with governed(slow(), max_queue=4) as gate:
        made = await eves(gate)
        running = await fill(gate, 4)
        ask = {**dialects(5, text="mine")[PATH], "session_id": made}
        mine = asyncio.create_task(gate.post(PATH, ask, "eve"))
        await until(lambda: gate.under_way("eve") == 5)
        ann = asyncio.create_task(gate.post(PATH, dialects(5)[PATH], "ann"))
        reply = await mine
        assert reply.code == 503 and "made way" in message_of(reply)
        assert await kept(gate, made) == []
        hurry(gate)
        assert all(r.code == 200 for r in await asyncio.gather(ann, *running))


async def test_the_question_of_a_request_whose_time_ended_first_is_taken_back() -> None:
    async with governed(slow()) as gate:
        made = await eves(gate)
        running = await fill(gate, 1)
        ask = {**dialects(5, text="mine")[PATH], "session_id": made, "timeout": 0.2}
        reply = await gate.post(PATH, ask, "eve")
        assert reply.code == 408 and reply.headers["Retry-After"]
        assert await kept(gate, made) == []
        hurry(gate)
        await asyncio.gather(*running)


@pytest.mark.parametrize("error", [DrainingError, ModelBusyError, ModelUnloadedError])
async def test_the_question_that_an_engine_does_not_take_is_not_kept(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise error("not now")

    async with governed() as gate:
        made = await eves(gate)
        ask = {**dialects(5)[PATH], "session_id": made}
        with monkeypatch.context() as patch:
            patch.setattr(rules, "submitted", refuse)
            assert (await gate.post(PATH, ask, "eve")).code == 503
        assert await kept(gate, made) == []
        assert (await gate.post(PATH, ask, "eve")).code == 200


async def talk(api: Api, made: str, turns: int) -> list[Any]:
    replies = []
    for i in range(turns):
        ask = {"content": f"{i}" + "x" * 60}
        replies.append(await api.post(f"/v1/sessions/{made}/messages", ask))
    return replies


async def test_the_oldest_turns_are_left_out_of_what_is_too_long() -> None:
    model = FakeClient(runner=FakeRunner(n_ctx=1000))
    bridge = BridgeServer(model)
    async for api in serve(None):
        made = await session(api, system="Rules.")
        replies = await talk(api, made, 24)
        assert {status for status, _ in replies} == {200}
        assert len(await told(api, made)) == 49, "all is kept"
        notes = [r["usage"].get("pruned") for _, r in replies]
        changes = [a for a, b in zip(notes[1:], notes, strict=False) if a != b]
        assert 1 <= len(changes) <= 4 and notes[-1]["messages"] >= 20
        usages = [reply["usage"] for _, reply in replies]
        for before, usage in itertools.pairwise(usages):
            assert usage["prompt_tokens"] <= 1000
            if usage.get("pruned") == before.get("pruned"):  # it begins with what was computed
                assert usage["cached_tokens"] >= before["prompt_tokens"] - 1
        ask = {"content": "y" * 60, "stream": True}
        streamed = await api.fetch("POST", f"/v1/sessions/{made}/messages", ask)
        assert b"event: end" in streamed.body
        is_error(
            await api.fetch("POST", f"/v1/sessions/{made}/messages", {"content": "z" * 5000}), 400
        )
    bridge.close()
    model.close()


async def test_what_is_left_out_is_summarised_or_refused() -> None:
    model = FakeClient(runner=FakeRunner(n_ctx=2000))
    bridge = BridgeServer(model)
    async for api in serve(None):
        made = await session(api, pruning="summarise")
        replies = await talk(api, made, 24)
        assert {status for status, _ in replies} == {200}
        note = replies[-1][1]["usage"]["pruned"]
        assert note["summary"] and note["messages"] > 0
        made = await session(api, pruning="stop")
        replies = await talk(api, made, 26)
        status, body = replies[-1]
        assert status == 400 and body["error"]["code"] == "context_length_exceeded"
        assert len(await told(api, made)) == 2 * sum(s == 200 for s, _ in replies)
    bridge.close()
    model.close()


def call(server: Served, method: str, path: str, body: Any = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(server.url + path, data, method=method)
    with urllib.request.urlopen(request, timeout=60) as reply:
        return json.loads(reply.read())


@pytest.mark.model
def test_a_killed_gateway_loses_nothing_but_the_rest(tmp_path: Path) -> None:
    args = ["smollm2", "--port", "0", "--n-ctx", "1024", "--n-slots", "1"]
    args += ["--db-url", f"sqlite:///{tmp_path}/llmkit.db"]
    server = Served(*args)
    try:
        wait_for(lambda: server.health() == 200, 60)
        made = call(server, "POST", "/sessions", {"title": "Talk"})["id"]
        settings = {"temperature": 0, "ignore_eos": True}
        short = {"content": "Name a colour.", "settings": {**settings, "max_tokens": 8}}
        first = call(server, "POST", f"/sessions/{made}/messages", short)
        body = {
            "content": "Tell me all.",
            "stream": True,
            "settings": {**settings, "max_tokens": 900},
        }
        request = urllib.request.Request(
            f"{server.url}/sessions/{made}/messages", json.dumps(body).encode(), method="POST"
        )
        with urllib.request.urlopen(request, timeout=60) as reply:
            text = b""
            while b"event: delta" not in text:
                text += reply.read1()
            end = time.monotonic() + 2.5  # more than a checkpoint
            while time.monotonic() < end:
                reply.read1()
            server.process.send_signal(signal.SIGKILL)
    finally:
        server.process.kill()
        server.process.communicate()
    server = Served(*args)
    try:
        wait_for(lambda: server.health() == 200, 60)
        shown = call(server, "GET", f"/sessions/{made}")
        found = call(server, "GET", f"/sessions/{made}/messages")["data"]
        assert [m["role"] for m in found] == ["user", "assistant"] * 2
        assert found[1] == first["message"] and found[2]["content"] == "Tell me all."
        assert found[3]["status"] == "partial" and len(found[3]["content"]) > 10
        assert shown["head"] == found[3]["id"] and shown["running"] == []
        after = call(server, "POST", f"/sessions/{made}/messages", short)
        assert after["message"]["status"] == "complete"
    finally:
        server.stop()


@pytest.mark.model
async def test_a_follow_up_computes_only_its_new_tokens(engine: LocalEngine) -> None:
    bridge = BridgeServer(engine)
    async for api in serve(None):
        made = await session(api, system="You are a helpful assistant who likes long answers.")
        long = {"settings": {"temperature": 0, "max_tokens": 60}}
        _, first = await api.post(
            f"/v1/sessions/{made}/messages", {"content": "Tell me about the sea.", **long}
        )
        known = first["usage"]["prompt_tokens"] + first["usage"]["completion_tokens"]
        _, second = await api.post(
            f"/v1/sessions/{made}/messages", {"content": "And about rivers?", **long}
        )
        usage = second["usage"]
        assert usage["cached_tokens"] >= known - 2, "all but the end of the answer"
        assert usage["prompt_tokens"] - usage["cached_tokens"] < 30
        chat = {"messages": [{"role": "user", "content": "And lakes?"}], "max_tokens": 8}
        _, third = await api.post("/v1/chat/completions", {**chat, "session_id": made})
        details = third["usage"]
        cached = details["prompt_tokens_details"]["cached_tokens"]
        assert cached >= usage["prompt_tokens"] + usage["completion_tokens"] - 2
    bridge.close()
