"""The gateway of a user's server through a real JupyterHub's proxy: requests, sockets, pages in a
browser that is logged in at the hub, and who is let in."""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit

import pytest
import websocket
from browser_page import browser, drawn
from fakes import wait_for
from hub_server import Hub, UserServer
from playwright.sync_api import Browser, Page, expect
from test_socket_jupyter import FAKE, connect, frame, until

__all__ = ["browser"]  # a fixture

LOAD = "import llmkit; llm = llmkit.load('smollm2', n_ctx=512, n_slots=2)"
HOLD_FAKE = FAKE.format(tests=str(Path(__file__).parent))
# Cat may use ann's server, which knows the address that people have for it.
CONFIG = """
c.JupyterHub.public_url = c.JupyterHub.bind_url
c.JupyterHub.load_roles.append(
    {"name": "guests", "scopes": ["access:servers!user=ann"], "users": ["cat"]}
)
"""
ASK = {"messages": [{"role": "user", "content": "What is the capital of France?"}]}


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    hub = Hub(tmp_path_factory.mktemp("hub"), ("ann", "bob", "cat"), lambda: CONFIG)
    yield hub
    hub.stop()


@pytest.fixture
def ann(hub: Hub) -> UserServer:
    """Ann's server. Her notebook holds the embedded model and a fake one, the newer."""
    server = hub.spawn("ann")
    if not server.kernels:
        kernel = server.kernel()
        kernel.run(LOAD)
        kernel.run(HOLD_FAKE)
    return server


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """Faults of scripts and refused requests fail the test."""
    page = browser.new_page()
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("response", lambda r: errors.append(f"{r.status} {r.url}") if r.status > 399 else None)
    yield page
    page.context.close()
    assert not errors, errors


def run(server: UserServer, code: str) -> str:
    """In the notebook. Nobody has answered pings on its old socket, which may be closed by now."""
    (kernel,) = server.kernels
    kernel.close()
    kernel.connect()
    return kernel.run(code)


def log_in(page: Page, hub: Hub, user: str) -> None:
    page.goto(f"{hub.url}/hub/login?next=%2Fhub%2Ftoken")
    page.get_by_label("Username").fill(user)
    page.get_by_label("Password").fill("any")
    page.get_by_role("button", name="Sign in").click()
    page.wait_for_url("**/hub/token")


def status(server: UserServer, path: str, **headers: str) -> int:
    request = urllib.request.Request(server.url + path, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=30) as reply:
            return int(reply.status)
    except urllib.error.HTTPError as error:
        error.close()
        return error.code


@pytest.mark.model
@pytest.mark.parametrize(
    "header", ["Authorization: Bearer ", "Authorization: token ", "x-api-key: "]
)
def test_the_users_token_opens_it(ann: UserServer, header: str) -> None:
    name, _, scheme = header.partition(": ")
    body = json.dumps({**ASK, "model": "smollm2", "max_tokens": 12, "temperature": 0}).encode()
    url, headers = f"{ann.url}/llmkit/v1/chat/completions", {name: scheme + ann.token}
    with urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=60) as reply:
        answer = json.load(reply)
    assert answer["model"] == "smollm2" and answer["choices"][0]["message"]["content"]
    assert answer["usage"]["completion_tokens"] == 12


def test_the_servers_own_token_is_its_owners(hub: Hub, ann: UserServer) -> None:
    """As programs in her terminals and notebooks find it."""
    token = run(ann, "import os; print(os.environ['JUPYTERHUB_API_TOKEN'])").strip()
    listed = ann.request("GET", "/llmkit/v1/models", token=token)["data"]
    assert {model["id"] for model in listed} >= {"smollm2", "fake"}


@pytest.mark.model
def test_the_notebook_says_the_proxys_address(ann: UserServer) -> None:
    said = run(ann, "e = llm.serve(); print(e.url, e.in_jupyter, e.api_key)").split()
    assert said[:2] == [f"{ann.url}/llmkit/v1", "True"]
    assert ann.request("GET", "/llmkit/v1/models", token=said[2])["data"]


