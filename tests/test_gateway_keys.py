"""Whom a gateway lets in: keys, web pages and public addresses."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from fakes import FakeClient
from gateway_client import CHAT, Api, is_error, serve

from llmkit.errors import InvalidRequestError
from llmkit.gateway.access.keys import Keys

KEY = "secret-key"


@pytest.fixture
async def closed(model: FakeClient) -> AsyncIterator[Api]:
    async for api in serve(KEY):
        yield api


async def test_keys(closed: Api) -> None:
    assert (await closed.post("/v1/chat/completions", CHAT))[0] == 200
    assert (await Api(closed.url).fetch("GET", "/health")).code == 200
    for headers in (
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": f"Basic {KEY}"},
        {"x-api-key": "no"},
        {"Authorization": "Bearer "},
    ):
        for method, path in (
            ("GET", "/v1/models"),
            ("POST", "/v1/chat/completions"),
            ("GET", "/v1/nothing"),
            ("GET", "/"),
        ):
            error = is_error(
                await Api(closed.url).fetch(
                    method, path, None if method == "GET" else CHAT, headers
                ),
                401,
            )
            assert error["code"] == "invalid_api_key" and error["type"] == "authentication_error"
    assert (
        await Api(closed.url).fetch("GET", "/v1/models", headers={"x-api-key": KEY})
    ).code == 200
    page = await Api(closed.url).fetch("GET", "/", headers={"Accept": "text/html,*/*"})
    assert page.code == 401 and b"data-locked" in page.body and b"fake" not in page.body, (
        "a browser is asked for the key, and told nothing"
    )
    assert b"data-locked" not in (await closed.fetch("GET", "/")).body


async def test_a_stranger_is_refused_before_the_body(closed: Api) -> None:
    host, port = closed.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(
        b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 16000000\r\n\r\n"
    )
    assert (await asyncio.wait_for(reader.readline(), 30)).split()[1] == b"401"
    writer.close()


async def test_without_a_key_web_pages_are_kept_out(api: Api) -> None:
    assert (
        is_error(await api.fetch("GET", "/v1/models", headers={"Host": "evil.example"}), 403)[
            "code"
        ]
        == "forbidden_host"
    )
    for origin in ("http://evil.example", "null", "http://127.0.0.1.evil.example"):
        assert (
            is_error(await api.fetch("GET", "/v1/models", headers={"Origin": origin}), 403)["code"]
            == "forbidden_origin"
        )
    for origin in ("http://localhost:8888", "http://127.0.0.1", "http://[::1]:99"):
        assert (await api.fetch("GET", "/v1/models", headers={"Origin": origin})).code == 200


def test_a_public_address_needs_a_key() -> None:
    for host in ("0.0.0.0", "::", "192.168.1.5", "example.org", ""):
        with pytest.raises(InvalidRequestError, match="without a key"):
            Keys(None, host)
    for host in ("127.0.0.1", "::1", "localhost", "127.8.8.8"):
        Keys(None, host)
    with pytest.raises(InvalidRequestError):
        Keys("", "0.0.0.0")
    Keys(KEY, "0.0.0.0")
