"""llmkit as a service of a real JupyterHub behind its real proxy: who is let in, how much each may
use, what nobody sees of others, and browsers that log in."""

from __future__ import annotations

import itertools
import json
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import websocket
from browser_page import browser
from fake_runner import FakeRunner
from fakes import FakeClient, wait_for
from hub_service import CACHE_S, ROBOT, USERS, HubWithModels, Reply, StandsAlone, Visitor, ask
from playwright.sync_api import Browser, expect
from test_jupyterhub import log_in

from llmkit.bridge.server import BridgeServer
from llmkit.protocol import GenerationRequest

__all__ = ["browser"]  # a fixture

LIMIT = 60
SETTINGS = f"""
[quota.default]
requests_per_minute = 1000

[quota.groups.students]
tokens_per_day = {LIMIT}
concurrent = 3
"""
CHAT = {"messages": [{"role": "user", "content": "hello there"}]}


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubWithModels]:
    hub = HubWithModels(tmp_path_factory.mktemp("hub"), ["echo"], SETTINGS)
    yield hub
    hub.stop()
    assert not hub.tracebacks(), hub.output()


@pytest.fixture(scope="module")
def tokens(hub: HubWithModels) -> dict[str, str]:
    return {user: hub.token(user) for user in USERS}


def chat(hub: HubWithModels, token: str, **more: Any) -> Reply:
    return ask("POST", f"{hub.service}/v1/chat/completions", {**CHAT, **more}, token)


# Who is let in


def test_the_scope_opens_it(hub: HubWithModels, tokens: dict[str, str]) -> None:
    models = f"{hub.service}/v1/models"
    for header in (
        {"Authorization": f"Bearer {tokens['ann']}"},
        {"Authorization": f"token {tokens['ann']}"},
        {"x_api_key": tokens["ann"]},
    ):
        assert ask("GET", models, **header).json["data"][0]["id"] == "echo"
    asked_for = hub.token("ann", ["access:services!service=llmkit"])
    for token in (tokens["dan"], asked_for, ROBOT):
        assert ask("GET", models, token=token).status == 200
    for token in (None, "garbage", "x" * 5000, tokens["ann"] + "0"):
        refused = ask("GET", models, token=token)
        assert refused.status == 401 and refused.error["code"] == "invalid_api_key"
    for token in (tokens["cat"], hub.token("ann", ["access:services!service=alone"])):
        refused = ask("GET", models, token=token)
        assert refused.status == 403 and refused.error["code"] == "insufficient_scope"
        assert "access:services!service=llmkit" in refused.error["message"]
        assert "c.JupyterHub.load_roles" in refused.error["message"]
    assert ask("GET", f"{hub.service}/health").status == 200, "whoever asks"


def test_a_revoked_token_is_refused_once_the_cache_is_old(hub: HubWithModels) -> None:
    made = hub.request("POST", "/users/ann/tokens", {"note": "soon gone"})
    models = f"{hub.service}/v1/models"
    assert ask("GET", models, token=made["token"]).status == 200
    hub.request("DELETE", f"/users/ann/tokens/{made['id']}")
    revoked = time.monotonic()
    wait_for(lambda: ask("GET", models, token=made["token"]).status == 401, 20)
    assert time.monotonic() - revoked < CACHE_S + 15, "a loaded machine is slow"


def test_admins_may_more(hub: HubWithModels, tokens: dict[str, str]) -> None:
    pull = ("POST", f"{hub.service}/admin/storage/pull", {"name": "no name"})
    assert ask(*pull, tokens["dan"]).status == 400
    for user in ("ann", "bob"):
        assert ask(*pull, tokens[user]).status == 403
        assert ask("GET", f"{hub.service}/usage/all", token=tokens[user]).status == 403
    assert ask("GET", f"{hub.service}/usage/all", token=tokens["dan"]).status == 200
    assert ask("GET", f"{hub.service}/status", token=tokens["dan"]).json["models"][0]["pid"]


# How much