def test_a_stream_arrives_as_it_is_made_and_ends_with_its_client(ann: UserServer) -> None:
    def running() -> list[Any]:
        return ann.request("GET", "/llmkit/status")["requests"]

    wait_for(lambda: not running())
    target = urlsplit(ann.url)
    connection = http.client.HTTPConnection(str(target.hostname), target.port, timeout=60)
    body = {**ASK, "model": "fake", "max_tokens": 4900, "temperature": 0, "stream": True}
    headers = {"Authorization": f"Bearer {ann.token}", "Content-Type": "application/json"}
    path = f"{target.path}/llmkit/v1/chat/completions"
    with contextlib.closing(connection):
        connection.request("POST", path, json.dumps(body), headers)
        reply = connection.getresponse()
        assert reply.status == 200 and reply.getheader("Content-Type") == "text/event-stream"
        assert reply.readline().startswith(b"data: {")
        assert [each["route"] for each in running()] == ["POST /v1/chat/completions"]
        reply.close()
    wait_for(lambda: not running())


def test_a_socket_of_the_user(ann: UserServer) -> None:
    ws = connect(ann)
    assert frame(ws)["models"] == ["fake", "smollm2"]
    ws.ping(b"there?")
    opcode, data = ws.recv_data(control_frame=True)
    assert (opcode, data) == (websocket.ABNF.OPCODE_PONG, b"there?")
    ask = {"type": "send", "content": "hi", "settings": {"max_tokens": 300, "temperature": 0}}
    ws.send(json.dumps({**ask, "model": "fake"}))
    turn = until(ws, "turn")[-1]["turn"]
    first = until(ws, "delta")[-1]
    ws.sock.close()  # lost, not ended
    key = base64.urlsafe_b64encode(ann.token.encode()).decode().rstrip("=")
    again = connect(ann, header=[], subprotocols=["llmkit.chat", f"llmkit.key.{key}"])
    frame(again)
    again.send(json.dumps({"type": "resume", "turn": turn, "after": first["seq"]}))
    frames = until(again, "end")
    rest = "".join(f["text"] for f in frames if f["type"] == "delta")
    assert len(rest) < 300 and first["text"] + rest == frames[-1]["message"]["content"]
    again.send(json.dumps({**ASK, "model": "fake", "max_tokens": 3}))
    assert len(list(iter(again.recv, "[DONE]"))) >= 3
    again.close()


def test_use_over_a_socket_is_activity(hub: Hub, ann: UserServer) -> None:
    """So that nobody's server is culled during a chat."""
    ws = connect(ann)
    frame(ws)
    asked = datetime.now(UTC)
    ws.send(json.dumps({**ASK, "model": "fake", "max_tokens": 900}))  # use is noted each second
    assert len(list(iter(ws.recv, "[DONE]"))) > 1
    ws.close()

    def last() -> datetime:
        return datetime.fromisoformat((hub.server("ann") or {})["last_activity"])

    wait_for(lambda: last() >= asked, 60)


@pytest.mark.parametrize("who", ["bob", "a stranger", "nobody"])
def test_others_are_refused(hub: Hub, ann: UserServer, who: str) -> None:
    token = {"bob": lambda: hub.token("bob"), "a stranger": lambda: "0" * 32}.get(who, str)()
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    for path in ("/llmkit/v1/models", "/llmkit/", "/llmkit/status", "/llmkit/v1/sessions"):
        assert status(ann, path, **headers) in (401, 403), path
    with pytest.raises(websocket.WebSocketBadStatusException) as caught:
        connect(ann, header=[f"{name}: {value}" for name, value in headers.items()])
    assert caught.value.status_code in (401, 403)


def test_a_token_for_something_else_is_refused(hub: Hub, ann: UserServer) -> None:
    narrow = hub.token("ann", ["read:users!user"])
    assert status(ann, "/llmkit/v1/models", Authorization=f"Bearer {narrow}") in (401, 403)


