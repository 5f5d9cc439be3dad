"""`llmkit.attach` over HTTP: whose request it is, what is hidden, limits, keys, a hub's token."""

from __future__ import annotations

import contextlib
import json
import time
import urllib.error
import urllib.request
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import pytest
from access_client import entry
from fake_runner import FakeRunner
from fakes import FakeClient, ask, wait_for
from remote_gateway import ANN, BOB, OWNER, RemoteGateway, by, gateway, remote, slow

import llmkit
from llmkit.bridge import inquiries, over_http, wire
from llmkit.bridge.server import BridgeServer
from llmkit.cluster.address import Address, hub_address
from llmkit.cluster.refusals import refusal
from llmkit.cluster.remote import RemoteEngine
from llmkit.errors import (
    AccessError,
    EngineError,
    EngineGoneError,
    InvalidRequestError,
    LimitError,
    ModelNotFoundError,
    QueueFullError,
)
from llmkit.protocol import (
    GenerationRequest,
    Inquiry,
    ListRequests,
    ListSlots,
    ListSteps,
    Resume,
    Unload,
)

__all__ = ["gateway", "remote", "slow"]  # fixtures


class Shown(FakeClient):
    """Also tells what its engine does."""

    def inquire(self, inquiry: Inquiry[Any]) -> Any:
        look = over_http.look_of(inquiry.question)
        if look is None:
            return super().inquire(inquiry)
        future: Future[Any] = Future()
        future.set_result(getattr(self.engine, look)())
        return future


