"""Whether whoever is at a socket is still welcome: asked again, and no socket waits for another."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from pathlib import Path
from typing import Any

import pytest
from access_client import entry
from fake_runner import FakeRunner
from fakes import wait_for
from governed import until
from socket_client import settings, sockets
from test_socket_faults import HEAD, frame

from llmkit.gateway.access.identity import Identity
from llmkit.gateway.failures import ApiError
from llmkit.gateway.sockets import connection, room
from llmkit.gateway.web import markdown


class Checked:
    """A connection as the room sees it."""

    def __init__(self, *, is_busy: bool = True) -> None:
        self.is_busy, self.num_checks = is_busy, 0
        self.goes_on = asyncio.Event()

    async def check(self) -> None:
        self.num_checks += 1
        await self.goes_on.wait()


async def test_no_check_waits_for_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "CHECK_S", 0.01)
    monkeypatch.setattr(room, "IDLE_CHECKS", 5)
    async with sockets(tmp_path) as there:
        stalled, other, idle = Checked(), Checked(), Checked(is_busy=False)
        for each in (other, idle):
            each.goes_on.set()
        for each in (stalled, other, idle):
            there.room.enter(each, Identity("ann", "key"), "127.0.0.1")
        await until(lambda: other.num_checks >= 20)
        assert stalled.num_checks == 1, "it is not checked twice at once"
        assert 0 < idle.num_checks < other.num_checks
        stalled.goes_on.set()
        await until(lambda: stalled.num_checks > 3)
        for each in (stalled, other, idle):
            there.room.leave(each)


async def test_a_revoked_socket_that_reads_nothing_is_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Long before it would be dropped for reading nothing."""
    monkeypatch.setattr(room, "CHECK_S", 0.05)
    monkeypatch.setattr(connection, "LAST_WORD_S", 2.0)
    runner = FakeRunner(n_ctx=20000, n_slots=4, step_s=0.001)
    entries = [entry("ann"), entry("bob")]
    async with sockets(tmp_path, entries=entries, runner=runner) as there:
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(client, ("127.0.0.1", there.port))
        head = HEAD.removesuffix(b"\r\n") + b"X-Api-Key: secret-ann\r\n\r\n"
        await loop.sock_sendall(client, head)
        for n in range(4):
            text = {"type": "send", "content": f"n{n}", "settings": settings(15000)}
            await loop.sock_sendall(client, frame(json.dumps(text).encode()))
        await until(lambda: len(there.room) == 1)
        [found] = there.room._who
        stream: Any = found._wire._protocol.stream
        await until(lambda: len(stream._write_buffer or b"") > 0)
        await until(stream.writing)
        async with there.chat(headers={"x-api-key": "secret-bob"}) as other:
            await other.get("hello")
            await other.ask(count=15000)
            await other.until("delta")
            there.keys.replace(None, [])
            assert (await other.until("error"))[-1]["error"]["code"] == "invalid_api_key"
            assert await other.ended() == 1008
        await until(lambda: not len(there.room))
        client.close()
        await there.gateway.turns.stop_all()


async def test_an_idle_socket_is_closed_when_its_key_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "CHECK_S", 0.01)
    async with (
        sockets(tmp_path, entries=[entry("ann"), entry("bob")]) as there,
        there.chat(headers={"x-api-key": "secret-ann"}) as chat,
        there.chat(subprotocols=["llmkit.chat"]) as unknown,
    ):
        await chat.get("hello")
        there.keys.replace(None, [entry("bob")])
        assert (await chat.refused())["code"] == "invalid_api_key"
        assert await chat.ended() == 1008
        # One that has not said yet who it is, may still do so.
        await unknown.say("auth", key="secret-bob")
        await unknown.get("hello")


async def test_what_a_caller_may_not_read_any_more_ends_its_socket(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an authorizer of Jupyter may say."""
    monkeypatch.setattr(room, "CHECK_S", 0.05)
    async with sockets(tmp_path) as there, there.chat() as chat:
        await chat.get("hello")
        [found] = there.room._who

        async def refuse() -> None:
            raise ApiError(403, "You may not read.", "permission_error", code="forbidden")

        monkeypatch.setattr(found._caller, "identify", refuse)
        monkeypatch.setattr(room, "IDLE_CHECKS", 1)
        assert (await chat.refused())["code"] == "forbidden"
        assert await chat.ended() == 1008


async def test_rendering_takes_no_thread_of_others_and_ends_with_its_follower(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that resumes again and again has one answer rendered at a time."""
    begun, running, most = 0, 0, 0
    goes_on, lock = threading.Event(), threading.Lock()
    made = markdown._html

    def slow(tokens: Any) -> str:
        nonlocal begun, running, most
        with lock:
            begun, running = begun + 1, running + 1
            most = max(most, running)
        assert threading.current_thread().name.startswith("llmkit-rendering")
        goes_on.wait(30)
        with lock:
            running -= 1
        return made(tokens)

    runner = FakeRunner(n_ctx=20000)
    async with sockets(tmp_path, runner=runner) as there, there.chat() as chat:
        await chat.get("hello")
        turn = (await chat.ask(count=20))["turn"]
        await chat.until("end")
        kept = there.gateway.turns._turns[turn]
        kept.log = type(kept.log)()
        kept.log.text("delta", "one\n\ntwo\n\nthree\n\n" * 50)
        kept.log.add("end", is_last=True, message={})
        monkeypatch.setattr(markdown, "_html", slow)
        for _ in range(30):
            await chat.say("resume", turn=turn, render=True)
        await chat.say("ping")
        await chat.until("pong")  # all of them are taken
        await asyncio.to_thread(wait_for, lambda: begun == 1)
        # Those that were replaced never begin; the running one ends at its next block.
        goes_on.set()
        frames = await chat.until("end")
        assert most == 1 and begun <= 155, begun
        assert sum(f["type"] == "html" for f in frames) >= 150
