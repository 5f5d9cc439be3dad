"""Nobody can hurt a neighbour through the gateway: hostile bodies, headers, names and connections
beside a stream."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from fake_runner import FakeRunner
from fakes import FakeClient, ask
from gateway_client import Api, serve
from governed import until

from llmkit.bridge.client import BridgeClient
from llmkit.bridge.connection import find_connections
from llmkit.bridge.server import BridgeServer
from llmkit.gateway.access.held import Held
from llmkit.gateway.failures import ApiError
from llmkit.gateway.server import place_of
from llmkit.protocol import FinishReason


@pytest.fixture
async def api() -> AsyncIterator[Api]:
    model = FakeClient(runner=FakeRunner(n_ctx=50_000, step_s=0.005))
    bridge = BridgeServer(model)
    async for served in serve(None):
        yield served
    bridge.close()
    model.close()


HOSTILE: dict[str, Callable[[], tuple[str, bytes, int]]] = {
    "nested lists": lambda: ("/v1/chat/completions", b"[" * 15 + b"[[[]],[[]]]," * 200_000, 400),
    "a million lists": lambda: (
        "/v1/chat/completions",
        b'{"messages":[' + b"[]," * 1_000_000 + b"[]]}",
        400,
    ),
    "a million empty messages": lambda: (
        "/v1/chat/completions",
        json.dumps({"messages": [{"role": "user", "content": ""}] * 40_000, "n": 128}).encode(),
        400,
    ),
    "many numbers": lambda: ("/v1/completions", b'{"prompt":[' + b"1," * 2_000_000 + b"1]}", 400),
    "an announced body": lambda: ("/v1/completions", b" " * ((16 << 20) + 1), 413),
    "a huge limit": lambda: ("/v1/responses/x/input_items?limit=" + "9" * 5000, b"", 404),
}


@pytest.mark.parametrize("deed", HOSTILE)
async def test_a_stream_through_the_gateway_beside_hostile_bodies(api: Api, deed: str) -> None:
    path, body, status = HOSTILE[deed]()
    done = asyncio.Event()

    async def stream() -> list[Any]:
        events = await api.events(
            "/v1/completions", {"prompt": "bystander", "max_tokens": 200, "temperature": 0}
        )
        done.set()
        return events

    running = asyncio.create_task(stream())
    await asyncio.sleep(0.05)
    codes = []
    while not (codes and done.is_set()):
        reply = await api.fetch("GET" if not body else "POST", path, body or None)
        codes.append(reply.code)
    events = await running
    assert codes and set(codes) == {status}
    assert (
        events[-1] == "[DONE]"
        and "".join(e["choices"][0]["text"] for e in events[:-1] if e["choices"])
        == FakeRunner().reference(b"bystander", 200).decode()
    )


async def test_no_odd_header_or_query_is_a_500(api: Api) -> None:
    for headers in (
        {"Origin": "http://["},
        {"Origin": "null"},
        {"Origin": "http://evil.com\\@127.0.0.1"},
        {"x-request-id": "\x7f" * 500},
        {"Accept": "\xff"},
    ):
        assert (await api.fetch("GET", "/v1/models", headers=headers)).code in (200, 400, 403)
    for query in (
        "?limit=%ff",
        "?order=%00",
        "?%ff=1",
        "?limit=" + "9" * 5000,
        "?limit=-1",
        "?limit=１",
    ):
        assert (await api.fetch("GET", f"/v1/responses/resp_1/input_items{query}")).code in (
            400,
            404,
        )


async def test_browsers_are_answered_where_they_are_let_in(api: Api) -> None:
    page = {"Origin": "http://localhost:3001"}
    reply = await api.fetch("GET", "/v1/models", headers=page)
    assert (
        reply.headers["Access-Control-Allow-Origin"] == "http://localhost:3001"
        and "Origin" in reply.headers["Vary"]
    )
    asked = await api.fetch(
        "OPTIONS", "/v1/chat/completions", headers={**page, "Access-Control-Request-Method": "POST"}
    )
    assert (
        asked.code == 204
        and "POST" in asked.headers["Access-Control-Allow-Methods"]
        and "authorization" in asked.headers["Access-Control-Allow-Headers"]
    )
    for foreign in ("https://evil.example", "http://evil.com\\@127.0.0.1", "http://["):
        reply = await api.fetch("GET", "/v1/models", headers={"Origin": foreign})
        assert reply.code == 403 and "Access-Control-Allow-Origin" not in reply.headers
        asked = await api.fetch(
            "OPTIONS",
            "/v1/models",
            headers={"Origin": foreign, "Access-Control-Request-Method": "GET"},
        )
        assert "Access-Control-Allow-Origin" not in asked.headers


async def test_names_are_unquoted_once(api: Api) -> None:
    reply = await api.fetch("GET", "/v1/models/a%2541b")
    assert reply.code == 404 and "a%41b" in json.loads(reply.body)["error"]["message"]


async def test_idle_connections_make_way_and_running_streams_go_on() -> None:
    model = FakeClient(runner=FakeRunner(n_ctx=50_000, step_s=0.005))
    bridge = BridgeServer(model)
    async for api in serve(None, most=20):
        port = int(api.url.rsplit(":", 1)[1])
        running = asyncio.create_task(
            api.events("/v1/completions", {"prompt": "stream", "max_tokens": 150})
        )
        await until(lambda: model.runner.batches)
        idle = [socket.create_connection(("127.0.0.1", port)) for _ in range(60)]
        half = [socket.create_connection(("127.0.0.1", port)) for _ in range(30)]
        for sock in half:
            sock.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 100\r\n\r\n{"
            )
        for _ in range(5):
            assert (await api.fetch("GET", "/health")).code == 200, "there is room for who asks"
        assert (await running)[-1] == "[DONE]"
        for sock in idle + half:
            sock.close()
    bridge.close()
    model.close()


async def test_answers_nobody_reads_are_bounded() -> None:
    held = Held(1000)
    held.add("eve", 900)
    with pytest.raises(ApiError) as refused:
        held.add("eve", 200)
    assert refused.value.status == 429 and refused.value.headers["Retry-After"]
    held.add("ann", 900)
    held.add("eve", -900)
    assert held.of("eve") == 0 and held.of("ann") == 900


def test_a_shortage_of_descriptors_is_no_death(
    fake: FakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno
    from pathlib import Path

    server = BridgeServer(fake)
    remote = BridgeClient(server.connection)
    stream = remote.submit(ask("mine", max_tokens=100))

    def exhausted(*_: Any, **__: Any) -> Any:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(Path, "read_bytes", exhausted)
    assert server.connection.is_alive
    monkeypatch.setattr("os.open", exhausted)
    with pytest.raises(OSError):
        find_connections()
    monkeypatch.undo()
    assert (
        server.connection.path.exists()
        and stream.result(30).finish_reason is FinishReason.LENGTH
        and not remote.state.is_gone
    )
    remote.close()
    server.close()


@pytest.mark.parametrize(
    ("address", "place"),
    [
        (("127.0.0.1", 5), "local"),
        (("::1", 5, 0, 0), "local"),
        ("", "local"),
        (("10.0.0.7", 5), "10.0.0.7"),
        (("::ffff:10.0.0.7", 5, 0, 0), "10.0.0.7"),
        (("2001:db8:1:2:aaaa::1", 5, 0, 0), "2001:db8:1:2::/64"),
        (("2001:db8:1:2:bbbb::9", 5, 0, 0), "2001:db8:1:2::/64"),
        (("fe80::1%eth0", 5, 0, 2), "fe80::/64"),
    ],
)
def test_an_ipv6_host_has_one_place_for_all_its_addresses(address: Any, place: str) -> None:
    assert place_of(address) == place
