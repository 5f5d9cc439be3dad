"""nginx, Caddy and HAProxy with the files of `deploy/proxy`, in front of a gateway: what streams
through arrives at once, and what breaks off is noticed."""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
import threading
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from access_client import Served, entry, served
from fake_runner import FakeRunner
from fakes import FakeClient
from proxy_parts import HOST, PROXIES, Proxy, free_port, make_certificate, running
from tornado.httpclient import AsyncHTTPClient, HTTPError, HTTPRequest, HTTPResponse
from tornado.websocket import websocket_connect

from llmkit.bridge.server import BridgeServer
from llmkit.engine.batch import Batch, StepOutput
from llmkit.gateway.exchange import Exchange
from llmkit.gateway.server import HEADER_S

KEY = entry().key
BODY_MB = 0.25


class Turnstile(FakeRunner):
    """Computes a step for each ticket; a shut one lets steps of prompts pass, and no token out."""

    def __init__(self) -> None:
        super().__init__(n_ctx=5000)
        self.tickets = threading.Semaphore(0)
        self.shut = False

    def execute(self, batch: Batch) -> StepOutput:
        if self.shut and batch.chunks:
            while not self.tickets.acquire(timeout=0.05):
                if not self.shut or self._interrupt.is_set():
                    break
        return super().execute(batch)


@dataclass
class Behind:
    """A gateway behind a proxy: ``url`` is the proxy's."""

    url: str
    gateway: Served
    runner: Turnstile
    engine: FakeClient
    addresses: list[str] = field(default_factory=list)

    def request(self, path: str, body: Any = None, **more: Any) -> HTTPRequest:
        headers = {"Authorization": f"Bearer {KEY}", "Host": HOST, **more.pop("headers", {})}
        data = body if isinstance(body, bytes | None) else json.dumps(body)
        method = "GET" if body is None else "POST"
        return HTTPRequest(
            self.url + path, method, headers, data, validate_cert=False, decompress_response=False,
            **more,
        )  # fmt: skip

    async def fetch(self, path: str, body: Any = None, **more: Any) -> HTTPResponse:
        client = AsyncHTTPClient(force_instance=True)
        return await client.fetch(self.request(path, body, **more), raise_error=False)


@pytest.fixture(params=PROXIES)
async def behind(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Behind]:
    make: Proxy = request.param
    monkeypatch.setenv("HOME", str(tmp_path))  # of Caddy's storage
    make_certificate(tmp_path)
    addresses: list[str] = []

    @contextlib.contextmanager
    def noting(exchange: Exchange) -> Iterator[None]:
        addresses.append(exchange.address)
        yield

    runner = Turnstile()
    engine = FakeClient(runner=runner)
    bridge = BridgeServer(engine)
    port = free_port()
    async with served(
        [entry()],
        trusted_proxies=("127.0.0.1",),
        body_mb=BODY_MB,
        gateway={"observers": [noting]},
    ) as gateway:
        command = make(tmp_path, port, f"127.0.0.1:{gateway.port}")
        with running(command, tmp_path) as process:
            found = Behind(f"https://127.0.0.1:{port}", gateway, runner, engine, addresses)
            for _ in range(600):
                with contextlib.suppress(OSError):
                    if (await found.fetch("/health/ready")).code == 200:
                        break
                assert process.poll() is None, (tmp_path / "log").read_text()
                await asyncio.sleep(0.05)
            else:
                raise AssertionError((tmp_path / "log").read_text())
            addresses.clear()
            yield found
    bridge.close()
    engine.close()


CHAT = {
    "model": "fake",
    "messages": [{"role": "user", "content": "hi"}],
    "max_tokens": 6,
    "temperature": 0,
    "stream": True,
}


class Events:
    """The events of a stream, as they arrive."""

    def __init__(self, behind: Behind, path: str, body: dict[str, Any], **more: Any) -> None:
        self._text = ""
        self._arrived = asyncio.Event()
        self.client = AsyncHTTPClient(force_instance=True)
        self.reply = asyncio.ensure_future(
            self.client.fetch(
                behind.request(path, body, streaming_callback=self._take, **more),
                raise_error=False,
            )
        )

    def _take(self, data: bytes) -> None:
        self._text += data.decode()
        self._arrived.set()

    async def text(self) -> str:
        """The next piece of the answer's text; empty at its end."""
        while True:
            while "\n\n" in self._text:
                block, _, self._text = self._text.partition("\n\n")
                if block == "data: [DONE]":
                    return ""
                if block.startswith("data: "):
                    event = json.loads(block[6:])
                    delta = "".join(
                        choice["delta"].get("content") or "" for choice in event["choices"]
                    )
                    if delta:
                        return delta
            self._arrived.clear()
            async with asyncio.timeout(30):
                await self._arrived.wait()


async def test_a_token_is_there_before_the_next_is_computed(behind: Behind) -> None:
    """The model computes one only when the one before has come through the proxy."""
    behind.runner.shut = True
    events = Events(behind, "/v1/chat/completions", CHAT)
    behind.runner.tickets.release()  # the prompt, and with it the first token
    texts = [await events.text()]
    while len(texts) < 6:
        behind.runner.tickets.release()
        texts.append(await events.text())
    assert all(len(text) == 1 for text in texts)
    assert await events.text() == ""
    reply = await events.reply
    assert reply.code == 200 and reply.headers["Content-Type"].startswith("text/event-stream")
    assert reply.headers.get("Content-Encoding") is None


