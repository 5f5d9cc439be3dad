"""What is not under the gateway's routes at all is answered without being read."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import psutil
import pytest
from tornado.netutil import bind_sockets

from llmkit.gateway.app import make_server
from llmkit.gateway.composition import Composition
from llmkit.gateway.directory import EngineDirectory
from llmkit.settings.gateway import GatewayOptions
from llmkit.settings.serving import ServeSettings

MB = 1 << 20
BODY = 60 * MB


@pytest.fixture
async def port() -> AsyncIterator[int]:
    options = GatewayOptions(base_path="/llm", api_key="k")
    parts = Composition(ServeSettings(options), EngineDirectory([]))
    server = make_server(parts.app(), edge=parts.access.edge)
    sockets = bind_sockets(0, "127.0.0.1")
    server.add_sockets(sockets)
    yield sockets[0].getsockname()[1]
    server.stop()
    await server.close_all_connections()
    await parts.close()


@pytest.mark.parametrize(
    "target", ["http://h/x", "/elsewhere", "/v1/chat/completions", "*", "/llm"]
)
@pytest.mark.parametrize("length", [f"Content-Length: {BODY}", "Transfer-Encoding: chunked"])
async def test_a_body_for_nobody_is_not_kept(port: int, target: str, length: str) -> None:
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    before = psutil.Process().memory_info().rss
    writer.write(f"POST {target} HTTP/1.1\r\nHost: h\r\n{length}\r\n\r\n".encode())
    most, piece = 0, b"x" * MB
    try:
        for _ in range(BODY // MB):
            writer.write(b"%x\r\n%b\r\n" % (MB, piece) if "chunked" in length else piece)
            await writer.drain()
            most = max(most, psutil.Process().memory_info().rss - before)
    except ConnectionError:
        pass  # it need not be listened to
    writer.close()
    assert most < 25 * MB


@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS", "BREW"])
async def test_every_method_has_an_answer_with_headers(port: int, method: str) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"{method} /elsewhere HTTP/1.1\r\nHost: h\r\n\r\n".encode())
    answer = await asyncio.wait_for(reader.read(64 << 10), 30)
    writer.close()
    head = answer.split(b"\r\n\r\n")[0].lower()
    assert head.startswith((b"http/1.1 404", b"http/1.1 405"))
    assert b"x-content-type-options: nosniff" in head
    if b" 404 " in head:
        assert b"connection: close" in head and b"not_found" in answer
