"""A hub's service and its visitors without a real hub: bodies that nobody wants, what pages of the
same origin cannot do, and addresses where no hub is."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import re
from collections.abc import AsyncIterator

import pytest
from gateway_client import Api
from tornado import httpserver, web
from tornado.netutil import bind_sockets

from llmkit.errors import InvalidRequestError
from llmkit.gateway.access import hub_opening
from llmkit.gateway.access.edge import Edge
from llmkit.gateway.access.hub_login import HubApi
from llmkit.gateway.access.hub_opening import HubAccess, HubProxies
from llmkit.gateway.access.hub_tokens import HubGoneError, NoHubError
from llmkit.gateway.app import Gateway, make_app, make_server
from llmkit.gateway.directory import EngineDirectory
from llmkit.settings.hub import HubOptions
from llmkit.settings.hub_place import HubPlace
from llmkit.settings.quotas import Quotas

SCOPE = "access:services!service=llmkit"
ANN = {"kind": "user", "name": "ann", "groups": [], "scopes": [SCOPE]}
PREFIX = "/services/llmkit"


@contextlib.asynccontextmanager
async def hub_that_says(status: int, body: str) -> AsyncIterator[HubPlace]:
    """What answers at the hub's address: always the same."""

    class Same(web.RequestHandler):
        def get(self) -> None:
            self.set_status(status)
            self.finish(body)

    server = httpserver.HTTPServer(web.Application([(r"/.*", Same)], log_function=lambda _: None))
    sockets = bind_sockets(0, "127.0.0.1")
    server.add_sockets(sockets)
    url = f"http://127.0.0.1:{sockets[0].getsockname()[1]}/hub/api"
    try:
        yield HubPlace.of({"JUPYTERHUB_API_URL": url, "JUPYTERHUB_API_TOKEN": "secret"})
    finally:
        server.stop()
        await server.close_all_connections()


class Service(Api):
    def __init__(self, port: int, access: HubAccess) -> None:
        super().__init__(f"http://127.0.0.1:{port}{PREFIX}")
        self.port, self.access = port, access


@pytest.fixture
async def service() -> AsyncIterator[Service]:
    async with hub_that_says(200, json.dumps(ANN)) as place:
        edge = Edge()
        access = HubAccess(place, HubOptions(), Quotas(), edge)
        app = make_app(
            Gateway(EngineDirectory()),
            access.users,
            edge,
            base_path=place.prefix,
            visitors=access.visitors,
            rules=access.visitors.rules(),
        )
        server = make_server(app, edge=edge)
        sockets = bind_sockets(0, "127.0.0.1")
        server.add_sockets(sockets)
        yield Service(sockets[0].getsockname()[1], access)
        server.stop()
        await server.close_all_connections()


HUGE = "Content-Length: 400000000"


async def answer(service: Service, *lines: str) -> tuple[str, str, str]:
    """Status line, headers and body of the answer to a request of which only the head is sent."""
    reader, writer = await asyncio.open_connection("127.0.0.1", service.port)
    writer.write("\r\n".join([*lines, "Host: hub", "", ""]).encode())
    async with asyncio.timeout(30):
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        length = re.search(r"Content-Length: (\d+)", head)
        body = await reader.readexactly(int(length[1]) if length else 0)
    writer.close()
    status, _, headers = head.partition("\r\n")
    return status, headers, body.decode()


@pytest.mark.parametrize("announced", [HUGE, "Transfer-Encoding: chunked"])
@pytest.mark.parametrize(
    ("line", "status"),
    [
        ("POST {}/login", 405),
        ("GET {}/login", 400),
        ("POST {}/oauth_callback", 405),
        ("PUT {}/logout", 405),
        ("BREW {}/login", 405),
        ("POST {}/ws", 405),
        ("GET {}/v1/chat/ws", 426),
    ],
)
async def test_no_body_is_waited_for(
    service: Service, line: str, status: int, announced: str
) -> None:
    said, _, body = await answer(service, f"{line.format(PREFIX)} HTTP/1.1", announced)
    assert said.split()[1] == str(status) and json.loads(body)["error"]["message"]


