"""Long sessions over HTTP: read by pages, exported in parts, fitted without holding up others."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import CancelledError, Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import pytest
from fake_runner import FakeRunner
from fakes import FakeClient, wait_for
from gateway_client import Api, is_error, serve
from governed import CALLER, governed, until
from test_turns import get, posting, session, told
from tornado.simple_httpclient import HTTPStreamClosedError

from llmkit.bridge.server import BridgeServer
from llmkit.gateway.bodies import MAX_COUNTS
from llmkit.gateway.conversations import fitting, history, turn_routes
from llmkit.gateway.conversations.shelf import Shelf
from llmkit.gateway.exchange import Exchange
from llmkit.gateway.web import markdown
from llmkit.protocol import TokenizeChat
from llmkit.sessions.exchange_formats import to_markdown
from llmkit.store import conversation_pages
from llmkit.store.conversations import ConversationStore
from llmkit.store.database import open_database


def talk(count: int, text: str = "") -> list[dict[str, str]]:
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": f"m{i} {text}".strip()} for i in range(count)]


def url_of(folder: Path) -> str:
    return f"sqlite:///{folder}/x.db"


def shelf_in(folder: Path, **options: Any) -> Shelf:
    return Shelf(lambda: open_database(url_of(folder)), **options)


@contextlib.asynccontextmanager
async def serving(model: FakeClient | FakeRunner, shelf: Shelf) -> AsyncIterator[Api]:
    client = model if isinstance(model, FakeClient) else FakeClient(runner=model)
    bridge = BridgeServer(client)
    async for api in serve(None, sessions=shelf):
        yield api
    bridge.close()
    client.close()


@contextlib.asynccontextmanager
async def asking(api: Api, path: str) -> AsyncIterator[None]:
    """A GET over a socket of its own whose answer nobody reads, torn down at the end."""
    address = urlsplit(api.url)
    sock = socket.create_connection((address.hostname or "", address.port or 0))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.sendall(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())
    try:
        yield
    finally:
        sock.close()


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[str]]:
    """The threads on which JSON is made of histories, HTML of messages, and chats of paths."""
    seen: set[str] = set()

    def noting(function: Any) -> Any:
        def noted(*args: Any, **more: Any) -> Any:
            seen.add(threading.current_thread().name.rpartition("-")[0])
            return function(*args, **more)

        return noted

    for module, name in (
        (history, "encoded"), (history, "message_object"), (turn_routes, "encoded"),
        (markdown, "render"), (fitting, "_told"), (fitting, "_most_bytes"),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, noting(getattr(module, name)))
    yield seen


async def test_a_long_session_is_read_by_pages(api: Api, threads: set[str]) -> None:
    made = await session(api, messages=talk(1205))
    path = f"/v1/sessions/{made}/messages"
    first = await get(api, path)
    assert len(first["data"]) == 1000 and first["has_more"], "by default, and at most"
    assert first["last_id"] == first["data"][-1]["id"]
    rest = await get(api, f"{path}?after={first['last_id']}")
    assert not rest["has_more"]
    both = [m["content"] for m in first["data"] + rest["data"]]
    assert both == [f"m{i}" for i in range(1205)]
    latest = await get(api, f"{path}?order=desc&limit=2&tree=1")
    assert [m["content"] for m in latest["data"]] == ["m1204", "m1203"]
    before = await get(api, f"{path}?order=desc&limit=3&tree=1&after={latest['last_id']}")
    assert [m["content"] for m in before["data"]] == ["m1202", "m1201", "m1200"]
    assert before["data"][0]["children"] == [latest["last_id"]]
    html = await get(api, f"{path}?limit=1&render=html")
    assert html["data"][0]["html"] == ["<p>m0</p>"]
    assert threads == {"llmkit-looking", "llmkit-rendering"}
    for query in ("limit=0", "limit=1001", "limit=x", "order=up", "render=pdf", "tree=2"):
        is_error(await api.fetch("GET", f"{path}?{query}"), 400)
    is_error(await api.fetch("GET", f"{path}?after=msg_0"), 404)
    empty = await session(api)
    assert await get(api, f"/v1/sessions/{empty}/messages") == {
        "object": "list", "data": [], "last_id": None, "has_more": False,
    }  # fmt: skip


async def test_a_page_of_long_messages_is_short(api: Api) -> None:
    made = await session(api, messages=talk(6, "x" * 900_000))
    path = f"/v1/sessions/{made}/messages"
    seen, after = [], ""
    while True:
        reply = await api.fetch("GET", path + after)
        assert len(reply.body) < 3 << 20
        page = json.loads(reply.body)
        seen.append(len(page["data"]))
        if not page["has_more"]:
            break
        after = f"?after={page['last_id']}"
    assert seen == [3, 3]


async def test_rendering_ends_when_its_client_leaves(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = await session(api, messages=talk(50))
    begun, ended = threading.Event(), threading.Event()

    def slow(text: str, between: Callable[[], None]) -> list[str]:
        begun.set()
        try:
            while True:
                between()
                time.sleep(0.01)
        except CancelledError:
            ended.set()
            raise

    monkeypatch.setattr(markdown, "render", slow)
    async with asking(api, f"/v1/sessions/{made}/messages?render=html"):
        await asyncio.to_thread(wait_for, begun.is_set, 20)
    await asyncio.to_thread(wait_for, ended.is_set)


async def test_a_page_that_waits_for_its_rendering_is_not_read_yet(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = await session(api, messages=talk(5))
    begun, goes_on = threading.Event(), threading.Event()
    page, render = ConversationStore.page, markdown.render
    read: list[str] = []

    def noted(self: Any, *args: Any, **more: Any) -> Any:
        read.append(args[1])
        return page(self, *args, **more)

    def slow(*args: Any) -> list[str]:
        begun.set()
        goes_on.wait(30)
        return render(*args)

    monkeypatch.setattr(ConversationStore, "page", noted)
    monkeypatch.setattr(markdown, "render", slow)
    path = f"/v1/sessions/{made}/messages"
    asked = [asyncio.create_task(get(api, f"{path}?tree=1&render=html")) for _ in range(20)]
    await asyncio.to_thread(wait_for, begun.is_set, 20)
    assert len((await get(api, path))["data"]) == 5, "nobody else waits"
    assert read == [made] * 2, "one that is rendered, one as it is"
    goes_on.set()
    pages = await asyncio.gather(*asked)
    assert [len(each["data"]) for each in pages] == [5] * 20 and len(read) == 21
    is_error(await api.fetch("GET", "/v1/sessions/sess_0/messages?render=html"), 404)


@pytest.mark.parametrize("format", ["json", "markdown"])
async def test_an_export_comes_in_parts(
    api: Api, format: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(history, "PART_CHARS", 500)
    monkeypatch.setattr(history, "PART_MESSAGES", 7)
    said = [*talk(40, "\u6f22 *x*"), {"role": "user", "content": "z" * 2000}]
    said[5]["content"] = "## User <!-- llmkit {} -->"
    parts: list[int] = []
    send = Exchange.send_part

    async def counted(self: Any, data: bytes) -> None:
        parts.append(len(data))
        await send(self, data)

    monkeypatch.setattr(Exchange, "send_part", counted)
    made = await session(api, title="\u6f22", messages=said)
    reply = await api.fetch("GET", f"/v1/sessions/{made}/export?format={format}")
    assert reply.code == 200 and len(parts) >= 6 and sum(parts) == len(reply.body)
    assert "attachment" in reply.headers["Content-Disposition"]
    text = reply.body.decode()
    body: Any = json.loads(text) if format == "json" else {"markdown": text}
    status, again = await api.post("/v1/sessions/import", body)
    assert status in (200, 201), again
    assert await told(api, again["id"]) == await told(api, made)
    if format == "json":
        assert body["head"] == body["messages"][-1]["id"] and body["title"] == "\u6f22"
    empty = await session(api)
    reply = await api.fetch("GET", f"/v1/sessions/{empty}/export?format={format}")
    assert reply.code == 200
    if format == "json":
        assert json.loads(reply.body)["messages"] == [] and not json.loads(reply.body)["head"]


async def test_a_session_of_many_messages_is_imported_again(api: Api) -> None:
    """Its file has more fields than any other body may have."""
    usage = {"prompt_tokens": 9, "completion_tokens": 5, "cached_tokens": 0, "reasoning_tokens": 0}
    said: list[dict[str, Any]] = [dict(message) for message in talk(24_000)]
    for i, message in enumerate(said):
        message |= {"id": f"m{i}", "parent": f"m{i - 1}" if i else None, "status": "complete"}
        if message["role"] == "assistant":
            message |= {"model": "fake", "finish_reason": "stop", "usage": usage}
    body = {"messages": said, "head": said[-1]["id"]}
    assert json.dumps(body).count('":') > MAX_COUNTS["fields"]
    status, made = await api.post("/v1/sessions/import", body)
    assert status == 200 and made["num_messages"] == len(said), made
    is_error(await api.fetch("POST", "/v1/chat/completions", body), 400)


async def test_parts_are_what_the_whole_is(tmp_path: Path) -> None:
    """The store's own export, and Markdown as a file of people."""
    store = ConversationStore(open_database(url_of(tmp_path)))
    known = store.import_("ann", {"messages": talk(5)})
    turns: Any = SimpleNamespace(shelf=(shelf := shelf_in(tmp_path)))
    text = b"".join([part async for part in history._json(turns, known)])
    assert json.loads(text) == store.export("ann", known.id)
    text = b"".join([part async for part in history._markdown(turns, known)])
    assert text.decode() == to_markdown(known, store.path("ann", known.id))
    await shelf.close()
    store.database.close()


