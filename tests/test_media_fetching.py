"""Pictures from other hosts: what an operator does not allow is not fetched, and what he allows is
fetched from the internet only, once, and not without end."""

from __future__ import annotations

import asyncio
import ssl
import threading
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace
from typing import Any

import pytest
from pictures import picture

from llmkit.errors import InvalidRequestError
from llmkit.gateway.media import fetching
from llmkit.gateway.media.attached import Attached
from llmkit.gateway.media.fetching import Fetcher
from llmkit.settings.gateway import GatewayOptions

PUBLIC = "93.184.215.14"
URL = "https://images.example.org/a%20b.png?size=1"
Serve = Callable[[bytes], Any]
connect = asyncio.open_connection


class Host:
    """Says ``answer`` to whoever connects; keeps what was asked, and of which address."""

    def __init__(self) -> None:
        self.answer = b""
        self.asked: list[str] = []
        self.reached: list[tuple[str, int, str]] = []
        self.port = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.asked.append((await reader.readuntil(b"\r\n\r\n")).decode())
        writer.write(self.answer)
        await writer.drain()
        writer.close()

    async def connect(
        self, address: str, port: int, *, ssl: ssl.SSLContext, server_hostname: str, limit: int
    ) -> Any:
        assert ssl.check_hostname and ssl.verify_mode == 2
        self.reached.append((address, port, server_hostname))
        return await connect("127.0.0.1", self.port, limit=limit)


@pytest.fixture
async def host(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Host]:
    host = Host()
    server = await asyncio.start_server(host.serve, "127.0.0.1", 0)
    host.port = server.sockets[0].getsockname()[1]
    monkeypatch.setattr(fetching.asyncio, "open_connection", host.connect)
    yield host
    server.close()
    await server.wait_closed()


def fetcher(*addresses: str, hosts: tuple[str, ...] = ("images.example.org",)) -> Fetcher:
    async def resolve(name: str, port: int) -> list[str]:
        return list(addresses)

    return Fetcher(lambda: hosts, resolve=resolve)


async def why(fetcher: Fetcher, url: str = URL) -> str:
    with pytest.raises(InvalidRequestError) as caught:
        await fetcher.fetch(url, "messages")
    assert caught.value.param == "messages"
    return str(caught.value)


async def test_an_allowed_host_is_asked_at_the_address_that_was_checked(host: Host) -> None:
    data = picture()
    host.answer = b"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\n\r\n" + data
    assert await fetcher(PUBLIC).fetch(URL, "messages") == data
    assert host.reached == [(PUBLIC, 443, "images.example.org")]
    (asked,) = host.asked
    assert asked.startswith("GET /a%20b.png?size=1 HTTP/1.0\r\nHost: images.example.org\r\n")
    assert "cookie" not in asked.lower() and "authorization" not in asked.lower()


