"""A gateway on a free port, and its client."""

from __future__ import annotations

import json
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from tornado.httpclient import AsyncHTTPClient, HTTPResponse
from tornado.netutil import bind_sockets

from llmkit.gateway.access.cors import Cors
from llmkit.gateway.access.edge import Edge
from llmkit.gateway.access.keys import Keys
from llmkit.gateway.app import Gateway, make_app, make_server
from llmkit.gateway.conversations.shelf import Shelf
from llmkit.gateway.directory import EngineDirectory
from llmkit.store.database import open_database


class Api:
    def __init__(self, url: str, key: str | None = None) -> None:
        self.url, self.key = url, key

    async def fetch(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> HTTPResponse:
        data = body if body is None or isinstance(body, bytes | str) else json.dumps(body)
        auth = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        return await AsyncHTTPClient(force_instance=True).fetch(
            self.url + path,
            method=method,
            body=data,
            headers={**auth, **(headers or {})},
            raise_error=False,
            allow_nonstandard_methods=True,
            connect_timeout=60,
            request_timeout=60,
        )

    async def post(self, path: str, body: Any) -> tuple[int, Any]:
        reply = await self.fetch("POST", path, body)
        return reply.code, json.loads(reply.body)

    async def events(self, path: str, body: dict[str, Any]) -> list[Any]:
        reply = await self.fetch("POST", path, {**body, "stream": True})
        assert reply.code == 200, reply.body
        assert reply.headers["Content-Type"] == "text/event-stream"
        assert (
            reply.headers["Cache-Control"] == "no-cache"
            and reply.headers["X-Accel-Buffering"] == "no"
            and reply.headers["x-request-id"]
        )
        blocks = reply.body.decode().split("\n\n")
        assert blocks[-1] == "" and all(b.startswith(("data: ", ": ping")) for b in blocks[:-1])
        return [
            b[6:] if b == "data: [DONE]" else json.loads(b[6:])
            for b in blocks[:-1]
            if b.startswith("data: ")
        ]


async def serve(
    key: str | None,
    most: int = 1000,
    directory: EngineDirectory | None = None,
    **options: Any,
) -> AsyncIterator[Api]:
    """``options`` are the `Gateway`'s."""
    directory = directory or EngineDirectory()
    folder = tempfile.TemporaryDirectory()
    gateway = Gateway(directory, **{"sessions": sessions_in(folder.name), **options})
    edge = Edge(Cors(local=key is None))
    server = make_server(make_app(gateway, Keys(key, "127.0.0.1"), edge), most)
    sockets = bind_sockets(0, "127.0.0.1")
    server.add_sockets(sockets)
    yield Api(f"http://127.0.0.1:{sockets[0].getsockname()[1]}", key)
    server.stop()
    await gateway.turns.close()
    await server.close_all_connections()
    directory.close()
    folder.cleanup()


def sessions_in(folder: str | Path) -> Shelf:
    """What is kept in a database in a folder, made when the first is."""
    return Shelf(lambda: open_database(f"sqlite:///{folder}/llmkit.db"))


CHAT = {
    "model": "fake",
    "messages": [{"role": "user", "content": "hi"}],
    "max_tokens": 6,
    "temperature": 0,
}


CHAT_TEXT = b"[user]hi"


def is_error(reply: HTTPResponse, status: int) -> dict[str, Any]:
    assert reply.code == status, reply.body
    error: dict[str, Any] = json.loads(reply.body)["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"] and error["type"]
    assert reply.headers["x-request-id"]
    return error