def test_a_guest_may_chat_but_neither_unload_nor_read_along(hub: Hub, ann: UserServer) -> None:
    cat = hub.token("cat")
    for token, title in ((cat, "cat's"), (ann.token, "ann's")):
        ann.request("POST", "/llmkit/v1/sessions", {"title": title}, token)
    body = {**ASK, "model": "fake", "max_tokens": 3}
    assert ann.request("POST", "/llmkit/v1/chat/completions", body, cat)["choices"]
    with pytest.raises(urllib.error.HTTPError) as caught:
        ann.request("POST", "/llmkit/admin/models/unload", {"model": "fake"}, cat)
    assert caught.value.code == 403
    caught.value.close()
    seen = [s["title"] for s in ann.request("GET", "/llmkit/v1/sessions", token=cat)["data"]]
    assert seen == ["cat's"]


def test_pages_link_to_what_the_proxy_serves(ann: UserServer) -> None:
    for page in ("/llmkit", "/llmkit/", "/llmkit/chat", "/llmkit/docs"):
        request = urllib.request.Request(
            ann.url + page, headers={"Authorization": f"Bearer {ann.token}"}
        )
        with urllib.request.urlopen(request) as reply:
            text = reply.read().decode()
        links = re.findall(r'(?:src|href)="([^"#]+)', text)
        assert links and not re.search(r"(?:127\.0\.0\.1|localhost)", text)
        for link in links:
            url = urljoin(ann.url + page, link)
            assert url.startswith(f"{ann.url}/llmkit/"), link
            path = url.removeprefix(ann.url)
            assert status(ann, path, Authorization=f"Bearer {ann.token}") == 200, link


@pytest.mark.browser
def test_the_chat_page_with_the_hubs_login(hub: Hub, ann: UserServer, page: Page) -> None:
    log_in(page, hub, "ann")
    page.goto(f"{ann.url}/llmkit/chat")
    page.get_by_label("Message", exact=True).fill("What is the capital of France?")
    page.keyboard.press("Enter")
    answer = page.locator(".message.assistant .prose")
    expect(answer).to_contain_text(re.compile(r"\w"), timeout=60_000)
    page.keyboard.press("Escape")
    expect(page.get_by_text("Stopped before its end.")).to_be_visible()
    drawn(page)
    said = answer.inner_text()
    page.reload()
    expect(answer).to_have_text(said)


@pytest.mark.browser
def test_the_sidebar_of_jupyterlab(hub: Hub, ann: UserServer, page: Page) -> None:
    log_in(page, hub, "ann")
    page.goto(f"{ann.url}/lab")
    page.get_by_role("tab", name="Models").click(timeout=60_000)
    panel = page.get_by_role("region", name="Models")
    expect(panel.get_by_role("heading", name="fake")).to_be_visible()
    panel.get_by_role("button", name="Copy base URL").click()
    expect(panel.get_by_role("status")).to_contain_text(f"{ann.url}/llmkit/v1")
    with page.expect_popup() as opened:
        panel.get_by_role("button", name="Open chat with fake").click()
    expect(opened.value.get_by_role("button", name="Model: fake, ready")).to_be_visible()
    panel.get_by_role("button", name="Unload fake").click()
    page.get_by_role("dialog").get_by_role("button", name="Unload").click()
    expect(panel.get_by_role("heading", name="fake")).to_have_count(0)
    run(ann, HOLD_FAKE)  # for the next test


def test_a_socket_ends_with_its_server(hub: Hub, ann: UserServer) -> None:
    ws = connect(ann)
    frame(ws)
    hub.stop_server("ann")
    with contextlib.suppress(websocket.WebSocketConnectionClosedException):
        while ws.recv_data(control_frame=True)[0] != websocket.ABNF.OPCODE_CLOSE:
            pass
    ws.close()
    assert status(ann, "/llmkit/v1/models", Authorization=f"Bearer {ann.token}") in (424, 503)
