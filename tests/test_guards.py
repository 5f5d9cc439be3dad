"""What an operator sets for all dialects: lengths of answers and prompts, and how requests are
sampled that do not say."""

from __future__ import annotations

import json
from typing import Any

import pytest
from fakes import FakeClient
from governed import Governed, dialects, governed, message_of

from llmkit.errors import InvalidRequestError
from llmkit.gateway.guards import Guards, Terms
from llmkit.protocol import GenerationRequest, SamplingParams


def silent(path: str, text: str = "hi") -> dict[str, Any]:
    """The request of a dialect, with nothing about lengths and sampling."""
    body = {k: v for k, v in dialects(5, text=text)[path].items() if k != "temperature"}
    for name in ("max_tokens", "max_output_tokens", "options"):
        body.pop(name, None)
    return {**body, "max_tokens": 7} if path == "/v1/messages" else body  # it must say


def asking(path: str, max_tokens: int) -> dict[str, Any]:
    return dialects(max_tokens)[path]


class Seen:
    """The sampling of the requests that reach a fake model."""

    def __init__(self, model: FakeClient) -> None:
        self.sampling: list[SamplingParams] = []
        submit = model.submit

        def watch(request: GenerationRequest) -> Any:
            self.sampling.append(request.sampling)
            return submit(request)

        model.submit = watch  # type: ignore[method-assign]

    def last(self) -> SamplingParams:
        return self.sampling[-1]


PATHS = list(dialects(1))


@pytest.mark.parametrize("path", PATHS)
async def test_a_default_length_is_for_those_who_do_not_say(path: str) -> None:
    async with governed(guards=Guards(Terms(default_max_tokens=9))) as gate:
        seen = Seen(gate.model)
        reply = await gate.post(path, silent(path))
        assert reply.code == 200 and "x-llmkit-clamped" not in reply.headers
        assert seen.last().max_tokens == (7 if path == "/v1/messages" else 9)
        assert (await gate.post(path, asking(path, 12))).code == 200
        assert seen.last().max_tokens == 12


@pytest.mark.parametrize("path", PATHS)
async def test_more_than_the_limit_is_clamped_and_said(path: str) -> None:
    async with governed(guards=Guards(Terms(max_tokens_limit=8))) as gate:
        seen = Seen(gate.model)
        for stream in (False, True):
            reply = await gate.post(path, dialects(100, stream=stream)[path])
            assert reply.code == 200 and reply.headers["x-llmkit-clamped"] == "max_tokens=8"
            assert seen.last().max_tokens == 8
        within = await gate.post(path, asking(path, 8))
        assert within.code == 200 and "x-llmkit-clamped" not in within.headers
        quiet = await gate.post(path, silent(path))
        assert quiet.code == 200 and "x-llmkit-clamped" not in quiet.headers
        assert (seen.last().max_tokens or 99) <= 8, "who does not say gets no more either"


@pytest.mark.parametrize("path", PATHS)
async def test_more_than_the_limit_is_refused_where_that_is_wanted(path: str) -> None:
    async with governed(guards=Guards(Terms(max_tokens_limit=8), refuses=True)) as gate:
        reply = await gate.post(path, asking(path, 9))
        assert reply.code == 400 and "at most 8" in message_of(reply)
        name = {"/v1/responses": "max_output_tokens"}.get(path, "max_tokens")
        assert ("num_predict" if path.startswith("/api") else name) in message_of(reply)
        if path.startswith("/v1") and path != "/v1/messages":
            assert json.loads(reply.body)["error"]["param"] == name
        assert (await gate.post(path, asking(path, 8))).code == 200
        assert (await gate.post(path, silent(path))).code == 200


async def test_the_name_of_the_field_is_the_one_that_was_sent() -> None:
    async with governed(guards=Guards(Terms(max_tokens_limit=8), refuses=True)) as gate:
        body = {**silent("/v1/chat/completions"), "max_completion_tokens": 100}
        error = json.loads((await gate.post("/v1/chat/completions", body)).body)["error"]
        assert error["param"] == "max_completion_tokens" in error["message"]


