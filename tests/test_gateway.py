"""The standalone gateway on the fake model: strict shapes, errors on every path, disconnects, keys."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from fakes import FakeClient, FakeRunner, wait_for
from tornado.httpclient import AsyncHTTPClient, HTTPResponse
from tornado.netutil import bind_sockets

from llmkit.bridge.server import BridgeServer
from llmkit.errors import InvalidRequestError
from llmkit.gateway.app import Gateway, make_app, make_server
from llmkit.gateway.auth import Keys
from llmkit.gateway.engines import EngineDirectory

KEY = "secret-key"


@pytest.fixture
def model() -> Iterator[FakeClient]:
    client = FakeClient(runner=FakeRunner(n_ctx=5000))
    bridge = BridgeServer(client)
    yield client
    bridge.close()
    client.close()


class Api:
    def __init__(self, url: str, key: str | None = None) -> None:
        self.url, self.key = url, key

    async def fetch(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> HTTPResponse:
        data = body if body is None or isinstance(body, bytes | str) else json.dumps(body)
        auth = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        return await AsyncHTTPClient(force_instance=True).fetch(
            self.url + path, method=method, body=data, headers={**auth, **(headers or {})}, raise_error=False, allow_nonstandard_methods=True
        )

    async def post(self, path: str, body: Any) -> tuple[int, Any]:
        reply = await self.fetch("POST", path, body)
        return reply.code, json.loads(reply.body)

    async def events(self, path: str, body: dict[str, Any]) -> list[Any]:
        reply = await self.fetch("POST", path, {**body, "stream": True})
        assert reply.code == 200, reply.body
        assert reply.headers["Content-Type"] == "text/event-stream"
        assert reply.headers["Cache-Control"] == "no-cache" and reply.headers["X-Accel-Buffering"] == "no" and reply.headers["x-request-id"]
        blocks = reply.body.decode().split("\n\n")
        assert blocks[-1] == "" and all(b.startswith(("data: ", ": ping")) for b in blocks[:-1])
        return [b[6:] if b == "data: [DONE]" else json.loads(b[6:]) for b in blocks[:-1] if b.startswith("data: ")]


async def serve(key: str | None, most: int = 1000, directory: EngineDirectory | None = None) -> AsyncIterator[Api]:
    directory = directory or EngineDirectory()
    server = make_server(make_app(Gateway(directory), Keys(key, "127.0.0.1")), most)
    sockets = bind_sockets(0, "127.0.0.1")
    server.add_sockets(sockets)
    yield Api(f"http://127.0.0.1:{sockets[0].getsockname()[1]}", key)
    server.stop()
    await server.close_all_connections()
    directory.close()


@pytest.fixture
async def api(model: FakeClient) -> AsyncIterator[Api]:
    async for api in serve(None):
        yield api


@pytest.fixture
async def closed(model: FakeClient) -> AsyncIterator[Api]:
    async for api in serve(KEY):
        yield api


CHAT = {"model": "fake", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 6, "temperature": 0}
CHAT_TEXT = b"[user]hi"


async def test_chat_whole(api: Api, model: FakeClient) -> None:
    code, reply = await api.post("/v1/chat/completions", CHAT)
    assert code == 200 and reply["object"] == "chat.completion" and reply["id"].startswith("chatcmpl-") and reply["model"] == "fake"
    (choice,) = reply["choices"]
    assert choice == {
        "index": 0,
        "message": {"role": "assistant", "content": model.runner.reference(CHAT_TEXT, 6).decode(), "refusal": None},
        "logprobs": None,
        "finish_reason": "length",
    }
    assert reply["usage"]["prompt_tokens"] == 8 and reply["usage"]["total_tokens"] == 14
    assert reply["system_fingerprint"].startswith("llmkit-")


async def test_too_much_to_be_scored(api: Api) -> None:
    for prompts, fine in ((["a" * 4000] * 100, True), (["a" * 4000] * 500, False)):
        code, reply = await api.post("/v1/completions", {"prompt": prompts, "echo": True, "logprobs": 5, "max_tokens": 0})
        assert (code == 200) is fine and (fine or reply["error"]["param"] == "echo")


async def test_a_megabyte_of_faults_is_refused_at_once(api: Api) -> None:
    bodies: list[Any] = [{"messages": [0] * 300_000}, {"messages": [{"role": "user", "content": [0] * 300_000}]}, {**CHAT, **{f"k{i}": 1 for i in range(9000)}}]
    for body in bodies:
        is_error(await api.fetch("POST", "/v1/chat/completions", body), 400)
    assert is_error(await api.fetch("POST", "/v1/chat/completions", {**CHAT, "Temperature": 1}), 400)["param"] == "Temperature"


async def test_null_is_not_given(api: Api) -> None:
    """Clients send null for what they do not use, also for what we do not know."""
    code, _ = await api.post("/v1/chat/completions", {**CHAT, "tools": None, "temperature": None, "response_format": None, "stream": None})
    assert code == 200
    code, _ = await api.post("/v1/chat/completions", {**CHAT, "messages": None})
    assert code == 400


async def test_chat_streamed_in_strict_order(api: Api, model: FakeClient) -> None:
    events = await api.events("/v1/chat/completions", {**CHAT, "stream_options": {"include_usage": True}})
    assert events[-1] == "[DONE]"
    chunks = events[:-1]
    assert len({(c["id"], c["created"], c["model"], c["object"]) for c in chunks}) == 1 and chunks[0]["object"] == "chat.completion.chunk"
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["completion_tokens"] == 6
    assert all(c["usage"] is None for c in chunks[:-1])
    assert chunks[-2]["choices"][0]["delta"] == {} and chunks[-2]["choices"][0]["finish_reason"] == "length"
    assert all(c["choices"][0]["finish_reason"] is None for c in chunks[:-2])
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks[:-1]).encode() == model.runner.reference(CHAT_TEXT, 6)


async def test_without_include_usage_there_is_no_usage(api: Api) -> None:
    events = await api.events("/v1/chat/completions", CHAT)
    assert all("usage" not in e for e in events[:-1]) and all(e["choices"] for e in events[:-1])


async def test_choices_interleave_and_sum(api: Api) -> None:
    events = await api.events("/v1/chat/completions", {**CHAT, "n": 3, "stream_options": {"include_usage": True}})
    chunks = events[:-1]
    assert {c["choices"][0]["index"] for c in chunks[:-1]} == {0, 1, 2}
    assert sum(c["choices"][0]["finish_reason"] == "length" for c in chunks[:-1]) == 3
    assert chunks[-1]["usage"]["completion_tokens"] == 18 and chunks[-1]["usage"]["prompt_tokens"] == 8
    code, whole = await api.post("/v1/chat/completions", {**CHAT, "n": 3})
    assert code == 200 and [c["index"] for c in whole["choices"]] == [0, 1, 2] and whole["usage"]["completion_tokens"] == 18


@pytest.mark.parametrize(("prompt", "count"), [("ab", 1), (["ab", "c"], 2), ([97, 98], 1), ([[97, 98], [99]], 2)])
async def test_every_form_of_prompt(api: Api, model: FakeClient, prompt: Any, count: int) -> None:
    code, reply = await api.post("/v1/completions", {"model": "default", "prompt": prompt, "max_tokens": 4, "temperature": 0, "n": 2})
    assert code == 200 and reply["object"] == "text_completion" and reply["id"].startswith("cmpl-")
    references = [model.runner.reference(p, 4).decode() for p in (b"ab", b"c")]
    assert [(c["index"], c["text"]) for c in reply["choices"]] == [(i, references[i // 2]) for i in range(2 * count)]
    assert reply["usage"]["prompt_tokens"] == (2 if count == 1 else 3) and reply["usage"]["completion_tokens"] == 8 * count


async def test_completions_default_length_and_echo(api: Api, model: FakeClient) -> None:
    _, reply = await api.post("/v1/completions", {"prompt": "ab", "temperature": 0, "echo": True})
    assert reply["choices"][0]["text"] == "ab" + model.runner.reference(b"ab", 16).decode()
    events = await api.events("/v1/completions", {"prompt": "ab", "temperature": 0, "echo": True})
    assert "".join(e["choices"][0]["text"] for e in events[:-1]) == reply["choices"][0]["text"]
    assert all(e["object"] == "text_completion" for e in events[:-1])


@pytest.mark.parametrize("body", [b'{"prompt": "a", "temperature": 1e999}', b'{"prompt": "a", "json_schema": ' + b'{"a":' * 200 + b"1" + b"}" * 201])
async def test_numbers_and_depths_without_end(api: Api, body: bytes) -> None:
    is_error(await api.fetch("POST", "/v1/completions", body), 400)


async def test_the_best_of_several(api: Api) -> None:
    status, body = await api.post("/v1/completions", {"prompt": ["a", "b"], "best_of": 3, "n": 2, "max_tokens": 4})
    assert status == 200 and [c["index"] for c in body["choices"]] == [0, 1, 2, 3] and body["usage"]["completion_tokens"] == 2 * 3 * 4
    assert body["usage"]["prompt_tokens"] == 2 and all(c["logprobs"] is None for c in body["choices"])


async def test_models(api: Api) -> None:
    reply = json.loads((await api.fetch("GET", "/v1/models")).body)
    assert reply["object"] == "list" and [d["id"] for d in reply["data"]] == ["fake"]
    one = json.loads((await api.fetch("GET", "/v1/models/fake")).body)
    assert one["object"] == "model" and one["id"] == "fake" and isinstance(one["created"], int) and one["owned_by"]
    missing = await api.fetch("GET", "/v1/models/a/b%2Fc")
    assert missing.code == 404 and json.loads(missing.body)["error"]["code"] == "model_not_found"


def is_error(reply: HTTPResponse, status: int) -> dict[str, Any]:
    assert reply.code == status, reply.body
    error: dict[str, Any] = json.loads(reply.body)["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"] and error["type"]
    assert reply.headers["x-request-id"]
    return error


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/chat/completions", b"", None),
        ("/v1/chat/completions", b"{", None),
        ("/v1/chat/completions", b"[]", None),
        ("/v1/chat/completions", b"\xff\xfe", None),
        ("/v1/chat/completions", b'{"temperature": NaN}', None),
        ("/v1/chat/completions", b'{"a":' * 100_000, None),
        ("/v1/chat/completions", b"[" * 200_000, None),
        ("/v1/chat/completions", b'{"seed": ' + b"9" * 6000 + b"}", None),
        ("/v1/chat/completions", {}, "messages"),
        ("/v1/chat/completions", {"messages": []}, "messages"),
        ("/v1/chat/completions", {**CHAT, "messages": [{"role": "wizard", "content": "x"}]}, "messages"),
        ("/v1/chat/completions", {**CHAT, "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages"),
        ("/v1/chat/completions", {**CHAT, "max_tokens": 0}, "max_tokens"),
        ("/v1/chat/completions", {**CHAT, "max_tokens": -5}, "max_tokens"),
        ("/v1/chat/completions", {**CHAT, "max_completion_tokens": 0}, "max_completion_tokens"),
        ("/v1/chat/completions", {**CHAT, "repeat_last_n": -1}, "repeat_last_n"),
        ("/v1/chat/completions", {**CHAT, "repeat_penalty": 0}, "repeat_penalty"),
        ("/v1/chat/completions", {**CHAT, "max_tokens": "many"}, "max_tokens"),
        ("/v1/chat/completions", {**CHAT, "temperature": -1}, "temperature"),
        ("/v1/chat/completions", {**CHAT, "temperature": True}, "temperature"),
        ("/v1/chat/completions", {**CHAT, "top_p": 2}, "top_p"),
        ("/v1/chat/completions", {**CHAT, "n": 0}, "n"),
        ("/v1/chat/completions", {**CHAT, "n": 100_000}, "n"),
        ("/v1/chat/completions", {**CHAT, "stop": [""]}, "stop"),
        ("/v1/chat/completions", {**CHAT, "logit_bias": {"x": 1}}, "logit_bias"),
        ("/v1/chat/completions", {**CHAT, "stream_options": {"include_usage": True}}, "stream_options"),
        ("/v1/chat/completions", {**CHAT, "tools": []}, "tools"),
        ("/v1/chat/completions", {**CHAT, "top_logprobs": 2}, "top_logprobs"),
        ("/v1/chat/completions", {**CHAT, "response_format": {"type": "json_schema"}}, "response_format"),
        ("/v1/chat/completions", {**CHAT, "response_format": {"type": "xml"}}, "response_format"),
        ("/v1/chat/completions", {**CHAT, "regex": "a", "choice": ["b"]}, "choice"),
        ("/v1/completions", {"prompt": "a", "logprobs": 100}, "logprobs"),
        ("/v1/chat/completions", {**CHAT, "temprature": 1}, "temprature"),
        ("/v1/completions", {"model": "fake"}, "prompt"),
        ("/v1/completions", {"prompt": ""}, "prompt"),
        ("/v1/completions", {"prompt": []}, "prompt"),
        ("/v1/completions", {"prompt": ["a"] * 3000}, "prompt"),
        ("/v1/completions", {"prompt": [97], "suffix": "b"}, "suffix"),
        ("/v1/completions", {"prompt": [97], "echo": True, "stream": True}, "echo"),
        ("/v1/completions", {"prompt": "a", "best_of": 40}, "best_of"),
        ("/v1/completions", {"prompt": "a", "best_of": 2, "n": 3}, "best_of"),
        ("/v1/completions", {"prompt": "a", "best_of": 2, "stream": True}, "best_of"),
        ("/v1/chat/completions", {**CHAT, "chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        ("/v1/chat/completions", {**CHAT, "continue_final_message": True}, "continue_final_message"),
        ("/v1/completions", {"prompt": "a", "mirostat": 7}, "mirostat"),
    ],
)
async def test_bad_input_is_a_400_that_names_it(api: Api, model: FakeClient, path: str, body: Any, param: str | None) -> None:
    error = is_error(await api.fetch("POST", path, body), 400)
    assert error["param"] == param and error["type"] == "invalid_request_error"
    assert model.stats().num_running == 0


async def test_a_prompt_beyond_the_context(api: Api) -> None:
    for stream in (False, True):
        error = is_error(await api.fetch("POST", "/v1/completions", {"prompt": "x" * 6000, "stream": stream}), 400)
        assert error["code"] == "context_length_exceeded" and "6000" in error["message"] and "5000" in error["message"]


async def test_unknown_routes_methods_and_models(api: Api) -> None:
    assert is_error(await api.fetch("GET", "/v1/nothing"), 404)["code"] == "not_found"
    assert is_error(await api.fetch("GET", "/nothing"), 404)
    for method in ("DELETE", "PUT", "PATCH", "GET"):
        reply = await api.fetch(method, "/v1/chat/completions")
        assert is_error(reply, 405)["code"] == "method_not_allowed" and reply.headers["Allow"] == "POST"
    assert is_error(await api.fetch("POST", "/v1/chat/completions", {**CHAT, "model": "gpt-9"}), 404)["code"] == "model_not_found"
    assert is_error(await api.fetch("POST", "/v1/completions", b"{" + b" " * (17 << 20)), 413)


async def test_gone_and_never_there() -> None:
    async for api in serve(None):
        reply = await api.fetch("POST", "/v1/chat/completions", {**CHAT, "model": "default"})
        assert "No model is loaded" in is_error(reply, 503)["message"] and reply.headers["Retry-After"]
        assert is_error(await api.fetch("GET", "/health"), 503)
        client = FakeClient()
        bridge = BridgeServer(client)
        assert (await api.post("/v1/chat/completions", CHAT))[0] == 200 and (await api.fetch("GET", "/health")).code == 200
        bridge.close()
        assert "unloaded" in is_error(await api.fetch("POST", "/v1/chat/completions", CHAT), 503)["message"]
        assert is_error(await api.fetch("POST", "/v1/chat/completions", {**CHAT, "model": "never"}), 404)["code"] == "model_not_found"
        assert json.loads((await api.fetch("GET", "/v1/models")).body)["data"] == []
        client.close()


async def test_the_newest_engine_has_the_name(api: Api, model: FakeClient) -> None:
    newer = FakeClient()
    bridge = BridgeServer(newer, kernel_id="k2")
    ids = [d["id"] for d in json.loads((await api.fetch("GET", "/v1/models")).body)["data"]]
    assert len(ids) == 2 and ids[0] == "fake" and ids[1].startswith("fake@")
    await api.post("/v1/chat/completions", CHAT)
    await api.post("/v1/chat/completions", {**CHAT, "model": ids[1]})
    await api.post("/v1/chat/completions", {**CHAT, "model": "fake@k2"})
    assert newer.stats().requests_total == 2 and model.stats().requests_total == 1
    bridge.close()
    newer.close()


async def test_a_failure_mid_stream_is_an_error_event(api: Api, model: FakeClient) -> None:
    model.runner.step_s = 0.01

    async def break_it() -> None:
        while not any(b.chunks for b in model.runner.batches[3:]):
            await asyncio.sleep(0.01)
        model.runner.fail_next = "llama_decode returned -3"

    breaking = asyncio.ensure_future(break_it())
    reply = await api.fetch("POST", "/v1/completions", {"prompt": "a", "max_tokens": 4000, "stream": True})
    await breaking
    blocks = reply.body.decode().strip().split("\n\n")
    assert reply.code == 200 and "data: [DONE]" not in blocks
    assert "-3" in json.loads(blocks[-1][6:])["error"]["message"]
    error = is_error(await fail_whole(api, model), 500)
    assert error["type"] == "server_error"


async def fail_whole(api: Api, model: FakeClient) -> HTTPResponse:
    model.runner.fail_next = "again"
    reply = await api.fetch("POST", "/v1/completions", {"prompt": "a"})
    assert reply.headers["x-should-retry"] == "false"
    return reply


@pytest.mark.parametrize("stream", [True, False])
async def test_a_disconnect_frees_the_slot(api: Api, model: FakeClient, stream: bool) -> None:
    model.runner.step_s = 0.005
    host, port = api.url.removeprefix("http://").split(":")
    _, writer = await asyncio.open_connection(host, int(port))
    body = json.dumps({"prompt": "a", "max_tokens": 4500, "stream": stream}).encode()
    writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
    await asyncio.to_thread(wait_for, lambda: model.stats().num_running == 1)
    writer.close()
    await asyncio.to_thread(wait_for, lambda: model.stats().num_running == 0)


async def test_a_long_silence_is_bridged_by_pings(api: Api, model: FakeClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmkit.gateway.streams.PING_S", 0.05)
    model.runner.step_s = 0.2
    reply = await api.fetch("POST", "/v1/completions", {"prompt": "a", "max_tokens": 3, "stream": True})
    assert b": ping\n\n" in reply.body and reply.body.endswith(b"data: [DONE]\n\n")


async def test_keys(closed: Api) -> None:
    assert (await closed.post("/v1/chat/completions", CHAT))[0] == 200
    assert (await Api(closed.url).fetch("GET", "/health")).code == 200
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {KEY}"}, {"x-api-key": "no"}, {"Authorization": "Bearer "}):
        for method, path in (("GET", "/v1/models"), ("POST", "/v1/chat/completions"), ("GET", "/v1/nothing"), ("GET", "/")):
            error = is_error(await Api(closed.url).fetch(method, path, None if method == "GET" else CHAT, headers), 401)
            assert error["code"] == "invalid_api_key" and error["type"] == "authentication_error"
    assert (await Api(closed.url).fetch("GET", "/v1/models", headers={"x-api-key": KEY})).code == 200
    page = await Api(closed.url).fetch("GET", "/", headers={"Accept": "text/html,*/*"})
    assert page.code == 401 and b'id="lock"' in page.body and b"fake" not in page.body, "a browser is asked for the key, and told nothing"
    assert b'id="lock"' not in (await closed.fetch("GET", "/")).body


async def test_a_stranger_is_refused_before_the_body(closed: Api) -> None:
    host, port = closed.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 16000000\r\n\r\n")
    assert (await asyncio.wait_for(reader.readline(), 10)).split()[1] == b"401"
    writer.close()


async def test_without_a_key_web_pages_are_kept_out(api: Api) -> None:
    assert is_error(await api.fetch("GET", "/v1/models", headers={"Host": "evil.example"}), 403)["code"] == "forbidden_host"
    for origin in ("http://evil.example", "null", "http://127.0.0.1.evil.example"):
        assert is_error(await api.fetch("GET", "/v1/models", headers={"Origin": origin}), 403)["code"] == "forbidden_origin"
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
