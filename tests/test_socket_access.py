"""Who may open a chat socket, and when it ends: keys, origins, numbers, drain."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from access_client import add_key, entry, served
from fake_runner import FakeRunner
from gateway_client import Api
from governed import until
from socket_client import PATH, ChatClient, Sockets, settings, sockets
from tornado.httpclient import HTTPClientError

from llmkit.gateway.sockets import connection, room
from llmkit.settings.entries import KeyEntry
from llmkit.store.database import Database
from llmkit.store.keys import KeyStore

KEY = "secret: of/ann"
AUTH = {"Authorization": f"Bearer {KEY}"}


@pytest.fixture
async def closed(tmp_path: Path) -> AsyncIterator[Sockets]:
    """A gateway that needs a key."""
    async with sockets(tmp_path, KEY) as found:
        yield found


@pytest.fixture
async def open_(tmp_path: Path) -> AsyncIterator[Sockets]:
    async with sockets(tmp_path) as found:
        yield found


def key_name(key: str) -> str:
    return "llmkit.key." + base64.urlsafe_b64encode(key.encode()).decode().rstrip("=")


async def refusal(there: Sockets, **options: Any) -> tuple[int, dict[str, Any]]:
    """The status and error with which a handshake is refused."""
    with pytest.raises(HTTPClientError) as caught:
        async with there.chat(**options):
            pass
    assert caught.value.response is not None
    return caught.value.code, json.loads(caught.value.response.body)["error"]


@pytest.mark.parametrize("headers", [AUTH, {"x-api-key": KEY}])
async def test_a_header_opens_it(closed: Sockets, headers: dict[str, str]) -> None:
    async with closed.chat(headers=headers) as chat:
        await chat.get("hello")
        await chat.ask()
        await chat.until("end")


async def test_a_subprotocol_opens_it_and_is_not_said_again(closed: Sockets) -> None:
    async with closed.chat(subprotocols=["llmkit.chat", key_name(KEY)]) as chat:
        assert chat.ws.selected_subprotocol == "llmkit.chat"
        await chat.get("hello")
        await chat.ask()
        await chat.until("end")


async def test_a_first_message_opens_it(closed: Sockets) -> None:
    async with closed.chat(subprotocols=[]) as chat:
        await chat.say("auth", key=KEY)
        await chat.get("hello")
        await chat.say("auth", key=KEY)  # once more does no harm
        await chat.ask()
        await chat.until("end")


async def test_a_key_in_the_address_opens_nothing(closed: Sockets) -> None:
    for name in ("key", "token", "api_key", "authorization"):
        async with closed.chat(path=f"{PATH}?{name}={KEY.replace(' ', '%20')}") as chat:
            await chat.say("ping")
            assert (await chat.refused())["code"] == "invalid_api_key"
            assert await chat.ended() == 1008


@pytest.mark.parametrize(
    "first",
    [
        {"type": "auth", "key": "wrong"},
        {"type": "send", "content": "hi"},
        {"messages": [{"role": "user", "content": "hi"}]},
        {"type": "resume", "turn": "turn_0"},
    ],
)
async def test_whoever_has_no_key_is_told_and_sent_away(
    closed: Sockets, first: dict[str, Any]
) -> None:
    async with closed.chat() as chat:
        await chat.say(**first)
        assert (await chat.refused())["code"] == "invalid_api_key"
        assert await chat.ended() == 1008
    await until(lambda: not len(closed.room))


@pytest.mark.parametrize("name", ["llmkit.key.!", "llmkit.key.", key_name("wrong")])
async def test_a_wrong_subprotocol_is_refused_in_words(closed: Sockets, name: str) -> None:
    async with closed.chat(subprotocols=["llmkit.chat", name]) as chat:
        assert (await chat.refused())["code"] == "invalid_api_key"
        assert await chat.ended() == 1008


async def test_a_wrong_header_is_refused_before_the_handshake(closed: Sockets) -> None:
    status, error = await refusal(closed, headers={"Authorization": "Bearer wrong"})
    assert (status, error["code"]) == (401, "invalid_api_key")


async def test_guessing_keys_is_slowed_down(closed: Sockets) -> None:
    codes = set()
    for n in range(25):
        async with closed.chat() as chat:
            await chat.say("auth", key=f"guess{n}")
            codes.add((await chat.refused())["code"])
            assert await chat.ended() == 1008
    assert codes == {"invalid_api_key", "too_many_attempts"}


async def test_a_socket_without_a_key_is_closed_after_a_while(
    closed: Sockets, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "AUTH_S", 0.05)
    async with closed.chat() as chat:
        assert (await chat.refused())["code"] == "authentication_timeout"
        assert await chat.ended() == 1008
    await until(lambda: not len(closed.room))


@pytest.mark.parametrize(
    ("headers", "welcome"),
    [
        ({"Origin": "http://evil.example"}, False),
        ({"Origin": "null"}, False),
        ({"Origin": "http://127.0.0.1:9"}, True),
        ({"Origin": "https://app.example"}, True),
        ({"Origin": "https://app.example", "Sec-Fetch-Site": "cross-site"}, True),
        ({"Origin": "http://evil.example", "Sec-Fetch-Site": "cross-site"}, False),
        ({"Sec-Fetch-Site": "cross-site"}, False),
        ({"Host": "evil.example", "Origin": "http://evil.example"}, False),  # DNS rebinding
    ],
)
async def test_pages_of_others_are_refused(
    tmp_path: Path, headers: dict[str, str], welcome: bool
) -> None:
    async with sockets(tmp_path, origins=["https://app.example"]) as there:
        if welcome:
            async with there.chat(headers=headers) as chat:
                await chat.get("hello")
        else:
            status, error = await refusal(there, headers=headers)
            assert status == 403 and error["code"] in ("forbidden_origin", "forbidden_host")


async def test_with_a_key_too_pages_of_others_are_refused(closed: Sockets) -> None:
    status, error = await refusal(closed, headers={**AUTH, "Origin": "http://127.0.0.1:9"})
    assert (status, error["code"]) == (403, "forbidden_origin")
    same = closed.url
    async with closed.chat(headers={**AUTH, "Origin": same}) as chat:
        await chat.get("hello")


async def test_what_is_no_handshake_is_told_what_this_is(open_: Sockets) -> None:
    api = Api(open_.url)
    for method, headers, status, code in [
        ("GET", {}, 426, "upgrade_required"),
        ("POST", {}, 405, "method_not_allowed"),
        ("DELETE", {}, 405, "method_not_allowed"),
        ("GET", {"Upgrade": "h2c", "Connection": "Upgrade"}, 426, "upgrade_required"),
        ("GET", {"Upgrade": "websocket", "Connection": "close"}, 426, "upgrade_required"),
    ]:
        body = "{}" if method == "POST" else None
        reply = await api.fetch(method, PATH, body, headers)
        assert reply.code == status and json.loads(reply.body)["error"]["code"] == code
        assert reply.headers["x-request-id"]


async def test_a_caller_has_so_many_sockets_and_no_more(open_: Sockets) -> None:
    open_.room._most_per_caller = 2
    async with open_.chat() as one, open_.chat() as two:
        await one.get("hello")
        await two.get("hello")
        status, error = await refusal(open_)
        assert (status, error["code"]) == (429, "too_many_sockets")
    await until(lambda: not len(open_.room))
    async with open_.chat() as chat:
        await chat.get("hello")


async def test_so_are_those_whose_caller_is_not_known_yet(closed: Sockets) -> None:
    closed.room._most_unknown, closed.room._most_per_caller = 1, 1
    async with closed.chat() as one:
        status, error = await refusal(closed)
        assert (status, error["code"]) == (429, "too_many_sockets")
        await one.say("auth", key=KEY)
        await one.get("hello")
        async with closed.chat() as two:
            await two.say("auth", key=KEY)
            assert (await two.refused())["code"] == "too_many_sockets"
            assert await two.ended() == 1013


async def test_an_open_socket_counts_as_a_connection_until_it_is_closed(open_: Sockets) -> None:
    async with open_.chat() as chat:
        await chat.get("hello")
        assert open_.server._counts.total() == 1
    await until(lambda: open_.server._counts.total() == 0)


async def test_a_revoked_key_has_no_right_at_its_next_message(tmp_path: Path) -> None:
    async with (
        sockets(tmp_path, entries=[entry("ann"), entry("bob")]) as there,
        there.chat(headers={"x-api-key": "secret-ann"}) as chat,
    ):
        await chat.get("hello")
        there.keys.replace(None, [entry("bob")])
        await chat.say("send", content="hi")
        assert (await chat.refused())["code"] == "invalid_api_key"
        assert await chat.ended() == 1008


async def test_a_revoked_key_follows_its_turns_no_longer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "CHECK_S", 0.05)
    runner = FakeRunner(n_ctx=20000, step_s=0.005)
    async with (
        sockets(tmp_path, entries=[entry("ann"), entry("bob")], runner=runner) as there,
        there.chat(headers={"x-api-key": "secret-ann"}) as chat,
    ):
        await chat.get("hello")
        await chat.ask(count=15000)
        await chat.until("delta")
        there.keys.replace(None, [entry("bob")])
        error = (await chat.until("error"))[-1]["error"]
        assert error["code"] == "invalid_api_key"
        assert await chat.ended() == 1008


async def test_a_key_of_the_database_that_is_revoked_ends_its_sockets(
    database: Database, keys: KeyStore, model: Any
) -> None:
    secret = add_key(keys, "ann")
    add_key(keys, "bob")
    async with (
        served(database=database) as there,
        ChatClient.open(there.url, headers={"x-api-key": secret}) as chat,
    ):
        await chat.get("hello")
        keys.revoke("ann", 2.0)
        async with asyncio.timeout(30):
            while True:
                await chat.say("ping")
                if (await chat.next() or {}).get("type") != "pong":
                    break
                await asyncio.sleep(0.02)
        assert await chat.ended() == 1008


async def test_the_rights_of_a_key_are_those_of_now(tmp_path: Path) -> None:
    ann: KeyEntry = entry("ann")
    async with (
        sockets(tmp_path, entries=[ann]) as there,
        there.chat(headers={"x-api-key": "secret-ann"}) as chat,
    ):
        assert (await chat.get("hello"))["models"] == ["fake"]
        there.keys.replace(None, [replace(ann, models=("other",))])
        await chat.say("send", ref="x", content="hi", model="fake")
        assert (await chat.refused())["code"] == "model_not_found"
        await chat.say("ping")
        await chat.get("pong")


async def test_turns_of_others_are_not_there(tmp_path: Path) -> None:
    runner = FakeRunner(n_ctx=20000, step_s=0.005)
    async with (
        sockets(tmp_path, entries=[entry("ann"), entry("bob")], runner=runner) as there,
        there.chat(headers={"x-api-key": "secret-ann"}) as ann,
        there.chat(headers={"x-api-key": "secret-bob"}) as bob,
    ):
        await ann.get("hello")
        await bob.get("hello")
        turn = await ann.ask(count=100)
        for message in (
            {"type": "resume", "turn": turn["turn"]},
            {"type": "cancel", "turn": turn["turn"]},
            {"type": "send", "session": turn["session"], "content": "hi"},
            {"type": "regenerate", "session": turn["session"]},
            {"type": "send", "session": "caf\u00e9 \U0001f600", "content": "hi"},
        ):
            await bob.say(**message, ref="r")
            frame = await bob.get("error")
            assert frame["error"]["code"] == "not_found" and frame["ref"] == "r"
        assert (await ann.until("end"))[-1]["message"]["status"] == "complete"


async def test_a_server_that_shuts_down_says_so(tmp_path: Path) -> None:
    runner = FakeRunner(n_ctx=20000, step_s=0.2)
    async with (
        sockets(tmp_path, runner=runner) as there,
        there.chat() as idle,
        there.chat() as busy,
        there.chat() as late,
    ):
        for chat in (idle, busy, late):
            await chat.get("hello")
        await busy.ask(count=60)
        await late.ask(count=15000)
        there.gateway.draining = True
        there.room.drain()
        runner.step_s = 0.005
        assert (await idle.refused())["code"] == "shutting_down"
        assert await idle.ended() == 1001
        frames = await busy.until("end")
        assert "shutting_down" in [f.get("error", {}).get("code") for f in frames]
        assert frames[-1]["message"]["status"] == "complete"
        assert await busy.ended() == 1001
        status, error = await refusal(there)
        assert (status, error["code"]) == (503, "shutting_down")
        await late.say("send", ref="no", content="hi", settings=settings(3))
        assert (await late.until("error", ref="no"))[-1]["error"]["code"] == "shutting_down"
        await asyncio.gather(there.room.close(), late.ended())
        assert late.code == 1012