async def test_no_limit_at_all_is_more_than_the_limit() -> None:
    """Ollama's clients say -1, and mean it."""
    async with governed(guards=Guards(Terms(4, max_tokens_limit=8), refuses=True)) as gate:
        seen = Seen(gate.model)
        body = {**silent("/api/generate"), "options": {"num_predict": -1}}
        reply = await gate.post("/api/generate", body)
        assert reply.code == 200 and reply.headers["x-llmkit-clamped"] == "max_tokens=8"
        assert seen.last().max_tokens == 8


DEFAULTS = {
    "temperature": 0.3,
    "top_p": 0.5,
    "top_k": 3,
    "min_p": 0.2,
    "repeat_penalty": 1.2,
    "seed": 11,
    "presence_penalty": 0.1,
    "frequency_penalty": 0.4,
}


@pytest.mark.parametrize("path", PATHS)
async def test_default_sampling_is_for_what_a_request_leaves_out(path: str) -> None:
    async with governed(guards=Guards(Terms(sampling=DEFAULTS))) as gate:
        seen = Seen(gate.model)
        assert (await gate.post(path, silent(path))).code == 200
        params = seen.last()
        for name, value in DEFAULTS.items():
            engines = "repetition_penalty" if name == "repeat_penalty" else name
            assert getattr(params, engines) == value
        told = silent(path)
        # The engine's own default, said aloud, is no silence.
        values = {"temperature": 0.8, "top_p": 0.95}
        if path.startswith("/api"):
            told["options"] = {**values, "repeat_penalty": 1.0, "seed": 5}
        elif "completions" in path:
            told |= {**values, "repetition_penalty": 1.0, "seed": 5}
        else:
            told |= values
        assert (await gate.post(path, told)).code == 200
        params = seen.last()
        assert (params.temperature, params.top_p, params.top_k) == (0.8, 0.95, 3)
        if "seed" in str(told):
            assert (params.seed, params.repetition_penalty) == (5, 1.0)


async def test_a_random_seed_is_a_choice_too() -> None:
    async with governed(guards=Guards(Terms(sampling={"seed": 11}))) as gate:
        seen = Seen(gate.model)
        body = {**silent("/api/chat"), "options": {"seed": -1}}
        assert (await gate.post("/api/chat", body)).code == 200
        assert seen.last().seed is None
        null = {**silent("/v1/chat/completions"), "seed": None}
        assert (await gate.post("/v1/chat/completions", null)).code == 200
        assert seen.last().seed == 11, "null is nothing said"


async def test_each_model_has_its_own_where_it_says_so() -> None:
    general = Terms(20, 30, {"temperature": 0.5, "top_k": 2})
    models = {"fake": Terms(max_tokens_limit=10, sampling={"temperature": 0.1})}
    async with governed(guards=Guards(general, models)) as gate:
        seen = Seen(gate.model)
        body = silent("/v1/chat/completions")
        for name in ("fake", "default"):
            assert (await gate.post("/v1/chat/completions", {**body, "model": name})).code == 200
            params = seen.last()
            assert (params.temperature, params.top_k, params.max_tokens) == (0.1, 2, 10)
        gate.rules.guards = Guards(general)
        assert (await gate.post("/v1/chat/completions", body)).code == 200
        assert (seen.last().temperature, seen.last().max_tokens) == (0.5, 20), "changed at run time"


