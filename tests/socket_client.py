"""A client of the chat socket, and a gateway with sessions for it."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any, Self

from fake_runner import FakeRunner
from fakes import FakeClient
from tornado.httpclient import HTTPRequest
from tornado.netutil import bind_sockets
from tornado.websocket import WebSocketClientConnection, websocket_connect

from llmkit.bridge.server import BridgeServer
from llmkit.gateway.access.cors import Cors
from llmkit.gateway.access.edge import Edge
from llmkit.gateway.access.keys import Keys
from llmkit.gateway.app import Gateway, make_app, make_server
from llmkit.gateway.conversations.shelf import Shelf
from llmkit.gateway.directory import EngineDirectory
from llmkit.gateway.server import BoundedServer
from llmkit.settings.entries import KeyEntry
from llmkit.store.database import open_database

SUBPROTOCOL = "llmkit.chat"
PATH = "/v1/chat/ws"
Frame = dict[str, Any]


class ChatClient:
    """``say`` sends a message, ``next`` gives the next frame; None is the end, see ``code``."""

    def __init__(self, ws: WebSocketClientConnection) -> None:
        self.ws = ws

    @classmethod
    @contextlib.asynccontextmanager
    async def open(
        cls,
        url: str,
        path: str = PATH,
        subprotocols: Sequence[str] = (SUBPROTOCOL,),
        headers: dict[str, str] | None = None,
        **options: Any,
    ) -> AsyncIterator[Self]:
        request = HTTPRequest(url.replace("http", "ws", 1) + path, headers=headers or {})
        ws = await websocket_connect(request, subprotocols=list(subprotocols), **options)
        try:
            yield cls(ws)
        finally:
            ws.close()

    async def say(self, type: str = "", **fields: Any) -> None:
        await self.ws.write_message(json.dumps({"type": type, **fields} if type else fields))

    async def text(self, seconds: float = 20.0) -> str | None:
        async with asyncio.timeout(seconds):
            found = await self.ws.read_message()
        assert not isinstance(found, bytes)
        return found

    async def next(self, seconds: float = 20.0) -> Frame | None:
        found = await self.text(seconds)
        return None if found is None else json.loads(found)

    async def get(self, kind: str) -> Frame:
        """The next frame, which is of this kind."""
        frame = await self.next()
        assert frame is not None and frame["type"] == kind, frame
        return frame

    async def until(self, kind: str, **fields: Any) -> list[Frame]:
        """All frames up to one of a kind with these fields."""
        frames: list[Frame] = []
        while True:
            frame = await self.next()
            assert frame is not None, (kind, frames, self.code)
            frames.append(frame)
            if frame["type"] == kind and all(frame.get(k) == v for k, v in fields.items()):
                return frames

    async def refused(self) -> Frame:
        """What an error says."""
        error: Frame = (await self.get("error"))["error"]
        assert set(error) == {"type", "code", "message", "param"} and error["message"]
        return error

    async def ended(self) -> int | None:
        """Wait until the server has closed; with which code."""
        while await self.next() is not None:
            pass
        return self.code

    @property
    def code(self) -> int | None:
        return self.ws.close_code

    async def ask(self, text: str = "hi", count: int = 6, **fields: Any) -> Frame:
        """Send a question; the `turn` frame."""
        await self.say("send", content=text, settings=settings(count), **fields)
        return (await self.until("turn"))[-1]


def settings(count: int) -> dict[str, Any]:
    return {"max_tokens": count, "temperature": 0}


def text_of(frames: Sequence[Frame], turn: str | None = None) -> str:
    return "".join(f["text"] for f in frames if f["type"] == "delta" and turn in (None, f["turn"]))


class Sockets:
    """A gateway with sessions in front of a fake model."""

    def __init__(
        self, url: str, gateway: Gateway, server: BoundedServer, model: FakeClient, keys: Keys
    ) -> None:
        self.url, self.gateway, self.server, self.model = url, gateway, server, model
        self.keys = keys
        self.port = int(url.rpartition(":")[2])

    @property
    def room(self) -> Any:
        return self.gateway.sockets

    def chat(self, **options: Any) -> contextlib.AbstractAsyncContextManager[ChatClient]:
        return ChatClient.open(self.url, **options)


@contextlib.asynccontextmanager
async def sockets(
    folder: Path,
    key: str | None = None,
    *,
    entries: Sequence[KeyEntry] = (),
    origins: Sequence[str] = (),
    runner: FakeRunner | None = None,
    base_path: str = "",
    **options: Any,
) -> AsyncIterator[Sockets]:
    """``options`` are the `Gateway`'s."""
    model = FakeClient(runner=runner or FakeRunner(n_ctx=20000))
    bridge = BridgeServer(model)
    directory = EngineDirectory()
    shelf = Shelf(lambda: open_database(f"sqlite:///{folder}/sockets.db"))
    gateway = Gateway(directory, sessions=shelf, **options)
    keys = Keys(key, "127.0.0.1", entries=entries, cors=Cors(origins, local=True))
    edge = Edge(Cors(origins, local=keys.is_open))
    server = make_server(make_app(gateway, keys, edge, base_path=base_path))
    bound = bind_sockets(0, "127.0.0.1")
    server.add_sockets(bound)
    url = f"http://127.0.0.1:{bound[0].getsockname()[1]}"
    try:
        yield Sockets(url, gateway, server, model, keys)
    finally:
        server.stop()
        await gateway.turns.close()
        await gateway.sockets.close()
        await server.close_all_connections()
        directory.close()
        bridge.close()
        model.close()
