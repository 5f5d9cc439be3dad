"""Compatible routes are held to limits, deadlines and departures as all others are."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator

import pytest
from compat_gateway import curl
from fake_runner import FakeRunner
from governed import CALLER, Governed, governed, until

from llmkit.gateway.access.identity import Allowance
from llmkit.gateway.guards import Guards, Terms

GREEDY = {"model": "fake", "max_tokens": 6, "temperature": 0}
MESSAGES = [{"role": "user", "content": "Hello!"}]
PROMPTED = {"model-name": "fake", "prompt": "Hello!", "max-token": 12}


@pytest.fixture
async def gateway() -> AsyncIterator[Governed]:
    async with governed() as made:
        yield made


COMPUTING = {
    "/completions": {**GREEDY, "prompt": "x"},
    "/chat/completions": PROMPTED,
    "/v1/generate": {"prompt": "x", "sampling_params": {"max_tokens": 9}},
    "/api/generate": {**GREEDY, "prompt": "x"},
    "/api/generate/stream": {**GREEDY, "prompt": "x"},
    "/api/chat": {**GREEDY, "messages": MESSAGES},
    "/api/chat/stream": {**GREEDY, "messages": MESSAGES},
    "/api/completions": {**GREEDY, "prompt": "x"},
    "/api/completions/stream": {**GREEDY, "prompt": "x"},
    "/completion": {"prompt": "x", "n_predict": 9},
    "/infill": {"input_prefix": "a", "input_suffix": "b", "n_predict": 9},
}


@pytest.mark.parametrize("path", COMPUTING)
async def test_limits_of_the_operator_hold_everywhere(path: str) -> None:
    guards = Guards(Terms(max_tokens_limit=2))
    async with governed(guards=guards) as gateway:
        reply = await curl(gateway.api.url, path, COMPUTING[path])
        assert reply.code == 200, reply.text
        assert gateway.records[-1].usage.completion_tokens == 2, path


@pytest.mark.parametrize("path", COMPUTING)
async def test_a_callers_requests_at_once_are_bounded(path: str) -> None:
    runner = FakeRunner(n_ctx=5000)
    runner.step_s = 0.02
    async with governed(runner, allowances={"a": Allowance(concurrent=1)}) as gateway:
        body = json.loads(json.dumps(COMPUTING[path]))
        body.update({"max_tokens": 4000} if "max_tokens" in body else {})
        body.update({"n_predict": 4000} if "n_predict" in body else {})
        body.update({"max-token": 4000} if "max-token" in body else {})
        if "sampling_params" in body:
            body["sampling_params"] = {"max_tokens": 4000}
        async with gateway.connection(path, body, "a"):
            await until(lambda: gateway.under_way("a") == 1)
            second = await curl(gateway.api.url, path, COMPUTING[path], headers={CALLER: "a"})
            assert second.code == 429, (path, second.text)


async def test_a_client_that_leaves_ends_its_answer() -> None:
    runner = FakeRunner(n_ctx=5000)
    runner.step_s = 0.01
    async with governed(runner) as gateway:
        body = {**PROMPTED, "max-token": 4000}
        async with gateway.connection("/chat/completions", body) as reader:
            await reader.readuntil(b"data: ")
        await until(lambda: gateway.records and gateway.model.stats().num_running == 0)
        assert gateway.records[-1].status == 499


async def test_ends_at_a_deadline(gateway: Governed) -> None:
    gateway.model.runner.step_s = 0.05
    reply = await curl(gateway.api.url, "/completion", {"prompt": "x", "timeout": 0.2})
    assert reply.code == 408 and reply.json["error"]["code"] == 408
    body = {"prompt": "x", "timeout": 0.2, "sampling_params": {"max_tokens": 4000}}
    reply = await curl(gateway.api.url, "/v1/generate", body)
    assert "timeout" in reply.events[-1]
