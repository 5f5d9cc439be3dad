"""The chat socket: turns, several at once, cancelling, branching, resuming, plain bodies."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import websockets
from fake_runner import FakeRunner
from governed import until
from socket_client import PATH, Sockets, settings, sockets, text_of

from llmkit.gateway.access.identity import LOCAL
from llmkit.gateway.sockets.following import follow

BODY = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 5, "temperature": 0}


@pytest.fixture
async def there(tmp_path: Path) -> AsyncIterator[Sockets]:
    async with sockets(tmp_path) as found:
        yield found


@pytest.fixture
async def slow(tmp_path: Path) -> AsyncIterator[Sockets]:
    async with sockets(tmp_path, runner=FakeRunner(n_ctx=20000, step_s=0.005)) as found:
        yield found


async def test_a_turn_is_told_from_its_beginning_to_its_end(there: Sockets) -> None:
    async with there.chat() as chat:
        hello = await chat.get("hello")
        assert hello["models"] == ["fake"] and hello["version"]
        await chat.say("send", ref="a", content="hi", settings=settings(6))
        turn, *deltas, end = await chat.until("end")
        assert turn["type"] == "turn" and turn["ref"] == "a" and turn["model"] == "fake"
        assert {d["type"] for d in deltas} == {"delta"} and len(text_of(deltas)) == 6
        seqs = [f["seq"] for f in [*deltas, end]]
        assert seqs == sorted(set(seqs)) and {f["turn"] for f in [*deltas, end]} == {turn["turn"]}
        message = end["message"]
        assert message["content"] == text_of(deltas) and message["status"] == "complete"
        assert (message["id"], message["parent"]) == (turn["message"], turn["parent"])
        assert end["usage"]["completion_tokens"] == 6
        second = await chat.ask("more", session=turn["session"])
        assert second["session"] == turn["session"]
        assert (await chat.until("end"))[-1]["usage"]["cached_tokens"] > 0


@pytest.mark.parametrize("path", [PATH, "/ws/chat", "/chat/ws", "/ws", PATH + "/"])
async def test_it_is_at_each_of_its_addresses(there: Sockets, path: str) -> None:
    async with there.chat(path=path) as chat:
        await chat.get("hello")


async def test_it_lies_under_a_base_path(tmp_path: Path) -> None:
    async with sockets(tmp_path, base_path="/llm") as there, there.chat(path="/llm/ws") as chat:
        await chat.get("hello")


async def test_turns_of_several_conversations_run_side_by_side(slow: Sockets) -> None:
    all_begun, execute = threading.Event(), slow.model.runner.execute
    slow.model.runner.execute = lambda batch: (all_begun.wait(30), execute(batch))[1]  # type: ignore[method-assign]
    async with slow.chat() as chat:
        await chat.get("hello")
        for ref in "abc":
            await chat.say("send", ref=ref, content=f"this is {ref}", settings=settings(40))
        frames: list[Any] = []
        while sum(f["type"] == "end" for f in frames) < 3:
            frames.append(await chat.next())
            if sum(f["type"] == "turn" for f in frames) == 3:
                all_begun.set()
        turns = {f["ref"]: f for f in frames if f["type"] == "turn"}
        assert len({t["session"] for t in turns.values()}) == 3
        for turn in turns.values():
            end = next(f for f in frames if f["type"] == "end" and f["turn"] == turn["turn"])
            assert text_of(frames, turn["turn"]) == end["message"]["content"]
        order = [f["turn"] for f in frames if f["type"] == "delta"]
        assert len(set(order[: len(order) // 2])) == 3  # all begin before one has ended


async def test_messages_to_one_session_begin_in_their_order(there: Sockets) -> None:
    async with there.chat() as chat:
        await chat.get("hello")
        session = (await chat.ask())["session"]
        await chat.until("end")
        for n in range(3):
            await chat.say(
                "send", ref=str(n), session=session, content=f"n{n}", settings=settings(2),
                branch=True,
            )  # fmt: skip
        frames: list[Any] = []
        while sum(f["type"] == "end" for f in frames) < 3:
            frames.append(await chat.next())
        assert [f["ref"] for f in frames if f["type"] == "turn"] == ["0", "1", "2"]


async def test_a_turn_is_cancelled_and_what_there_is_of_it_is_kept(slow: Sockets) -> None:
    async with slow.chat() as chat:
        await chat.get("hello")
        turn = await chat.ask(count=5000)
        await chat.until("delta")
        await chat.say("cancel", turn=turn["turn"])
        frames = await chat.until("end")
        message = frames[-1]["message"]
        assert message["status"] == "partial" and 0 < len(message["content"]) < 5000
        assert message["content"].endswith(text_of(frames))


async def test_a_message_is_edited_and_an_answer_made_again(there: Sockets) -> None:
    async with there.chat() as chat:
        await chat.get("hello")
        first = await chat.ask("one")
        answer = (await chat.until("end"))[-1]["message"]
        await chat.say(
            "edit", session=first["session"], message=first["parent"], content="two",
            settings=settings(6),
        )  # fmt: skip
        edited = (await chat.until("turn"))[-1]
        other = (await chat.until("end"))[-1]["message"]
        assert edited["parent"] != first["parent"] and other["content"] != answer["content"]
        await chat.say("regenerate", session=first["session"], settings=settings(3))
        again = (await chat.until("turn"))[-1]
        end = (await chat.until("end"))[-1]["message"]
        assert again["parent"] == edited["parent"] and again["message"] != edited["message"]
        assert other["content"].startswith(end["content"]) and len(end["content"]) == 3


async def test_a_dropped_connection_loses_and_doubles_nothing(slow: Sockets) -> None:
    heard, after = "", 0
    async with slow.chat() as chat:
        await chat.get("hello")
        turn = (await chat.ask(count=400))["turn"]
        while len(heard) < 30:
            frame = await chat.get("delta")
            heard, after = heard + frame["text"], frame["seq"]
        chat.ws.stream.close() if hasattr(chat.ws, "stream") else chat.ws.protocol.stream.close()
    for most in (60, 90, 200, 10**9):  # comes back again and again
        async with slow.chat() as chat:
            await chat.get("hello")
            await chat.say("resume", ref="r", turn=turn, after=after)
            again = await chat.get("turn")
            assert again["ref"] == "r" and again["turn"] == turn
            while len(heard) < most:
                frame = await chat.next()
                assert frame is not None and frame["seq"] > after
                after = frame["seq"]
                if frame["type"] == "end":
                    break
                heard += frame["text"]
    assert frame["type"] == "end" and heard == frame["message"]["content"] and len(heard) == 400


async def test_what_resumes_replaces_what_followed_before_on_its_socket(slow: Sockets) -> None:
    async with slow.chat() as chat:
        await chat.get("hello")
        turn = (await chat.ask(count=200))["turn"]
        await chat.until("delta")
        await chat.say("resume", ref="again", turn=turn)
        await chat.until("turn", ref="again")
        frames = await chat.until("end")
        assert text_of(frames) == frames[-1]["message"]["content"]
        seqs = [f["seq"] for f in frames]
        assert seqs == sorted(set(seqs))


async def test_turns_go_on_without_a_socket(slow: Sockets) -> None:
    async with slow.chat() as chat:
        await chat.get("hello")
        turn = await chat.ask(count=100)
    await until(lambda: not slow.gateway.turns.running(LOCAL))
    async with slow.chat() as chat:
        await chat.say("resume", turn=turn["turn"])
        frames = await chat.until("end")
        assert len(text_of(frames)) == 100


async def test_html_shows_all_of_the_text(slow: Sockets) -> None:
    async with slow.chat() as chat:
        await chat.get("hello")
        await chat.say("send", content="hi", render=True, settings=settings(60))
        frames = await chat.until("end")
        blocks: dict[int, str] = {}
        for frame in frames:
            if frame["type"] == "html":
                blocks[frame["index"]] = frame["html"]
        assert "".join(blocks.values()) == f"<p>{frames[-1]['message']['content']}</p>"
        last = [f for f in frames if f["type"] in ("delta", "html")]
        assert last[-1]["type"] == "html" and last[-1]["seq"] == last[-2]["seq"]
        turn = frames[0]["turn"]
        deltas = [f for f in frames if f["type"] == "delta"]
        middle = deltas[len(deltas) // 3]
        await chat.say("resume", turn=turn, after=middle["seq"], render=True)
        again = await chat.until("end")
        before = [f for f in deltas if f["seq"] <= middle["seq"]]
        assert again[1]["type"] == "html" and again[1]["html"] == f"<p>{text_of(before)}</p>"
        assert text_of(before) + text_of(again) == frames[-1]["message"]["content"]


async def test_a_rendered_turn_that_only_ends_a_line_is_said_to_be_shown(there: Sockets) -> None:
    """A client must learn that the HTML it has shows the text to its end."""
    async with there.chat() as chat:
        turn = (await chat.ask(count=3))["turn"]
        await chat.until("end")
    found = there.gateway.turns.find(LOCAL, turn)
    found.log.is_closed = False
    log = type(found.log)()
    for text in ("done", "\n"):
        log.text("delta", text)
    log.add("end", is_last=True, message={})
    found.log = log
    frames = follow(found, 1, there.gateway.turns.rendering, "local")
    kinds = [(type(m).__name__, getattr(m, "seq", 0)) async for m in frames]
    assert kinds[-3:] == [("Delta", 2), ("Html", 2), ("End", 3)]


async def test_pings_are_answered_at_both_levels(there: Sockets) -> None:
    async with websockets.connect(
        there.url.replace("http", "ws") + PATH, subprotocols=["llmkit.chat"]
    ) as ws:
        assert ws.subprotocol == "llmkit.chat"
        assert json.loads(await ws.recv())["type"] == "hello"
        await ws.send('{"type": "ping", "data": "x"}')
        assert json.loads(await ws.recv()) == {"type": "pong", "data": "x"}
        await (await ws.ping(b"low"))
        await ws.send(['{"type":', ' "ping"}'])  # fragments
        assert json.loads(await ws.recv()) == {"type": "pong"}


async def test_openais_body_is_answered_by_its_chunks(there: Sockets) -> None:
    async with there.chat(subprotocols=[]) as chat:  # no greeting: they expect an answer
        await chat.say(**BODY, stream_options={"include_usage": True})
        frames = []
        while (text := await chat.text()) != "[DONE]":
            assert text is not None
            frames.append(json.loads(text))
        assert {f["object"] for f in frames} == {"chat.completion.chunk"}
        said = "".join(c["delta"].get("content", "") for f in frames for c in f["choices"])
        assert len(said) == 5 and frames[-1]["usage"]["completion_tokens"] == 5
        await chat.say(**BODY, stream=False)
        whole = await chat.next()
        assert whole is not None and whole["choices"][0]["message"]["content"] == said
        await chat.say(messages=[])
        error = await chat.next()
        assert error is not None and error["error"]["param"] == "messages"
        await chat.say("ping")
        assert [(await chat.next() or {})["type"] for _ in range(2)] == ["hello", "pong"]


async def test_a_prompt_is_answered_by_bare_text(there: Sockets) -> None:
    if not any(r.path == "/chat/completions" for r in there.gateway.routes):
        pytest.skip("the routes without a prefix are not mounted")
    async with there.chat(subprotocols=[]) as chat:
        await chat.say(**{"model-name": "fake", "prompt": "hi", "max-token": 6})
        said = ""
        while (text := await chat.text()) != "[DONE]":
            assert text is not None
            said += text
        assert len(said) == 6
        await chat.say(**{"model-name": "none", "prompt": "hi"})
        error = await chat.next()
        assert error is not None and error["error"]["code"] == "model_not_found"


async def test_a_body_ends_with_its_socket(slow: Sockets) -> None:
    async with slow.chat(subprotocols=[]) as chat:
        await chat.say(**{**BODY, "max_tokens": 15000})
        await chat.next()
        assert slow.gateway.num_running == 1
    await until(lambda: slow.gateway.num_running == 0)


async def test_messages_of_tools_go_by_a_socket(there: Sockets) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    said = [
        {"role": "user", "content": "use it"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "42"},
    ]
    async with there.chat() as chat:
        await chat.get("hello")
        await chat.say("send", messages=said, settings=settings(4))
        assert len(text_of(await chat.until("end"))) == 4


async def test_many_turns_on_one_socket_are_bounded(slow: Sockets) -> None:
    async with slow.chat() as chat:
        await chat.get("hello")
        for n in range(70):
            await chat.say("send", ref=str(n), content="hi", settings=settings(15000))
        refused = 0
        while refused < 6:
            frame = await chat.next()
            assert frame is not None
            if frame["type"] == "error" and frame["error"]["code"] == "too_many_turns":
                assert int(frame["ref"]) >= 64
                refused += 1
    for turn in slow.gateway.turns.running(LOCAL):
        turn.cancel()


async def test_two_sockets_follow_one_turn(slow: Sockets) -> None:
    async with slow.chat() as one, slow.chat() as two:
        await one.get("hello")
        turn = (await one.ask(count=120))["turn"]
        await two.say("resume", turn=turn)
        texts = await asyncio.gather(one.until("end"), two.until("end"))
        assert text_of(texts[0]) == text_of(texts[1]) and len(text_of(texts[0])) == 120
