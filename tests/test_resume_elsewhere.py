"""A running answer moves from one process to another, an engine drains, and nobody outside can say
that an answer was begun."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from typing import Any

import msgspec
import pytest
from fakes import FakeClient, ask, wait_for
from gateway_client import Api, serve
from pausing import hold, let_go
from resuming import Talker, begun, collect, rest, whole

from llmkit.bridge import wire
from llmkit.bridge.client import BridgeClient
from llmkit.bridge.server import BridgeServer
from llmkit.errors import DrainingError, EngineGoneError, InvalidRequestError
from llmkit.llm import LLM
from llmkit.protocol import (
    EmbeddingRequest,
    Inquiry,
    ListSlots,
    Resume,
)


@pytest.fixture
def talker() -> Iterator[FakeClient]:
    client = FakeClient(runner=Talker(n_ctx=200))
    yield client
    client.close()


@pytest.fixture
def bridged(talker: FakeClient) -> Iterator[tuple[BridgeServer, BridgeClient]]:
    server = BridgeServer(talker)
    client = BridgeClient(server.connection)
    yield server, client
    client.close()
    server.close()


def test_from_one_process_to_another(bridged: tuple[BridgeServer, BridgeClient]) -> None:
    """The first engine is lost mid-stream; a reader that joins both parts notices nothing."""
    first = FakeClient(runner=Talker(n_ctx=200, step_s=0.002))
    request = replace(ask("a prompt", max_tokens=150, stop="STOP: no"), show_tokens=True)
    _, expected = whole(bridged[1], request)
    hold([first], 100)
    server = BridgeServer(first)
    client = BridgeClient(server.connection)
    stream = client.submit(replace(request, request_id="moved"))
    deltas, _ = collect(stream, lambda text: server.close("gone") if len(text) > 30 else None)
    assert isinstance(stream.failure, EngineGoneError)
    cut = begun(deltas)
    assert 30 < cut.sent_chars < len(expected.text)
    text = "".join(d.text for d in deltas)
    _, done = rest(bridged[1], request, cut)
    assert text + done.text == expected.text and done.tokens == expected.tokens
    client.close()
    first.close()


def test_a_request_that_is_resumed_crosses_the_wire() -> None:
    request = replace(ask("a"), resume=Resume((1, 2), 3), show_tokens=True)
    body = wire.encode_request(request)
    assert wire.decode_request(body) == request
    told = json.loads(body)
    # An older engine refuses parameters of sampling that it does not know.
    assert "resume" not in told and told["sampling"]["resume"]["tokens"] == [1, 2]
    told["sampling"]["resume"] = {"tokens": [1, -2]}
    with pytest.raises(InvalidRequestError, match="token ids"):
        wire.decode_request(json.dumps(told).encode())
    told["sampling"]["resume"] = {"tokens": "ab"}
    with pytest.raises(msgspec.ValidationError):
        wire.decode_request(json.dumps(told).encode())


def test_news_of_an_older_engine_cannot_be_resumed() -> None:
    packed = msgspec.msgpack.encode([[["r", "text", 2, []]], []])
    (delta,) = [news.delta() for news in wire.unpack(packed, wire.EVENTS).news]
    assert (delta.text, delta.num_tokens, delta.tokens) == ("text", 2, ())


def test_a_drain(talker: FakeClient, bridged: tuple[BridgeServer, BridgeClient]) -> None:
    server, client = bridged
    hold([talker], 5)
    running = client.submit(ask("a", max_tokens=100))
    wait_for(lambda: running.text)
    server.drain(30)
    wait_for(lambda: client.state.phase == "draining")
    assert not client.state.is_gone and "takes nothing new" in str(client.state.reason)
    with pytest.raises(DrainingError, match="ask another"):
        client.submit(ask("b"))
    with pytest.raises(DrainingError):
        client.embed(EmbeddingRequest("e", ("text",)))
    assert client.inquire(Inquiry("i", ListSlots())).result(30) == ()
    late = BridgeClient(server.connection)
    wait_for(lambda: late.state.phase == "draining")
    late._draining = None  # as one that has not heard of it yet
    for stream in late.submit_choices(replace(ask("b"), n=2)):
        with pytest.raises(DrainingError):
            stream.result(30)
    with pytest.raises(DrainingError):
        late.embed(EmbeddingRequest("e", ("text",))).result(30)
    assert not server.is_drained
    let_go([talker])
    assert running.result(30).usage.completion_tokens == 100
    wait_for(lambda: server.is_drained)
    late.close()


# Where it may not come from.


@pytest.fixture
async def api(talker: FakeClient) -> AsyncIterator[Api]:
    bridge = BridgeServer(talker)
    async for api in serve(None):
        yield api
    bridge.close()


ROUTES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "a"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}]},
    "/v1/responses": {"input": "a"},
    "/v1/messages": {"messages": [{"role": "user", "content": "a"}], "max_tokens": 4},
    "/api/generate": {"prompt": "a", "stream": False},
    "/api/chat": {"messages": [{"role": "user", "content": "a"}], "stream": False},
    "/completion": {"prompt": "a", "n_predict": 4},
}


@pytest.mark.parametrize("path", ROUTES)
async def test_no_caller_of_http_can_resume(
    api: Api, talker: FakeClient, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(talker, "submit", lambda request: pytest.fail("it reached the engine"))
    for name, value in (("resume", {"tokens": [97]}), ("show_tokens", True)):
        for more in ({name: value}, {"options": {name: value}}):
            status, said = await api.post(path, {"model": "fake", **ROUTES[path], **more})
            assert status == 400 and ("supported" in str(said)), said


def test_no_keyword_of_a_handle_can_resume(talker: FakeClient) -> None:
    llm = LLM(talker)  # type: ignore[arg-type]
    for name in ("resume", "show_tokens"):
        with pytest.raises(TypeError, match="not a generation parameter"):
            llm.generate("a", **{name: None})