async def posted(
    behind: Behind,
    path: str,
    body: bytes,
    headers: Mapping[str, str] = MappingProxyType({}),
    local: str = "127.0.0.1",
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection on which this is being sent, whether or not anything comes back."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    reader, writer = await asyncio.open_connection(
        "127.0.0.1", int(behind.url.rpartition(":")[2]), ssl=context, server_hostname=HOST,
        local_addr=(local, 0),
    )  # fmt: skip
    sent = {"Host": HOST, "Authorization": f"Bearer {KEY}", "Content-Length": len(body), **headers}
    head = "".join(f"{name}: {value}\r\n" for name, value in sent.items())
    writer.write(f"POST {path} HTTP/1.1\r\n{head}\r\n".encode() + body)
    return reader, writer


@pytest.mark.parametrize("when", ["amid a stream", "before its first token", "no stream"])
async def test_whoever_goes_away_ends_the_request(behind: Behind, when: str) -> None:
    behind.runner.shut = True
    body = json.dumps({**CHAT, "max_tokens": 4000, "stream": when != "no stream"}).encode()
    reader, writer = await posted(behind, "/v1/chat/completions", body)
    async with asyncio.timeout(30):
        while not behind.engine.engine.requests():
            await asyncio.sleep(0.01)
        if when == "amid a stream":
            behind.runner.tickets.release()
            await reader.readuntil(b"content")
    writer.transport.abort()
    async with asyncio.timeout(30):  # it is held up, and nothing else ends it
        while behind.engine.engine.requests():
            await asyncio.sleep(0.01)
    assert (await behind.fetch("/v1/models")).code == 200


async def test_a_socket_passes_and_stays(behind: Behind) -> None:
    request = behind.request("/v1/chat/ws")
    request.url = request.url.replace("http", "ws", 1)
    ws = await websocket_connect(request, subprotocols=["llmkit.chat"])
    try:
        behind.runner.shut = True
        await ws.write_message(
            json.dumps(
                {"type": "send", "content": "hi", "model": "fake", "settings": {"max_tokens": 3}}
            )
        )
        texts = []
        while True:
            async with asyncio.timeout(30):
                message = json.loads(await ws.read_message() or "null")
            if message["type"] == "turn":
                behind.runner.tickets.release()
            elif message["type"] == "delta":
                texts.append(message["text"])
                behind.runner.tickets.release()
            elif message["type"] in ("end", "error"):
                break
        assert message["type"] == "end" and len(texts) == 3, message
    finally:
        ws.close()


async def test_a_body_that_is_too_large_is_refused_by_us(behind: Behind) -> None:
    """The error is llmkit's, whole, in the caller's dialect; the connection may end."""
    most = round(BODY_MB * (1 << 20))
    for size in (most + 1, 4 * most, 40 * most):
        reader, writer = await posted(behind, "/v1/chat/completions", b" " * size)
        async with asyncio.timeout(30):
            head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
            assert head.startswith("http/1.1 413 "), (size, head)
            length = head.partition("content-length: ")[2].partition("\r")[0]
            answer = await reader.readexactly(int(length))
        writer.transport.abort()
        assert json.loads(answer)["error"]["code"] == "request_too_large"
    assert (await behind.fetch("/v1/models")).code == 200


async def test_who_asks_is_known_and_cannot_be_feigned(behind: Behind) -> None:
    feigned = {
        "X-Forwarded-For": "6.6.6.6",
        "Forwarded": "for=6.6.6.6",
        "X-Real-IP": "6.6.6.6",
    }
    body = json.dumps({**CHAT, "stream": False}).encode()
    # From an address that is not the proxy's own.
    reader, writer = await posted(
        behind, "/v1/chat/completions", body, headers=feigned, local="127.0.0.2"
    )
    async with asyncio.timeout(30):
        assert (await reader.readline()).startswith(b"HTTP/1.1 200 ")
    writer.transport.abort()
    assert set(behind.addresses) == {"127.0.0.2"}
    wrong = await behind.fetch("/v1/models", headers={"Authorization": "Bearer wrong"})
    assert wrong.code == 401


@pytest.mark.parametrize("make", PROXIES)
async def test_idle_connections_are_closed_by_the_proxy_first(
    make: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a request now and then meets a connection that is just being closed."""
    ended = asyncio.Event()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked = b""
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            asked = await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
            await reader.read()  # until the connection is closed, or reset as HAProxy does
        if asked.startswith(b"GET /idle"):
            ended.set()
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as upstream:
        port = free_port()
        monkeypatch.setenv("HOME", str(tmp_path))
        make_certificate(tmp_path)
        command = make(tmp_path, port, f"127.0.0.1:{upstream.sockets[0].getsockname()[1]}")
        assert HEADER_S > 15
        for name in {"site.conf", "Caddyfile"} & {path.name for path in tmp_path.iterdir()}:
            text = (tmp_path / name).read_text()
            assert text.count("15s") == 1
            (tmp_path / name).write_text(text.replace("15s", "1s"))
        with running(command, tmp_path):
            request = HTTPRequest(
                f"https://127.0.0.1:{port}/idle", headers={"Host": HOST}, validate_cert=False
            )
            async with asyncio.timeout(30):
                while True:
                    with contextlib.suppress(OSError, HTTPError):
                        await AsyncHTTPClient(force_instance=True).fetch(request)
                        break
                    await asyncio.sleep(0.05)
                await ended.wait()