def test_usage_is_the_sum_of_what_was_said(hub: HubWithModels, tokens: dict[str, str]) -> None:
    fay = tokens["fay"]
    before = ask("GET", f"{hub.service}/usage", token=fay).json["total"]
    said = [chat(hub, fay, max_tokens=n).json["usage"] for n in (1, 2, 5)]
    embedded = ask("POST", f"{hub.service}/v1/embeddings", {"input": "one two"}, fay)
    said.append(embedded.json["usage"])
    usage = ask("GET", f"{hub.service}/usage", token=fay).json
    assert usage["caller"] == "hub user fay" and usage["limits"]["rate"] == "1000/minute"
    for field in ("prompt_tokens", "completion_tokens", "total_tokens"):
        made = usage["total"][field] - before[field]
        assert made == sum(each.get(field, 0) for each in said)
    assert usage["total"]["requests"] - before["requests"] == 4
    every = ask("GET", f"{hub.service}/usage/all", token=tokens["dan"]).json["data"]
    rows = [row for row in every if row["caller"] == "hub user fay"]
    assert sum(row["total_tokens"] for row in rows) == usage["total"]["total_tokens"]
    assert {row["model"] for row in rows} == {"echo"}
    assert ask("GET", f"{hub.service}/usage?days=0", token=tokens["ann"]).status == 400


def test_a_quota_ends_with_its_window(hub: HubWithModels, tokens: dict[str, str]) -> None:
    used = ask("GET", f"{hub.service}/usage", token=tokens["eve"]).json["window"]["used"]
    while used < LIMIT:
        reply = chat(hub, tokens["eve"])
        assert reply.headers["x-ratelimit-remaining-tokens"] == str(LIMIT - used)
        used += reply.json["usage"]["total_tokens"]
    refused = chat(hub, tokens["eve"])
    assert refused.status == 429 and refused.error["code"] == "insufficient_quota"
    assert 86_400 - 60 < int(refused.headers["Retry-After"]) <= 86_400 + 1800
    usage = ask("GET", f"{hub.service}/usage", token=tokens["eve"]).json
    window = usage["window"]
    assert window["used"] == used and window["left"] == 0 and window["free_at"]
    assert window["free_at"] in refused.error["message"]
    assert usage["groups"] == ["students"]
    assert usage["limits"]["concurrent"] == 3 and usage["limits"]["rate"] == "1000/minute"
    assert chat(hub, tokens["bob"], max_tokens=1).status == 200, "another member's is another"


# What nobody sees of others


def test_nobody_reads_what_is_another_s(hub: HubWithModels, tokens: dict[str, str]) -> None:
    ann, bob = tokens["ann"], tokens["bob"]
    session = ask("POST", f"{hub.service}/v1/sessions", {"title": "bob's"}, bob).json["id"]
    stored = ask("POST", f"{hub.service}/v1/responses", {"input": "x", "store": True}, bob)
    for path in (f"sessions/{session}", f"responses/{stored.json['id']}"):
        assert ask("GET", f"{hub.service}/v1/{path}", token=bob).status == 200
        assert ask("GET", f"{hub.service}/v1/{path}", token=ann).status == 404
    assert ask("GET", f"{hub.service}/v1/sessions", token=ann).json["data"] == []
    status = ask("GET", f"{hub.service}/status", token=ann)
    assert {row["caller"] for row in status.json["callers"]} == {"hub user ann"}
    assert status.json["requests"] == [] and status.json["actions"] == []
    assert [model["pid"] for model in status.json["models"]] == [None]
    assert all(m["pids"] == [] and m["num_used"] is None for m in status.json["offered"])
    ask("GET", f"{hub.service}/metrics", token=ann)
    assert b"bob" not in ask("GET", f"{hub.service}/metrics", token=ann).body


# One that stands alone


class Told(FakeClient):
    """Knows whose each request is."""

    def __init__(self) -> None:
        super().__init__(runner=FakeRunner(n_slots=2, n_ctx=600, step_s=0.002))
        self.callers: dict[str, str] = {}
        self.seen: list[GenerationRequest] = []

    def submit(self, request: GenerationRequest) -> Any:
        self.callers[request.request_id] = request.caller
        self.seen.append(request)
        return super().submit(request)


@pytest.fixture
def told() -> Iterator[Told]:
    client = Told()
    bridge = BridgeServer(client)
    yield client
    bridge.close()
    client.close()


@pytest.fixture
def alone(hub: HubWithModels, told: Told, tmp_path: Path) -> Iterator[StandsAlone]:
    made = StandsAlone(hub, tmp_path, 'cache_scope = "group"')
    yield made
    made.stop()
    assert "Traceback" not in made.output(), made.output()