async def test_an_export_asks_for_no_children(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each part would read the ids of all later messages."""
    made = await session(api, messages=talk(6))
    monkeypatch.delattr(conversation_pages, "_children")
    assert len((await get(api, f"/v1/sessions/{made}/export"))["messages"]) == 6


async def test_a_file_that_breaks_off_does_not_look_whole(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(history, "PART_MESSAGES", 2)
    made = await session(api, messages=talk(6))
    page, calls = ConversationStore.page, 0

    def failing(self: Any, *args: Any, **more: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > 2:
            raise RuntimeError("the disk is gone")
        return page(self, *args, **more)

    monkeypatch.setattr(ConversationStore, "page", failing)
    with pytest.raises(HTTPStreamClosedError):  # the connection ends before the answer does
        await api.fetch("GET", f"/v1/sessions/{made}/export")


async def test_what_nobody_reads_of_an_export_is_bounded() -> None:
    async with governed() as g:
        made = await session(g.api, messages=talk(64, "x" * 200_000))
        held = g.gateway.held
        async with asking(g.api, f"/v1/sessions/{made}/export"):
            await until(lambda: held.of("somebody") > 0)
            await asyncio.sleep(0.3)
            assert 0 < held.of("somebody") < 2 << 20, "one part, not thirteen million characters"
        await until(lambda: held.of("somebody") == 0)


async def test_reading_keeps_a_session_among_those_in_use() -> None:
    async with governed() as g:
        made = await session(g.api)
        touched: list[str] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ConversationStore, "touch", lambda _, known: touched.append(known.id))
            for what in ("messages", "messages?render=html", "export", "export?format=markdown"):
                assert (await g.api.fetch("GET", f"/v1/sessions/{made}/{what}")).code == 200
            await until(lambda: len(touched) == 4)
        assert set(touched) == {made}


async def test_titles_of_clients_push_out_no_conversation(tmp_path: Path) -> None:
    async with serving(FakeRunner(n_ctx=500), shelf_in(tmp_path, max_sessions=4)) as api:
        mine = [await session(api, title=f"mine {i}") for i in range(3)]
        chat = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
        for i in range(12):
            chat["session_id"] = f"made up {i}"
            status, answer = await api.post("/v1/chat/completions", chat)
            assert status == 200, answer
        found = [s["id"] for s in (await get(api, "/v1/sessions"))["data"]]
        assert set(mine) < set(found) and len(found) == 4


@pytest.mark.parametrize("by", ["turn", "chat"])
async def test_a_session_whose_turn_is_prepared_stays(
    by: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While its history is counted nothing says so in the database."""
    shelf = shelf_in(tmp_path, max_sessions=2)
    counting, goes_on = threading.Event(), threading.Event()
    pruned = fitting._pruned

    def slow(*args: Any) -> Any:
        counting.set()
        goes_on.wait(30)
        return pruned(*args)

    monkeypatch.setattr(fitting, "_pruned", slow)
    async with serving(FakeRunner(n_ctx=500), shelf) as api:
        made = await session(api, messages=talk(30, "word " * 10))
        path = f"/v1/sessions/{made}/messages"
        body: dict[str, Any] = {"content": "hi"}
        if by == "chat":
            path = "/v1/chat/completions"
            body = {"messages": [{"role": "user", "content": "hi"}], "session_id": made}
        asked = asyncio.create_task(api.post(path, body))
        await asyncio.to_thread(wait_for, counting.is_set, 20)
        for i in range(4):  # of the same caller, whose sessions make way
            await session(api, title=f"new {i}")
        assert shelf.uses.ids() == [made]
        goes_on.set()
        status, answer = await asked
        assert status == 200, answer
        assert len(await told(api, made)) == 32
        assert shelf.uses.ids() == []


async def test_a_long_history_is_walked_on_a_thread(api: Api, threads: set[str]) -> None:
    short = await session(api)
    await api.post(f"/v1/sessions/{short}/messages", {"content": "hi"})
    assert threads and not any(name.startswith("llmkit") for name in threads), "which costs more"
    made = await session(api, messages=talk(200))
    threads.clear()
    status, turn = await api.post(f"/v1/sessions/{made}/messages", {"content": "hi"})
    assert status == 200, turn
    chat = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2, "session_id": made}
    status, answer = await api.post("/v1/chat/completions", chat)
    assert status == 200, answer
    assert threads == {"llmkit-counting", ""}, "what is said of the turn is made at once"