async def test_a_handshake_has_no_body(service: Service) -> None:
    lines = ("Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Version: 13", HUGE)
    _, _, body = await answer(service, f"GET {PREFIX}/ws HTTP/1.1", *lines)
    assert "A handshake has no body" in body


async def test_what_a_page_of_the_same_origin_can_do(service: Service) -> None:
    cookies = service.access.visitors.cookies
    cookie = {"Cookie": f"{cookies.name}={cookies.signed(cookies.name, 'token')}"}
    shown = {**cookie, "Accept": "text/html", "Sec-Fetch-Mode": "navigate"}
    page = await service.fetch("GET", "/chat", headers={**shown, "Sec-Fetch-Dest": "document"})
    assert page.code == 200 and page.headers["Cache-Control"] == "no-store"
    assert page.headers["Cross-Origin-Opener-Policy"] == "noopener-allow-popups"
    assert "Set-Cookie" not in page.headers, "a cookie could be read from any path"
    proof = re.search(r'data-proof="(\w+)"', page.body.decode())
    assert proof and proof[1] == cookies.xsrf("token")
    for path, more in (
        ("/chat", {"Sec-Fetch-Dest": "iframe"}),
        ("/chat", {"Sec-Fetch-Mode": "cors", "Sec-Fetch-Dest": "empty"}),
        ("/v1/models", {"Sec-Fetch-Dest": "document"}),  # an opener would read it
        ("/v1/models", {"Sec-Fetch-Dest": "iframe"}),
    ):
        refused = await service.fetch("GET", path, headers={**shown, **more})
        assert refused.code == 403 and b"not enough" in refused.body, (path, more)
    proven = {**cookie, "X-XSRFToken": proof[1]}
    assert (await service.fetch("GET", "/v1/models", headers=proven)).code == 200


async def test_a_login_leads_back_to_the_whole_address(service: Service) -> None:
    line = f"GET {PREFIX}/chat?a=b&c=%20 HTTP/1.1"
    status, headers, _ = await answer(service, line, "Accept: text/html")
    assert status.split()[1] == "302"
    assert f"Location: {PREFIX}/login?next={PREFIX}/chat%3Fa%3Db%26c%3D%2520\r\n" in headers
    login = await service.fetch("GET", "/login?next=%ff")
    assert login.code == 400 and json.loads(login.body)["error"]["message"]