def test_few_requests_do_not_wait_for_many(
    hub: HubWithModels, alone: StandsAlone, told: Told, tokens: dict[str, str]
) -> None:
    """Ann has 100 requests and bob 5: from his first token to his last, both get the same."""
    answers: list[Reply] = []

    def send(user: str) -> None:
        body = {"prompt": f"a question of {user}", "max_tokens": 100, "temperature": 0}
        answers.append(ask("POST", f"{alone.direct}/v1/completions", body, tokens[user]))

    def start(user: str, count: int) -> list[threading.Thread]:
        threads = [threading.Thread(target=send, args=(user,)) for _ in range(count)]
        for thread in threads:
            thread.start()
        return threads

    many = start("ann", 100)
    wait_for(lambda: len(told.seen) >= 50, 60)
    few = start("bob", 5)
    for thread in few:
        thread.join(60)
    steps = told.engine.steps()
    for thread in many:
        thread.join(120)
    assert [reply.status for reply in answers] == [200] * 105
    served = {"hub user ann": 0, "hub user bob": 0}
    of_bob = [i for i, s in enumerate(steps) if any(_of(told, c, "bob") for c in s.chunks)]
    meanwhile = steps[of_bob[0] : of_bob[-1] + 1]
    for chunk in itertools.chain.from_iterable(step.chunks for step in meanwhile):
        served[told.callers[str(chunk.request)]] += chunk.tokens
    ann, bob = served.values()
    assert bob >= 500
    assert (ann + bob) ** 2 / (2 * (ann**2 + bob**2)) >= 0.95, served
    assert {r.cache_scope for r in told.seen} == {None, "hub group students"}


def _of(told: Told, chunk: Any, user: str) -> bool:
    return told.callers.get(str(chunk.request)) == f"hub user {user}"


def test_while_the_hub_is_away(
    hub: HubWithModels, alone: StandsAlone, told: Told, tokens: dict[str, str], tmp_path: Path
) -> None:
    models = f"{alone.direct}/v1/models"
    assert ask("GET", f"{alone.url}/v1/models", token=tokens["ann"]).status == 200, "by the proxy"
    assert ask("GET", models, token=tokens["ann"]).status == 200
    hub.pause()
    try:
        time.sleep(CACHE_S)
        assert ask("GET", models, token=tokens["ann"]).status == 200, "she was known"
        refused = ask("GET", models, token=tokens["bob"])
        assert refused.status == 503 and refused.error["code"] == "hub_unavailable"
        assert refused.headers["Retry-After"]
    finally:
        hub.resume()
    wait_for(lambda: ask("GET", models, token=tokens["bob"]).status == 200, 30)


# Browsers


def test_a_browser_logs_in_and_out(hub: HubWithModels) -> None:
    visitor, home = Visitor(hub), f"{hub.service}/usage"
    page = visitor.log_in("ann", home)
    assert page.status == 200 and f"<!-- {home} -->" in page.body.decode()
    text = page.body.decode()
    assert "hub user ann" in text and "Log out" in text and "Everybody's" not in text
    policy = str(page.headers["Content-Security-Policy"])
    assert "frame-ancestors 'none'" in policy
    path = "/services/llmkit/"
    session, proof = visitor.cookie("service-llmkit", path), visitor.proof()
    (kept,) = [c for c in visitor.jar if c.name == "service-llmkit"]
    assert session and kept.has_nonstandard_attr("HttpOnly")
    assert not any("oauth-state" in cookie.name for cookie in visitor.jar)
    status, body = f"{hub.service}/status", json.dumps(CHAT).encode()
    ours = {"X_XSRFToken": proof}
    assert visitor.get(status).status == 403, "a page of another user's server reads nothing"
    assert visitor.get(status, **ours).status == 200
    url = f"{hub.service}/v1/chat/completions"
    assert visitor.post(url, body).status == 403
    assert visitor.post(url, body, X_XSRFToken=proof[::-1]).status == 403
    assert visitor.post(url, body, **ours).status == 200
    foreign = visitor.post(url, body, **ours, Origin="https://evil.example")
    assert foreign.status == 403 and foreign.error["code"] == "forbidden_origin"
    assert visitor.post(url, body, **ours, Origin=hub.url).status == 200
    ended = visitor.get(f"{hub.service}/logout", Accept="text/html")
    assert ended.status == 200
    assert not [c for c in visitor.jar if c.name == "service-llmkit"]
    assert "<form" in visitor.get(home, Accept="text/html").body.decode(), "the hub's login"
    visitor.jar.set_cookie(kept)
    wait_for(lambda: visitor.get(status, **ours).status == 401, 20)


