"""A gateway with all its rules, in front of a fake model; callers name themselves by a header."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import tempfile
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from fake_runner import FakeRunner
from fakes import FakeClient
from gateway_client import Api, sessions_in
from tornado.httpclient import HTTPResponse
from tornado.netutil import bind_sockets

from llmkit.bridge.server import BridgeServer
from llmkit.gateway.access.authenticator import Facts
from llmkit.gateway.access.deadlines import Deadlines
from llmkit.gateway.access.edge import Edge
from llmkit.gateway.access.identity import Allowance, Identity
from llmkit.gateway.access.overload import Overload
from llmkit.gateway.app import Gateway, make_app, make_server
from llmkit.gateway.directory import EngineDirectory
from llmkit.gateway.guards import Guards
from llmkit.gateway.record import Record
from llmkit.gateway.response_cache import ResponseCache
from llmkit.gateway.rules import Rules

CALLER = "x-caller"


class ByHeader:
    """An `Authenticator` that believes whatever it is told."""

    def __init__(self, allowances: Mapping[str, Allowance]) -> None:
        self._allowances = allowances

    async def identify(self, facts: Facts) -> Identity:
        name = facts.headers.get(CALLER, "somebody")
        return Identity(name, "key", allowance=self._allowances.get(name, Allowance()))


@dataclass
class Governed:
    """The gateway and its parts; ``records`` are of the requests that have ended."""

    api: Api
    model: FakeClient
    overload: Overload
    deadlines: Deadlines
    rules: Rules
    gateway: Gateway
    records: list[Record]
    bridge: BridgeServer

    @property
    def cache(self) -> ResponseCache:
        assert self.rules.cache is not None
        return self.rules.cache

    @property
    def num_preparing(self) -> int:
        """Requests that the model's bridge has, and that it has not handed on to the model."""
        peers = list(self.bridge._peers.values())
        return sum(len(peer.preparing) + len(peer.asking) for peer in peers)

    def under_way(self, caller: str) -> int:
        """Requests of a caller that have reached an engine."""
        found = self.overload._callers.get(caller)
        return sum(p.engine is not None for p in found.places.values()) if found else 0

    async def post(
        self, path: str, body: Any, caller: str = "somebody", **headers: str
    ) -> HTTPResponse:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return await self.api.fetch("POST", path, body, {CALLER: caller, **named})

    @contextlib.asynccontextmanager
    async def connection(
        self, path: str, body: Any, caller: str = "somebody", announced: int | None = None
    ) -> AsyncIterator[asyncio.StreamReader]:
        """A request over a socket of its own, which is torn down when the context ends."""
        address = urlsplit(self.api.url)
        reader, writer = await asyncio.open_connection(address.hostname, address.port)
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        head = (
            f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n{CALLER}: {caller}\r\n"
            f"Content-Length: {len(data) if announced is None else announced}\r\n\r\n"
        )
        writer.write(head.encode() + data)
        try:
            await writer.drain()
            yield reader
        finally:
            sock = writer.get_extra_info("socket")
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            writer.close()


@contextlib.asynccontextmanager
async def governed(
    runner: FakeRunner | None = None,
    *,
    model: FakeClient | None = None,
    max_queue: int | None = None,
    max_concurrent: int | None = None,
    most_s: float | None = None,
    guards: Guards | None = None,
    cache: ResponseCache | None = None,
    allowances: Mapping[str, Allowance] | None = None,
    max_waiting: int = 1024,
    **options: Any,
) -> AsyncIterator[Governed]:
    """``options`` are the `Gateway`'s."""
    model = model or FakeClient(runner=runner or FakeRunner(n_ctx=5000), max_waiting=max_waiting)
    bridge = BridgeServer(model)
    directory = EngineDirectory()
    overload = Overload(
        directory,
        max_queue=max_queue,
        max_concurrent=max_concurrent,
        reads_first=cache is not None,
    )
    deadlines = Deadlines(most_s, overload.retry_after)
    rules = Rules(guards, overload, cache)
    records: list[Record] = []

    @contextlib.contextmanager
    def recorder(exchange: Any) -> Any:
        try:
            yield
        finally:
            records.append(exchange.record)

    folder = tempfile.TemporaryDirectory()
    gateway = Gateway(
        directory,
        sessions=sessions_in(folder.name),
        stages=[deadlines.stage, overload.stage, rules.stage],
        observers=[recorder],
        early=overload.early,
        **options,
    )
    server = make_server(make_app(gateway, ByHeader(allowances or {}), Edge()))
    sockets = bind_sockets(0, "127.0.0.1")
    server.add_sockets(sockets)
    api = Api(f"http://127.0.0.1:{sockets[0].getsockname()[1]}")
    try:
        yield Governed(api, model, overload, deadlines, rules, gateway, records, bridge)
    finally:
        server.stop()
        await gateway.turns.close()
        await server.close_all_connections()
        directory.close()
        bridge.close()
        model.close()
        folder.cleanup()


async def until(condition: Any, seconds: float = 30.0) -> None:
    """Wait on the loop until ``condition()`` is true."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)


QUESTION = [{"role": "user", "content": "hi"}]


def dialects(max_tokens: int, *, stream: bool = False, text: str = "hi") -> dict[str, Any]:
    """The same question in every dialect, by path."""
    messages = [{"role": "user", "content": text}]
    ollama = {"temperature": 0, "num_predict": max_tokens}
    common = {"model": "fake", "stream": stream}
    sampled = {**common, "temperature": 0, "max_tokens": max_tokens}
    return {
        "/v1/chat/completions": {**sampled, "messages": messages},
        "/v1/completions": {**sampled, "prompt": text},
        "/v1/responses": {
            **common,
            "input": text,
            "temperature": 0,
            "max_output_tokens": max_tokens,
        },
        "/v1/messages": {**sampled, "messages": messages},
        "/api/chat": {**common, "messages": messages, "options": ollama},
        "/api/generate": {**common, "prompt": text, "options": ollama},
    }


def message_of(reply: HTTPResponse) -> str:
    """The message of an error, in whatever dialect."""
    error = json.loads(reply.body)["error"]
    return str(error if isinstance(error, str) else error["message"])