@pytest.mark.parametrize(
    ("status", "body"),
    [(200, "<html>a page</html>"), (200, "{}"), (200, "[1]"), (404, "nothing"), (404, "{}")],
)
async def test_what_is_no_hub_is_told_from_one_that_is_away(
    status: int, body: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with hub_that_says(status, body) as place:
        with pytest.raises(NoHubError, match=r"\$JUPYTERHUB_API_URL, http://127"):
            await HubApi(place).owner("token")
        with caplog.at_level(logging.WARNING):
            await HubAccess(place, HubOptions(), Quotas(), Edge()).check()
    (record,) = caplog.records
    assert record.levelname == "ERROR" and "is not a hub's API" in record.message
    with pytest.raises(HubGoneError) as away:
        await HubApi(place).owner("token")
    assert not isinstance(away.value, NoHubError)


async def test_a_hub_with_a_fault_is_away() -> None:
    async with hub_that_says(502, "<html>") as place:
        with pytest.raises(HubGoneError) as away:
            await HubApi(place).owner("token")
        assert not isinstance(away.value, NoHubError)


def of_hub(url: str = "http://192.0.2.7:8081/hub/api") -> HubPlace:
    return HubPlace.of({"JUPYTERHUB_API_URL": url, "JUPYTERHUB_API_TOKEN": "secret"})


@pytest.mark.parametrize(
    ("peer", "said", "client"),
    [
        ("127.0.0.1", "203.0.113.9", "203.0.113.9"),
        ("192.0.2.7", "6.6.6.6, 203.0.113.9", "203.0.113.9"),
        ("192.0.2.7", "6.6.6.6, 127.0.0.1", "127.0.0.1"),
        ("10.0.0.5", "203.0.113.9", "10.0.0.5"),
        ("203.0.113.8", "203.0.113.9", "203.0.113.8"),
    ],
)
def test_only_the_hub_s_own_proxy_says_who_a_client_is(peer: str, said: str, client: str) -> None:
    """Connecting from a private network is not enough, and no more than its last word counts."""
    proxies = HubProxies(of_hub(), HubOptions(), ())
    assert proxies.client(peer, {"X-Forwarded-For": said}) == client
    assert proxies.trusts(peer) is (client != peer)


def test_whose_headers_are_believed_is_a_setting(caplog: pytest.LogCaptureFixture) -> None:
    named = HubProxies(of_hub(), HubOptions(hub_proxies=("10.0.0.0/8",)), ())
    assert named.client("10.0.0.5", {"X-Forwarded-For": "6.6.6.6, 10.1.1.1"}) == "10.1.1.1"
    assert not caplog.records
    for i in range(3):
        assert named.client(f"127.0.0.{i}", {"X-Forwarded-For": "6.6.6.6"}) == f"127.0.0.{i}"
    [record] = caplog.records
    assert "127.0.0.0 sends" in record.message and "not among hub_proxies" in record.message
    all_of_them = HubProxies(of_hub(), HubOptions(), ("192.0.2.7", "10.0.0.0/8"))
    chain = {"X-Forwarded-For": "203.0.113.9, 10.1.1.1"}
    assert all_of_them.client("192.0.2.7", chain) == "203.0.113.9"
    caplog.clear()
    assert all_of_them.client("127.0.0.1", chain) == "127.0.0.1"
    [record] = caplog.records  # the setting that counts
    assert "not among trusted_proxies" in record.message and "hub_proxies" not in record.message
    with pytest.raises(InvalidRequestError, match="hub_proxies"):
        HubOptions(hub_proxies=("proxy.example.org",))


def test_a_hub_whose_name_is_not_found_is_no_proxy() -> None:
    proxies = HubProxies(of_hub("http://no-such-host.invalid:8081/hub/api"), HubOptions(), ())
    assert proxies.trusts("127.0.0.1") and not proxies.trusts("10.0.0.1")


async def test_a_hub_that_moves_is_found_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its name is looked up again; while that fails, the last address counts."""
    now, num_asked = ["192.0.2.7"], 0

    def look_up(host: str, *_: object, **__: object) -> list[tuple[object, ...]]:
        nonlocal num_asked
        assert host == "hub"
        num_asked += 1
        return [(0, 0, 0, "", (address, 0)) for address in now]

    monkeypatch.setattr(hub_opening.socket, "getaddrinfo", look_up)
    monkeypatch.setattr(hub_opening, "LOOK_UP_S", 0.01)  # a minute, really
    place = of_hub("http://hub:8081/hub/api")
    proxies = HubProxies(place, HubOptions())
    assert proxies.trusts("192.0.2.7")
    now = ["192.0.2.8", "2001:db8::8"]
    keeping = asyncio.ensure_future(proxies.keep())
    while not proxies.trusts("192.0.2.8"):
        await asyncio.sleep(0.01)
    assert proxies.trusts("2001:db8::8") and proxies.trusts("127.0.0.1")
    assert not proxies.trusts("192.0.2.7")
    now, before = [], num_asked
    while num_asked < before + 3:
        await asyncio.sleep(0.01)
    assert proxies.trusts("192.0.2.8")
    keeping.cancel()
    async with asyncio.timeout(30):  # nothing to look up
        await HubProxies(place, HubOptions(hub_proxies=("::1",))).keep()
        await HubProxies(place, HubOptions(), ("::1",)).keep()