def test_logins_that_are_not_ours(hub: HubWithModels, tokens: dict[str, str]) -> None:
    visitor = Visitor(hub)
    refused = visitor.log_in("cat", f"{hub.service}/chat")
    assert refused.status == 403, "the hub itself lets nobody in without the scope"
    callback = f"{hub.service}/oauth_callback"
    for query in ("", "?code=x&state=y", "?error=access_denied&error_description=no"):
        answer = ask("GET", callback + query)
        assert answer.status == 403 and answer.error["message"]
    for wanted in ("//evil.example/", "https://evil.example/", "/hub/", "/services/llmkit/\\e"):
        asked = ask("GET", f"{hub.service}/login?next={urllib.parse.quote(wanted, safe='')}")
        assert asked.status == 302
        location = urllib.parse.urlsplit(str(asked.headers["Location"]))
        assert location.path == "/hub/api/oauth2/authorize"
        assert "evil" not in str(asked.headers)
    forged = {"Cookie": f"service-llmkit={tokens['ann']}"}
    assert ask("GET", f"{hub.service}/usage", Accept="text/html", **forged).status == 302


def test_a_socket_of_a_browser(hub: HubWithModels) -> None:
    """A cookie alone opens none: any page of this hub could have sent it."""
    visitor = Visitor(hub)
    visitor.log_in("ann", f"{hub.service}/chat")
    path = "/services/llmkit/"
    proof = visitor.proof()
    cookie = f"service-llmkit={visitor.cookie('service-llmkit', path)}"
    url = f"{hub.service}/v1/chat/ws".replace("http", "ws", 1)
    with pytest.raises(websocket.WebSocketBadStatusException) as refused:
        websocket.create_connection(url, cookie=cookie, origin=hub.url, timeout=20)
    assert refused.value.status_code == 403
    with pytest.raises(websocket.WebSocketBadStatusException):
        websocket.create_connection(
            f"{url}?_xsrf={proof}", cookie=cookie, origin="http://evil.example", timeout=20
        )
    ws = websocket.create_connection(
        f"{url}?_xsrf={proof}",
        cookie=cookie,
        origin=hub.url,
        subprotocols=["llmkit.chat"],
        timeout=20,
    )
    assert json.loads(ws.recv())["models"] == ["echo"]
    ws.close()


OPENS = """async url => {
  const opened = window.open(url);
  for (let tries = 0; tries < 1200; tries++) {
    await new Promise(resolve => setTimeout(resolve, 50));
    try {
      const proof = opened.document.documentElement?.dataset.proof;
      if (proof) return proof;
    } catch (error) {
      return error.name;
    }
  }
}"""


@pytest.mark.browser
def test_a_page_that_opens_one_of_ours_reads_nothing(hub: HubWithModels, browser: Browser) -> None:
    """One of another user's server has the same origin as the hub's own."""
    page = browser.new_page()
    log_in(page, hub, "dan")
    page.goto(f"{hub.service}/chat")
    assert page.locator("html[data-proof]").count() == 1
    page.goto(f"{hub.url}/hub/token")
    with page.context.expect_page() as opened:
        assert page.evaluate(OPENS, f"{hub.service}/chat") == "SecurityError"
    expect(opened.value.locator("html[data-proof]")).to_have_count(1)
    page.context.close()


@pytest.mark.browser
def test_the_pages(hub: HubWithModels, browser: Browser) -> None:
    page = browser.new_page()
    faults: list[str] = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("response", lambda r: faults.append(f"{r.status} {r.url}") if r.status > 399 else None)
    log_in(page, hub, "dan")
    reply = page.goto(f"{hub.service}/")
    while reply is not None and reply.status == 503:  # a busy hub answers late: "try again"
        faults.clear()
        page.wait_for_timeout(1000)
        reply = page.goto(f"{hub.service}/")
    assert reply is not None and reply.ok, page.inner_text("body")[:1000]
    page.get_by_label("Message", exact=True).fill("Good morning")
    page.keyboard.press("Enter")
    expect(page.locator(".message.assistant .prose")).to_contain_text("Echo: Good morning")
    page.get_by_role("link", name="Usage").click()
    expect(page.get_by_role("heading", name="Everybody's")).to_be_visible()
    expect(page.get_by_role("cell", name="hub user dan").first).to_be_visible()
    page.get_by_role("link", name="Log out").click()
    page.wait_for_url("**/hub/**")
    page.context.close()
    assert not faults, faults