def test_who_calls_is_the_key_s_to_say(
    gateway: RemoteGateway, slow: FakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Caller, weight and cached prefixes are the identity's; others' prefixes are never hit."""
    seen: list[GenerationRequest] = []
    submit = slow.submit
    monkeypatch.setattr(slow, "submit", lambda request: (seen.append(request), submit(request))[1])
    ann, bob, owner = by(gateway, ANN), by(gateway, BOB), by(gateway, OWNER)
    forged = replace(
        ask("a long enough prompt to be cached, of ann's", max_tokens=2),
        caller="key bob",
        cache_scope="key bob",
        weight=9.0,
        priority=-5,
    )
    for client in (ann, bob, owner):
        assert client.submit(forged).result(30).usage.cached_tokens == 0
    assert [r.caller for r in seen] == ["key ann", "key bob", "key owner"]
    assert all(r.cache_scope is None and r.weight == 1 for r in seen)
    assert [r.priority for r in seen] == [0, 0, -5], "administrators may go first"
    assert ann.submit(replace(forged, request_id="r-again")).result(30).usage.cached_tokens > 20
    for change in ({"keep_on_disk": True}, {"resume": Resume((97,))}):
        with pytest.raises(AccessError, match="administrators"):
            ann.submit(replace(ask("x"), **change)).result(30)  # type: ignore[arg-type]
        assert owner.submit(replace(ask("x"), **change)).result(30)  # type: ignore[arg-type]
    for client in (ann, bob, owner):
        client.close()


def test_nobody_sees_what_others_do() -> None:
    client = Shown(runner=FakeRunner(n_ctx=5000, step_s=0.002))
    bridge = BridgeServer(client)
    gateway = RemoteGateway([entry("ann"), entry("bob")])
    ann, bob = by(gateway, ANN), by(gateway, BOB)
    assert ann.description.path == "fake.gguf"
    same = ask("the very same question", max_tokens=4000)
    mine, theirs = ann.submit(same), bob.submit(same)  # of one id, too
    wait_for(lambda: client.engine.stats.num_running == 2)

    def look(question: Any) -> Any:
        return ann.inquire(Inquiry("q", question)).result(30)

    (row,) = look(ListRequests())
    assert (row.request, row.caller) == (same.request_id, "key ann")
    slots = look(ListSlots())
    assert {s.request for s in slots} == {same.request_id, None}
    assert not any(s.shared or (s.tokens and s.request is None) for s in slots)
    assert {c.request for s in look(ListSteps()) for c in s.chunks} == {same.request_id}
    mine.close()
    theirs.close()
    ann.close()
    bob.close()
    gateway.stop()
    bridge.close()
    client.close()


def test_limits_apply(slow: FakeClient, tmp_path: Any) -> None:
    """A batch waits for its own requests; rates and budgets are said; tokens are counted."""
    gateway = RemoteGateway(
        [entry("ann", tokens_per_day=1000), entry("bob", rate="5/minute")],
        max_concurrent=3,
        max_tokens_limit=50,
        db_url=f"sqlite:///{tmp_path}/llmkit.db",
        shared=True,
    )
    llm = llmkit.attach(gateway.url, key=ANN)
    many = llm.generate([f"Number {i}" for i in range(40)], max_tokens=4)
    assert [c.usage.completion_tokens for c in many] == [4] * 40
    used = sum(c.usage.total_tokens for c in many)
    assert len(llm.generate("x", max_tokens=4000).tokens) == 50, "the guards' limit"
    while used < 2000:
        try:
            used += llm.generate("x", max_tokens=50).usage.total_tokens
        except LimitError as error:
            assert "budget of 1000 tokens a day" in str(error) and used > 900
            break
    else:
        raise AssertionError("the budget was not held")
    other = llmkit.attach(gateway.url, key=BOB)
    for _ in range(20):
        other.kv_map()  # looks cost nothing
    assert [other.tokenize("a") for _ in range(3)] == [[97]] * 3, "as POST /tokenize does"
    with pytest.raises(LimitError, match="5 requests"):
        for _ in range(3):
            other.generate("x", max_tokens=1)
    llm.unload()
    other.unload()
    gateway.stop()


def test_a_full_queue_is_waited_for_or_said(monkeypatch: pytest.MonkeyPatch) -> None:
    client = FakeClient(runner=FakeRunner(n_ctx=5000, step_s=0.002), max_waiting=1)
    bridge = BridgeServer(client)
    gateway = RemoteGateway()
    engine = by(gateway, "")
    running = []
    for i in range(4):
        running.append(client.submit(ask("x", max_tokens=4000)))
        wait_for(lambda i=i: client.engine.stats.num_running == i + 1)  # type: ignore[misc]
    running.append(client.submit(ask("x", max_tokens=4000)))
    monkeypatch.setattr("llmkit.cluster.room.PATIENCE_S", 0.0)
    with pytest.raises(QueueFullError):
        engine.submit(ask("y")).result(30)
    monkeypatch.setattr("llmkit.cluster.room.PATIENCE_S", 60.0)
    waits = engine.submit(ask("y"))
    time.sleep(0.1)
    for stream in running:
        stream.close()
    assert waits.result(30).usage.completion_tokens == 8
    engine.close()
    gateway.stop()
    bridge.close()
    client.close()


def test_keys(gateway: RemoteGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AccessError, match=r"give key=, or set \$LLMKIT_API_KEY") as wrong:
        llmkit.attach(gateway.url, key="wrong")
    assert isinstance(wrong.value, PermissionError)
    monkeypatch.setenv("LLMKIT_API_KEY", ANN)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    for url in (gateway.url, gateway.url + "/", gateway.url + "/v1"):
        llmkit.attach(url).unload()


def test_the_hub(gateway: RemoteGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its address and token are in the environment of a server that it has started."""
    for name in ("JUPYTERHUB_API_TOKEN", "JUPYTERHUB_PUBLIC_HUB_URL", "JUPYTERHUB_API_URL"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(InvalidRequestError, match="LLMKIT_HUB_URL is not set"):
        llmkit.attach("hub")
    monkeypatch.setenv("JUPYTERHUB_API_URL", "http://hub:8081/hub/api")
    with pytest.raises(InvalidRequestError, match=r"c.Spawner.environment"):
        llmkit.attach("hub")
    monkeypatch.setenv("LLMKIT_HUB_URL", gateway.url + "/")
    with pytest.raises(InvalidRequestError, match="JUPYTERHUB_API_TOKEN"):
        llmkit.attach("hub")
    monkeypatch.setenv("JUPYTERHUB_API_TOKEN", BOB)
    for where in ("hub", "hub:fake"):
        llm = llmkit.attach(where)
        assert llm.generate("hi", max_tokens=2).usage.completion_tokens == 2
        llm.unload()
    with pytest.raises(ModelNotFoundError, match="'qwen'"):
        llmkit.attach("hub:qwen")
    monkeypatch.setenv("JUPYTERHUB_API_TOKEN", "another")
    with pytest.raises(AccessError, match="control panel"):
        llmkit.attach("hub")
    found = hub_address({"JUPYTERHUB_PUBLIC_HUB_URL": "https://h/jupyter/hub/"}, "t")
    assert found.base == "https://h/jupyter/services/llmkit"
    said = b'{"error": {"message": "no scope", "code": "insufficient_scope"}}'
    refused = refusal(Address.of("http://h/services/models", "t", is_hub=True), 403, {}, said)
    assert isinstance(refused, AccessError)
    assert "access:services!service=models" in str(refused)
    assert "c.Spawner.server_token_scopes" in str(refused) and "no scope" in str(refused)


@pytest.mark.parametrize("is_hub", [False, True])
def test_what_a_proxy_refuses_is_not_taken_for_another_server(is_hub: bool) -> None:
    address = Address.of("http://h/services/models", "t", is_hub=is_hub)

    def refused(status: int, body: bytes = b"<html>", *, attaching: bool = False) -> Exception:
        return refusal(address, status, {}, body, attaching=attaching)

    for attaching in (False, True):
        for status in (413, 431):
            error = refused(status, attaching=attaching)
            assert isinstance(error, InvalidRequestError)
            assert "larger than a proxy before http://h/services/models lets" in str(error)
        for status in (500, 501):
            error = refused(status, attaching=attaching)
            assert isinstance(error, EngineError) and "no llmkit" not in str(error)
            assert isinstance(error, EngineGoneError) is attaching
            assert f"status {status}" in str(error)
    for status in (302, 400, 404, 405):
        assert "no llmkit" in str(refused(status, attaching=True))
        error = refused(status)
        assert isinstance(error, EngineGoneError) and "no llmkit" not in str(error)
        assert f"status {status}" in str(error)
    own = refused(413, b'{"error": {"message": "over 16 MiB", "code": null, "param": "body"}}')
    assert isinstance(own, InvalidRequestError) and str(own) == "over 16 MiB"


def call(url: str, body: bytes | None, key: str = ANN, **headers: str) -> tuple[int, bytes]:
    """(status, body) of a request as anybody may send it."""
    names = {"Authorization": f"Bearer {key}", **headers}
    request = urllib.request.Request(url, body, {k.replace("_", "-"): v for k, v in names.items()})
    with contextlib.suppress(ConnectionError):
        try:
            with urllib.request.urlopen(request, timeout=20) as reply:
                return reply.status, reply.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()
    return 0, b""


HOSTILE = [
    b"", b"{", b"null", b"[]", b"{}", b"\xff", b"[" * 200_000, b'{"request_id": 3}',
    b'{"request_id": "a", "prompt": "x", "messages": []}',
    b'{"request_id": "a", "prompt": [-1]}', b'{"request_id": "a", "prompt": [1e99]}',
    b'{"request_id": "a", "prompt": [%d]}' % 10**30, b'{"request_id": "a", "prompt": [true]}',
    b'{"request_id": "a", "prompt": "x", "n": 100000}',
    b'{"request_id": "a", "prompt": "x", "sampling": {"temperature": NaN}}',
    b'{"request_id": "a", "prompt": "x", "sampling": {"bogus": 1}}',
    b'{"request_id": "a", "prompt": "x", "sampling": 7}',
    b'{"request_id": "a", "kind": "shutdown", "question": {}}',
    b'{"request_id": "a", "kind": "tokenize", "question": []}',
    b'{"request_id": "a", "inputs": []}', b'{"request_id": "a", "inputs": [[-1]]}',
    b'{"request_id": "a", "inputs": "text"}',
    b'{"request_id": "a", "inputs": [%s""]}' % (b'"x",' * 3000),
    b'{"request_id": "a", "template_options": ' + b'{"a":' * 500 + b"1" + b"}" * 501,
]  # fmt: skip


def test_hostile_bodies(gateway: RemoteGateway, remote: RemoteEngine) -> None:
    for route in ("submit", "embed", "inquire"):
        for body in HOSTILE:
            status, said = call(f"{gateway.url}/engine/{route}?model=fake", body)
            assert status == 400 and json.loads(said)["error"]["message"], (route, body[:80], said)
    unload = inquiries.encode_inquiry(Inquiry("q", Unload()))
    for key in (ANN, OWNER):
        status, said = call(f"{gateway.url}/engine/inquire", unload, key)
        assert status == 403 and b"/admin/models/unload" in said
    for route, body in (
        ("submit", {"request_id": "x" * 257, "prompt": "x", "n": 1024}),
        ("embed", {"request_id": "x" * 257, "inputs": ["x"]}),
        ("inquire", {"request_id": "x" * 257, "kind": "slots", "question": {}}),
    ):
        status, said = call(f"{gateway.url}/engine/{route}", json.dumps(body).encode())
        assert status == 400 and b"256" in said, (route, said)
    assert call(f"{gateway.url}/engine/submit", b"x" * (17 << 20))[0] in (413, 0)
    assert call(f"{gateway.url}/engine?look=everything", None)[0] == 400
    assert call(f"{gateway.url}/engine", None, key="")[0] == 401
    long = replace(ask("hi", max_tokens=2), request_id="x" * 250)
    assert remote.submit(long).result(30).request_id == "x" * 250


def test_versions_are_compared(
    gateway: RemoteGateway, remote: RemoteEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    status, said = call(f"{gateway.url}/engine", None, x_llmkit_wire="4 0.1.0")
    assert status == 400 and b"llmkit 0.1.0" in said
    assert call(f"{gateway.url}/engine", None, x_llmkit_wire="\xff" * 50)[0] == 400
    assert call(f"{gateway.url}/engine", None, x_llmkit_wire=f"{wire.VERSION + 9} 9.9")[0] == 200
    asked = json.dumps({"request_id": "a", "prompt": "x", "sampling": {"newer": 1}}).encode()
    assert b"another version" in call(f"{gateway.url}/engine/submit", asked)[1]
    monkeypatch.setattr(over_http, "told", lambda: "4 0.1.0")  # of the client
    with pytest.raises(EngineGoneError, match=r"llmkit 0\.1\.0"):
        by(gateway, ANN)