LONG: dict[str, tuple[dict[str, Any], str]] = {
    "/v1/chat/completions": ({"messages": [{"role": "user", "content": "x" * 60}]}, "messages"),
    "/v1/completions": ({"prompt": ["short", "x" * 60]}, "prompt"),
    "/v1/completions ": ({"prompt": list(range(60))}, "prompt"),
    "/v1/responses": ({"input": "x" * 60}, "messages"),
    "/v1/messages": (
        {"max_tokens": 5, "system": "y" * 30, "messages": [{"role": "user", "content": "x" * 30}]},
        "messages",
    ),
    "/api/chat": ({"model": "fake", "messages": [{"role": "user", "content": "x" * 60}]}, "m"),
    "/api/generate": ({"model": "fake", "prompt": "x" * 30, "suffix": "y" * 30}, "p"),
    "/v1/embeddings": ({"model": "fake", "input": ["short", "x" * 60]}, "input"),
    "/api/embed": ({"model": "fake", "input": "x" * 60}, "input"),
    "/v1/rerank": ({"model": "fake", "query": "q", "documents": ["x" * 60]}, "input"),
}


@pytest.mark.parametrize("path", LONG)
async def test_a_prompt_that_is_too_long_is_refused_in_every_dialect(path: str) -> None:
    async with governed(guards=Guards(max_prompt_chars=50)) as gate:
        body, param = LONG[path]
        if "embed" in path or "rerank" in path:
            object.__setattr__(gate.model.description, "embedding_size", 2)
        reply = await gate.post(path.strip(), body)
        assert reply.code == 400 and "at most 50" in message_of(reply)
        if path.startswith("/v1") and path != "/v1/messages":
            error = json.loads(reply.body)["error"]
            assert (error["param"], error["code"]) == (param, "context_length_exceeded")
        assert gate.model.stats().requests_total == 0


TOOL = {"type": "function", "function": {"name": "f", "parameters": {"d": "x" * 60}}}
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "x" * 60}}


@pytest.mark.parametrize(
    "more",
    [
        {"tools": [TOOL]},
        {"chat_template_kwargs": {"note": "x" * 60}},
        {
            "messages": [
                {"role": "assistant", "tool_calls": [CALL]},
                {"role": "user", "content": ""},
            ]
        },
        {
            "messages": [
                {"role": "assistant", "content": "", "reasoning_content": "x" * 60},
                {"role": "user", "content": "hi"},
            ]
        },
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "x" * 60}]}]},
    ],
    ids=["tools", "template", "calls", "reasoning", "parts"],
)
async def test_a_long_prompt_hides_nowhere(more: dict[str, Any]) -> None:
    async with governed(guards=Guards(max_prompt_chars=50)) as gate:
        body = {**silent("/v1/chat/completions"), **more}
        reply = await gate.post("/v1/chat/completions", body)
        assert reply.code == 400 and "at most 50" in message_of(reply)
        fits = {**silent("/v1/chat/completions"), "max_tokens": 2}
        assert (await gate.post("/v1/chat/completions", fits)).code == 200


@pytest.mark.parametrize(
    ("sampling", "name"),
    [
        ({"temprature": 1}, "temprature"),
        ({"max_tokens": 5}, "max_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 2}, "top_p"),
        ({"repeat_penalty": 0}, "repetition_penalty"),
        ({"seed": "x"}, "seed"),
    ],
)
def test_defaults_that_cannot_be_are_refused_at_the_start(sampling: Any, name: str) -> None:
    with pytest.raises(InvalidRequestError, match=name):
        Terms(sampling=sampling)


def test_without_terms_nothing_changes() -> None:
    request = GenerationRequest("r", SamplingParams(max_tokens=None), prompt="x" * 100_000)
    assert Guards().apply("any", [request]) == ([request], None)
    assert Guards().apply("any", [request])[0][0] is request


async def boundary(gate: Governed, size: int) -> int:
    body = {**silent("/v1/completions"), "prompt": "x" * size, "max_tokens": 1}
    return (await gate.post("/v1/completions", body)).code


async def test_the_bound_itself_fits() -> None:
    async with governed(guards=Guards(max_prompt_chars=50)) as gate:
        assert [await boundary(gate, size) for size in (1, 50, 51)] == [200, 200, 400]