async def test_every_address_of_a_host_is_tried(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.answer = b"HTTP/1.1 200 OK\r\n\r\nfile"
    tried = []

    async def reach(address: str, port: int, **how: Any) -> Any:
        tried.append(address)
        if len(tried) == 1:
            raise ConnectionRefusedError
        return await host.connect(address, port, **how)

    monkeypatch.setattr(fetching.asyncio, "open_connection", reach)
    assert await fetcher(PUBLIC, "93.184.215.15").fetch(URL, "messages") == b"file"
    assert tried == [PUBLIC, "93.184.215.15"]


async def test_certificates_are_read_once_and_not_on_the_loop(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[threading.Thread] = []
    make = ssl.create_default_context
    monkeypatch.setattr(
        fetching.ssl,
        "create_default_context",
        lambda: [read.append(threading.current_thread()), make()][1],
    )
    host.answer = b"HTTP/1.1 200 OK\r\n\r\nfile"
    one = fetcher(PUBLIC)
    for _ in range(2):
        await one.fetch(URL, "messages")
    assert len(read) == 1 and read[0] is not threading.main_thread()


async def test_files_of_one_request_have_one_deadline(host: Host) -> None:
    now = asyncio.get_running_loop().time()
    with pytest.raises(InvalidRequestError, match=r"could not fetch the file from images\.ex"):
        await fetcher(PUBLIC).fetch(URL, "messages", now)


async def test_what_is_fetched_is_held_for_its_caller() -> None:
    data, held = picture(), list[int]()

    async def fetch(url: str, param: str, until: float) -> bytes:
        return data

    async def aside(exchange: Any, work: Callable[[], Any]) -> Any:
        return work()

    exchange: Any = SimpleNamespace(
        reading=SimpleNamespace(aside=aside),
        fetcher=SimpleNamespace(fetch=fetch),
        hold=held.append,
    )
    attached = Attached(None)
    attached.image(URL, is_url=True)
    attached.image(URL + "2", is_url=True)
    await attached.read(exchange)
    assert held == [len(data)] * 2 and list(attached.files.values()) == [data]


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "10.0.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0",
        "224.0.0.1", "240.0.0.1", "::1", "::", "fe80::1%eth0", "fc00::1", "ff02::1",
        "::ffff:127.0.0.1", "::ffff:93.184.215.14", "64:ff9b::7f00:1", "2002:7f00:1::", "nonsense",
    ],
)  # fmt: skip
async def test_an_address_within_is_never_connected_to(host: Host, address: str) -> None:
    assert "not a public one" in await why(fetcher(address))
    assert "not a public one" in await why(fetcher(PUBLIC, address))
    assert not host.reached


@pytest.mark.parametrize(
    "url",
    [
        "https://other.example.org/a.png",
        "https://images.example.org.evil.test/a.png",
        "https://evil.test#images.example.org",
        "https://images.example.org@evil.test/",
        "https://user:secret@images.example.org/",
        "https://images.example.org:8443/",
        "http://images.example.org/a.png",
        "ftp://images.example.org/a.png",
        "file:///etc/passwd",
        "//images.example.org/a.png",
        "https://[::1]/a.png",
        "https://images.example.org:99999999/",
        "https://images.example.org/" + "a" * 5000,
        "https://",
        "",
    ],
)
async def test_other_addresses_are_not_looked_up(host: Host, url: str) -> None:
    await why(fetcher(PUBLIC), url)
    assert not host.reached


async def test_without_a_list_nothing_is_fetched(host: Host) -> None:
    assert "fetches nothing" in await why(fetcher(PUBLIC, hosts=()))
    assert not host.reached


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (b"HTTP/1.1 302 Found\r\nLocation: https://127.0.0.1/\r\n\r\n", "redirects"),
        (b"HTTP/1.1 404 Not Found\r\n\r\n", "404"),
        (b"HTTP/1.1 200 OK\r\n\r\n" + bytes(10_000_001), "more than 10 MB"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\nshort", "cut off"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", "HTTP/1.0"),
        (b"SSH-2.0-OpenSSH\r\n\r\n", "no HTTP"),
        (b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 20_000 + b"\r\n", "cannot be reached"),
        (b"", "cannot be reached"),
    ],
)
async def test_what_is_no_plain_answer(host: Host, answer: bytes, reason: str) -> None:
    host.answer = answer
    assert reason in await why(fetcher(PUBLIC))
    assert len(host.reached) == 1


async def test_a_host_that_says_nothing_is_left(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetching, "FETCH_S", 0.2)

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    server = await asyncio.start_server(silent, "127.0.0.1", 0)
    host.port = server.sockets[0].getsockname()[1]
    assert "cannot be reached" in await why(fetcher(PUBLIC))
    server.close()
    await server.wait_closed()


def test_hosts_are_named_without_their_addresses() -> None:
    assert GatewayOptions(media_hosts=("images.example.org", "EXAMPLE.org")).media_hosts
    for wrong in ("https://example.org", "example.org:443", "*.example.org", "example.org/a", ""):
        with pytest.raises(InvalidRequestError, match="media_hosts"):
            GatewayOptions(media_hosts=(wrong,))
