"""The edge of a server: proxies' headers, CORS, security headers, sizes, slow clients."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import time

import pytest
from access_client import exchange_raw, served
from fakes import FakeClient
from gateway_client import CHAT, Api, is_error
from hypothesis import given, settings
from hypothesis import strategies as st
from tornado.iostream import IOStream, UnsatisfiableReadError

from llmkit.errors import InvalidRequestError
from llmkit.gateway.access.cors import Cors
from llmkit.gateway.access.proxies import Proxies, is_loopback, place
from llmkit.gateway.heads import MAX_HEAD_BYTES, MAX_LINE_BYTES, Heads
from llmkit.gateway.server import BoundedServer
from llmkit.settings.entries import KeyEntry

PROXIES = Proxies(["10.0.0.0/8", "127.0.0.1", "fd00::/8"])
PAGE = "https://chat.example.org"
KEY = KeyEntry(name="ann", key="secret-key")


@pytest.mark.parametrize(
    ("peer", "headers", "client"),
    [
        ("203.0.113.9", {"X-Forwarded-For": "1.2.3.4"}, "203.0.113.9"),
        ("10.1.1.1", {}, "10.1.1.1"),
        ("10.1.1.1", {"X-Forwarded-For": "203.0.113.9"}, "203.0.113.9"),
        ("10.1.1.1", {"X-Forwarded-For": "1.1.1.1, 203.0.113.9, 10.9.9.9"}, "203.0.113.9"),
        ("10.1.1.1", {"X-Forwarded-For": "10.2.2.2, 10.3.3.3"}, "10.2.2.2"),
        ("::ffff:10.1.1.1", {"X-Forwarded-For": "203.0.113.9"}, "203.0.113.9"),
        ("10.1.1.1", {"X-Forwarded-For": "203.0.113.9:4711"}, "203.0.113.9"),
        ("10.1.1.1", {"X-Forwarded-For": "[2001:db8::7]:4711"}, "2001:db8::7"),
        ("10.1.1.1", {"X-Forwarded-For": "2001:db8::7"}, "2001:db8::7"),
        ("10.1.1.1", {"X-Forwarded-For": "203.0.113.9, garbage, 10.9.9.9"}, "10.9.9.9"),
        ("10.1.1.1", {"X-Forwarded-For": ""}, "10.1.1.1"),
        ("10.1.1.1", {"X-Forwarded-For": ", ,"}, "10.1.1.1"),
        (
            "10.1.1.1",
            {"Forwarded": 'for=1.1.1.1, For="[2001:db8::7]:80";proto=https'},
            "2001:db8::7",
        ),
        ("10.1.1.1", {"Forwarded": "for=_hidden"}, "10.1.1.1"),
        ("10.1.1.1", {"Forwarded": "for=unknown"}, "10.1.1.1"),
        ("10.1.1.1", {"Forwarded": "proto=https"}, "10.1.1.1"),
        ("10.1.1.1", {"X-Real-IP": "203.0.113.9"}, "203.0.113.9"),
        ("fd00::1", {"X-Real-IP": "203.0.113.9"}, "203.0.113.9"),
        ("10.1.1.1", {"X-Real-IP": "6.6.6.6", "X-Forwarded-For": "203.0.113.9"}, "203.0.113.9"),
        ("10.1.1.1", {"Forwarded": "for=6.6.6.6", "X-Forwarded-For": "203.0.113.9"}, "203.0.113.9"),
    ],
)
def test_the_client_is_the_last_address_that_is_no_proxy(
    peer: str, headers: dict[str, str], client: str
) -> None:
    assert PROXIES.client(peer, headers) == client
    assert Proxies().client(peer, headers) == peer, "nobody is believed unless named"


@settings(deadline=None)
@given(st.text(max_size=300), st.sampled_from(["X-Forwarded-For", "Forwarded", "X-Real-IP"]))
def test_whatever_stands_in_the_headers_is_an_address_or_nothing(text: str, name: str) -> None:
    place(PROXIES.client("10.1.1.1", {name: text}))
    assert PROXIES.client("10.1.1.1", {name: text + ", 203.0.113.9"}) in (
        "203.0.113.9",
        "10.1.1.1",
    ), "what a client writes before the proxy's entry changes nothing"


def test_endless_headers_of_proxies_are_cheap() -> None:
    began = time.process_time()
    for _ in range(100):
        PROXIES.client("10.1.1.1", {"X-Forwarded-For": "10.0.0.1," * 100_000})
    assert time.process_time() - began < 10


def test_addresses_count_by_network() -> None:
    assert place("2001:db8:1:2:3:4:5:6") == place("2001:db8:1:2::9") == "2001:db8:1:2::/64"
    assert place("2001:db8:1:3::9") != place("2001:db8:1:2::9")
    assert place("::ffff:203.0.113.9") == place("203.0.113.9") == "203.0.113.9"
    assert place("127.9.9.9") == place("::1") == place("") == "local"
    assert is_loopback("[::1]") and not is_loopback("127.0.0.1.evil.example")


@pytest.mark.parametrize(
    "wrong", ["*", "10.0.0.1/8", "10.0.0.256", "proxy.example.org", "", "::1/129"]
)
def test_a_proxy_that_is_no_address_is_an_error(wrong: str) -> None:
    with pytest.raises(InvalidRequestError, match="trusted_proxies"):
        Proxies([wrong])


def test_a_near_miss_is_named() -> None:
    with pytest.raises(InvalidRequestError, match=r"10\.0\.0\.0/8\?"):
        Proxies(["10.0.0.1/8"])


async def test_keyless_callers_are_told_apart_by_address(model: FakeClient) -> None:
    async with served(rate="2/minute", trusted_proxies=("127.0.0.1",)) as api:

        async def status(address: str | None) -> int:
            headers = {} if address is None else {"X-Forwarded-For": address}
            return (await api.fetch("POST", "/v1/chat/completions", CHAT, headers)).code

        assert [await status("203.0.113.9") for _ in range(3)] == [200, 200, 429]
        assert await status("203.0.113.10") == 200
        assert await status("6.6.6.6, 203.0.113.9") == 429, "an invented first address is nothing"
        assert [await status(f"2001:db8::{i}") for i in range(3)] == [200, 200, 429]
        assert await status(None) == 200


async def test_without_a_trusted_proxy_headers_change_nothing(model: FakeClient) -> None:
    async with served(rate="2/minute") as api:
        codes = [
            (
                await api.fetch(
                    "POST", "/v1/completions", {"prompt": "x"}, {"X-Forwarded-For": f"1.1.1.{i}"}
                )
            ).code
            for i in range(3)
        ]
        assert codes == [200, 200, 429]


async def test_cors_is_off_unless_an_origin_is_named(model: FakeClient) -> None:
    ask = {"Origin": PAGE, "Access-Control-Request-Method": "POST"}
    async with served([KEY]) as api:
        reply = await api.by("secret-key").fetch("GET", "/v1/models", headers={"Origin": PAGE})
        assert reply.code == 200 and "Access-Control-Allow-Origin" not in reply.headers
        assert reply.headers["Vary"] == "Origin"
        local = {"Origin": "http://localhost:3000"}
        reply = await api.by("secret-key").fetch("GET", "/v1/models", headers=local)
        assert "Access-Control-Allow-Origin" not in reply.headers
        preflight = await api.fetch("OPTIONS", "/v1/models", headers=ask)
        assert preflight.code == 401 and "Access-Control-Allow-Origin" not in preflight.headers


async def test_an_origin_that_is_named_may_read(model: FakeClient) -> None:
    async with served([KEY], cors_origins=(PAGE, "http://localhost:80")) as api:
        ann = api.by("secret-key")
        reply = await ann.fetch("GET", "/v1/models", headers={"Origin": PAGE})
        assert reply.headers["Access-Control-Allow-Origin"] == PAGE
        assert reply.headers["Vary"] == "Origin"
        assert "retry-after" in reply.headers["Access-Control-Expose-Headers"]
        assert "x-ratelimit-reset-tokens" in reply.headers["Access-Control-Expose-Headers"]
        assert "Access-Control-Allow-Credentials" not in reply.headers
        assert reply.headers["Cross-Origin-Resource-Policy"] == "cross-origin"
        refused = await api.fetch("GET", "/v1/models", headers={"Origin": PAGE})
        assert refused.code == 401 and refused.headers["Access-Control-Allow-Origin"] == PAGE, (
            "a page must be able to read why it was refused"
        )
        for origin in (
            PAGE + ".evil.org",
            PAGE.replace("https", "http"),
            PAGE + ":8443",
            PAGE.upper() + "x",
            "null",
            "https://evil.org",
            "http://localhost:3000",
        ):
            reply = await ann.fetch("GET", "/v1/models", headers={"Origin": origin})
            assert "Access-Control-Allow-Origin" not in reply.headers, origin
        reply = await ann.fetch("GET", "/v1/models", headers={"Origin": "http://localhost"})
        assert reply.headers["Access-Control-Allow-Origin"] == "http://localhost"
        ask = {
            "Origin": PAGE,
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization,x-stainless-os",
        }
        preflight = await api.fetch("OPTIONS", "/v1/chat/completions", headers=ask)
        assert preflight.code == 204 and preflight.body == b""
        assert preflight.headers["Access-Control-Allow-Methods"] == "POST, OPTIONS"
        assert preflight.headers["Access-Control-Allow-Headers"] == "authorization,x-stainless-os"
        assert "Access-Control-Request-Headers" in preflight.headers["Vary"]
        evil = await api.fetch(
            "OPTIONS", "/v1/chat/completions", headers={**ask, "Origin": "https://evil.org"}
        )
        assert "Access-Control-Allow-Origin" not in evil.headers
        assert "Access-Control-Allow-Methods" not in evil.headers


async def test_a_star_is_every_website_but_only_with_keys(model: FakeClient) -> None:
    async with served([KEY], cors_origins=("*",)) as api:
        reply = await api.by("secret-key").fetch("GET", "/v1/models", headers={"Origin": "null"})
        assert reply.headers["Access-Control-Allow-Origin"] == "*"
    with pytest.raises(InvalidRequestError, match="every website"):
        async with served(cors_origins=("*",)):
            pass


async def test_without_a_key_a_named_page_may_call(model: FakeClient) -> None:
    async with served(cors_origins=(PAGE,)) as api:
        assert (await api.fetch("GET", "/v1/models", headers={"Origin": PAGE})).code == 200
        for origin in ("https://evil.org", PAGE + ":1"):
            error = is_error(await api.fetch("GET", "/v1/models", headers={"Origin": origin}), 403)
            assert error["code"] == "forbidden_origin"


@pytest.mark.parametrize(
    "wrong",
    [
        "chat.example.org",
        PAGE + "/",
        PAGE + "/app",
        "https://*.example.org",
        "null",
        "",
        "https://",
    ],
)
def test_what_is_no_origin_is_an_error(wrong: str) -> None:
    with pytest.raises(InvalidRequestError, match="cors_origins"):
        Cors([wrong])


async def test_every_answer_has_security_headers(model: FakeClient) -> None:
    async with served([KEY]) as api:
        ann = api.by("secret-key")
        replies = [
            await ann.fetch("GET", "/v1/models"),
            await ann.fetch("GET", "/nothing"),
            await ann.fetch("POST", "/v1/chat/completions", {**CHAT, "stream": True}),
            await ann.fetch("GET", "/v1/models?x=%ff"),
            await ann.fetch("PROPFIND", "/v1/models"),
            await api.fetch("GET", "/v1/models"),
            await api.fetch("GET", "/", headers={"Accept": "text/html"}),
            await api.fetch("GET", "/docs"),
        ]
        for reply in replies:
            assert reply.headers["X-Content-Type-Options"] == "nosniff"
            assert reply.headers["Referrer-Policy"] == "no-referrer"
            assert reply.headers["X-Frame-Options"] == "SAMEORIGIN"
            assert "frame-ancestors 'self'" in reply.headers["Content-Security-Policy"]
            assert "default-src 'none'" in reply.headers["Content-Security-Policy"]
            assert reply.headers["Cross-Origin-Resource-Policy"] == "same-origin"
            assert "Strict-Transport-Security" not in reply.headers, "that is for TLS"


async def test_so_many_heads_that_are_too_long_are_drained() -> None:
    """Beyond that a connection is closed at once, so they cost no more descriptors than that."""
    heads, pairs = Heads(most=2), [socket.socketpair() for _ in range(5)]
    inodes = {os.fstat(ours.fileno()).st_ino for ours, _ in pairs}

    def num_open() -> int:
        """Descriptors of ours: others come and go as they like."""
        count = 0
        for fd in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):
                count += os.fstat(int(fd)).st_ino in inodes
        return count

    for ours, _ in pairs:
        stream = IOStream(ours)
        heads.bound(stream)
        stream.close(UnsatisfiableReadError(f"more than {MAX_HEAD_BYTES} bytes"))  # type: ignore[arg-type]
    assert num_open() == 2
    for _, theirs in pairs:
        assert theirs.recv(1000).startswith(b"HTTP/1.1 414 ")
        theirs.close()
    async with asyncio.timeout(30):
        while num_open():
            await asyncio.sleep(0.02)
    assert heads._num_drained == 0


def _head(answer: bytes) -> tuple[int, dict[str, object]]:
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"connection: close" in head.lower()
    return int(head.split()[1]), json.loads(body)["error"]


async def test_heads_that_are_too_long_are_answered(api: Api) -> None:
    port = int(api.url.rpartition(":")[2])
    host = b"Host: 127.0.0.1\r\n"
    line = b"GET /%s HTTP/1.1\r\n" % (b"x" * (MAX_LINE_BYTES + 1))
    reply = await api.fetch("GET", "/" + "x" * (MAX_LINE_BYTES + 1))
    assert is_error(reply, 414)["code"] == "uri_too_long"
    for data, status, code in (
        (b"GET /" + b"x" * (1 << 20), 414, "uri_too_long"),
        (line[:-2] + b"y" * MAX_HEAD_BYTES, 414, "uri_too_long"),
        (b"GET / HTTP/1.1\r\n" + host + b"X: " + b"y" * (1 << 20), 431, "headers_too_large"),
        (b"GET / HTTP/1.1\r\n" + host + b"X: y\r\n" * 20_000 + b"\r\n", 431, "headers_too_large"),
        (
            b"POST /v1/completions HTTP/1.1\r\n" + host + b"Transfer-Encoding: chunked\r\n\r\n"
            b"5;" + b"x" * 5000,
            400,
            "invalid_chunk",
        ),
    ):
        found, error = _head(await exchange_raw(port, data))
        assert (found, error["code"]) == (status, code)
    assert (await api.fetch("GET", "/health")).code == 200
    big = {"X": "y" * (MAX_HEAD_BYTES - 2000)}
    assert (await api.fetch("GET", "/health", headers=big)).code == 200


async def test_clients_that_dribble_are_let_go(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    """A head or a body that comes byte by byte has a deadline as a whole."""
    monkeypatch.setattr("llmkit.gateway.server.HEADER_S", 0.5)
    monkeypatch.setattr("llmkit.gateway.server.BODY_S", 0.5)
    async with served() as slow:

        async def dribble(begin: bytes) -> float:
            began = time.monotonic()
            reader, writer = await asyncio.open_connection("127.0.0.1", slow.port)
            writer.write(begin)
            end = asyncio.ensure_future(reader.read())
            while not end.done() and time.monotonic() - began < 30:
                writer.write(b"a")
                await asyncio.sleep(0.05)
            writer.close()
            await asyncio.gather(end, return_exceptions=True)
            return time.monotonic() - began

        head = b"GET /health HTTP/1.1\r\nX: "
        body = b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 999\r\n\r\n"
        took = await asyncio.gather(*[dribble(each) for each in (head, body) for _ in range(20)])
        assert max(took) < 25
        assert (await slow.fetch("GET", "/health/live")).code == 200


async def test_a_body_beyond_body_mb_is_refused_before_it_is_read(model: FakeClient) -> None:
    async with served(body_mb=0.01) as api:
        error = is_error(await api.fetch("POST", "/v1/completions", b"x" * 20_000), 413)
        assert "10486" in error["message"] or "10485" in error["message"]
        assert (await api.post("/v1/chat/completions", CHAT))[0] == 200
    async with served(body_mb=80) as large:
        prompt = {**CHAT, "user": "x" * (20 << 20)}
        assert (await large.fetch("POST", "/v1/chat/completions", prompt)).code != 413


async def test_who_is_refused_while_sending_gets_the_answer(model: FakeClient) -> None:
    """A client that sends all before it reads, as most do: no reset overtakes the error."""
    async with served([KEY], body_mb=0.01) as api:
        head = b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\n"
        right = head + b"Authorization: Bearer secret-key\r\n"
        body, num_chunks = b"y" * (1 << 16), 300
        chunks = b"".join(b"10000\r\n" + body + b"\r\n" for _ in range(num_chunks))
        whole = b"Content-Length: %d\r\n\r\n" % (len(body) * num_chunks) + body * num_chunks
        for sent, status in (
            (right + whole, 413),
            (right + b"Transfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n", 413),
            (head + whole, 401),
        ):

            def send(data: bytes = sent) -> bytes:
                with socket.create_connection(("127.0.0.1", api.port), timeout=20) as s:
                    s.sendall(data)
                    return b"".join(iter(lambda: s.recv(65536), b""))

            answer = await asyncio.to_thread(send)
            assert answer.startswith(b"HTTP/1.1 %d " % status) and b'"error"' in answer
        assert (await api.by("secret-key").fetch("GET", "/v1/models")).code == 200


async def test_a_trusted_proxy_may_have_all_connections(model: FakeClient) -> None:
    async with served(trusted_proxies=("10.0.0.0/8",)) as api:
        server = api.server
        assert isinstance(server, BoundedServer)
        assert server._is_shared("10.1.2.3") and not server._is_shared("203.0.113.9")
