"""What a gateway on the fake model refuses, and the shape of every error."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace
from typing import Any

import pytest
from fakes import FakeClient
from gateway_client import CHAT, Api, is_error, serve
from shelf import status as status_of
from tornado.httpclient import HTTPResponse

from llmkit.bridge.server import BridgeServer
from llmkit.errors import DownloadError, InsufficientMemoryError, ModelLoadError
from llmkit.gateway.failures import api_error
from llmkit.gateway.served import Served


async def test_too_much_to_be_scored(api: Api) -> None:
    for prompts, fine in ((["a" * 4000] * 100, True), (["a" * 4000] * 500, False)):
        code, reply = await api.post(
            "/v1/completions", {"prompt": prompts, "echo": True, "logprobs": 5, "max_tokens": 0}
        )
        assert (code == 200) is fine and (fine or reply["error"]["param"] == "echo")


async def test_a_megabyte_of_faults_is_refused_at_once(api: Api) -> None:
    bodies: list[Any] = [
        {"messages": [0] * 300_000},
        {"messages": [{"role": "user", "content": [0] * 300_000}]},
        {**CHAT, **{f"k{i}": 1 for i in range(9000)}},
    ]
    for body in bodies:
        is_error(await api.fetch("POST", "/v1/chat/completions", body), 400)
    assert (
        is_error(await api.fetch("POST", "/v1/chat/completions", {**CHAT, "Temperature": 1}), 400)[
            "param"
        ]
        == "Temperature"
    )


@pytest.mark.parametrize(
    "body",
    [
        b'{"prompt": "a", "temperature": 1e999}',
        b'{"prompt": "a", "json_schema": ' + b'{"a":' * 200 + b"1" + b"}" * 201,
    ],
)
async def test_numbers_and_depths_without_end(api: Api, body: bytes) -> None:
    is_error(await api.fetch("POST", "/v1/completions", body), 400)


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
        (
            "/v1/chat/completions",
            {**CHAT, "messages": [{"role": "wizard", "content": "x"}]},
            "messages",
        ),
        (
            "/v1/chat/completions",
            {
                **CHAT,
                "messages": [
                    {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}
                ],
            },
            "messages",
        ),
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
        (
            "/v1/chat/completions",
            {**CHAT, "stream_options": {"include_usage": True}},
            "stream_options",
        ),
        ("/v1/chat/completions", {**CHAT, "tools": []}, "tools"),
        ("/v1/chat/completions", {**CHAT, "top_logprobs": 2}, "top_logprobs"),
        (
            "/v1/chat/completions",
            {**CHAT, "response_format": {"type": "json_schema"}},
            "response_format",
        ),
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
        (
            "/v1/chat/completions",
            {**CHAT, "chat_template_kwargs": {"messages": []}},
            "chat_template_kwargs",
        ),
        (
            "/v1/chat/completions",
            {**CHAT, "continue_final_message": True},
            "continue_final_message",
        ),
        ("/v1/completions", {"prompt": "a", "mirostat": 7}, "mirostat"),
    ],
)
async def test_bad_input_is_a_400_that_names_it(
    api: Api, model: FakeClient, path: str, body: Any, param: str | None
) -> None:
    error = is_error(await api.fetch("POST", path, body), 400)
    assert error["param"] == param and error["type"] == "invalid_request_error"
    assert model.stats().num_running == 0


async def test_a_prompt_beyond_the_context(api: Api) -> None:
    for stream in (False, True):
        error = is_error(
            await api.fetch("POST", "/v1/completions", {"prompt": "x" * 6000, "stream": stream}),
            400,
        )
        assert (
            error["code"] == "context_length_exceeded"
            and "6000" in error["message"]
            and "5000" in error["message"]
        )


async def test_unknown_routes_methods_and_models(api: Api) -> None:
    assert is_error(await api.fetch("GET", "/v1/nothing"), 404)["code"] == "not_found"
    assert is_error(await api.fetch("GET", "/nothing"), 404)
    for method in ("DELETE", "PUT", "PATCH", "GET"):
        reply = await api.fetch(method, "/v1/chat/completions")
        assert (
            is_error(reply, 405)["code"] == "method_not_allowed"
            and reply.headers["Allow"] == "POST"
        )
    assert (
        is_error(await api.fetch("POST", "/v1/chat/completions", {**CHAT, "model": "gpt-9"}), 404)[
            "code"
        ]
        == "model_not_found"
    )
    assert is_error(await api.fetch("POST", "/v1/completions", b"{" + b" " * (17 << 20)), 413)


@pytest.mark.parametrize(
    ("kind", "status"),
    [(ModelLoadError, 503), (InsufficientMemoryError, 503), (DownloadError, 502)],
)
def test_why_a_model_is_not_loaded_is_for_administrators(
    kind: type[ModelLoadError], status: int
) -> None:
    why = "/srv/ann/m.gguf is broken; the last line of its log: node-7 is away"
    public, full = api_error(kind(why)), api_error(kind(why), for_admin=True)
    assert public.status == full.status == status and public.code == full.code
    assert full.message == why
    assert "/srv" not in public.message and "Ask whoever runs this server" in public.message


@pytest.mark.parametrize(
    ("phase", "said"),
    [("failed", "cannot be loaded"), ("restarting", "being started again")],
)
def test_why_a_model_has_failed_is_not_said_to_whoever_asks(phase: str, said: str) -> None:
    states = SimpleNamespace(
        known=lambda name: name, status=lambda name: status_of(phase, reason="no /srv/ann/m.gguf")
    )
    told = str(Served(states).absent("m"))  # type: ignore[arg-type]
    assert said in told and "/srv" not in told


async def test_gone_and_never_there() -> None:
    async for api in serve(None):
        reply = await api.fetch("POST", "/v1/chat/completions", {**CHAT, "model": "default"})
        assert (
            "No model is loaded" in is_error(reply, 503)["message"] and reply.headers["Retry-After"]
        )
        assert is_error(await api.fetch("GET", "/health"), 503)
        client = FakeClient()
        bridge = BridgeServer(client)
        assert (await api.post("/v1/chat/completions", CHAT))[0] == 200 and (
            await api.fetch("GET", "/health")
        ).code == 200
        bridge.close()
        assert (
            "unloaded"
            in is_error(await api.fetch("POST", "/v1/chat/completions", CHAT), 503)["message"]
        )
        assert (
            is_error(
                await api.fetch("POST", "/v1/chat/completions", {**CHAT, "model": "never"}), 404
            )["code"]
            == "model_not_found"
        )
        assert json.loads((await api.fetch("GET", "/v1/models")).body)["data"] == []
        client.close()


async def test_a_failure_mid_stream_is_an_error_event(api: Api, model: FakeClient) -> None:
    model.runner.step_s = 0.01

    async def break_it() -> None:
        while not any(b.chunks for b in model.runner.batches[3:]):
            await asyncio.sleep(0.01)
        model.runner.fail_next = "llama_decode returned -3"

    breaking = asyncio.ensure_future(break_it())
    reply = await api.fetch(
        "POST", "/v1/completions", {"prompt": "a", "max_tokens": 4000, "stream": True}
    )
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