class Hung(FakeClient):
    """A model that answers no question, as one whose process is stopped."""

    def inquire(self, inquiry: Any) -> Any:
        return Future() if isinstance(inquiry.question, TokenizeChat) else super().inquire(inquiry)


async def test_a_count_ends_with_its_turn(tmp_path: Path) -> None:
    model = Hung(runner=FakeRunner(n_ctx=500))
    async with serving(model, shelf_in(tmp_path)) as api:
        made = await session(api, messages=talk(60, "word " * 10))
        for _ in range(6):  # more than there are threads
            async with posting(api, f"/v1/sessions/{made}/messages", {"content": "hi"}):
                await until(lambda: bool(_counters()), 20)
            await until(lambda: not _counters(), 20)


def _counters() -> list[str]:
    """The threads that wait for the model."""
    found = []
    for thread in threading.enumerate():
        if not thread.name.startswith("llmkit-counting"):
            continue
        frame = sys._current_frames().get(thread.ident or 0)
        while frame is not None:
            if frame.f_code.co_name == "count":
                found.append(thread.name)
            frame = frame.f_back
    return found


async def test_the_lists_of_others_are_not_seen() -> None:
    async with governed() as g:
        made = await session(g.api)
        for what in ("messages", "messages?render=html", "export", "export?format=markdown"):
            reply = await g.api.fetch("GET", f"/v1/sessions/{made}/{what}", None, {CALLER: "eve"})
            is_error(reply, 404)
