"""llama-server's routes: its fields (recorded from llama-server b1-0c1e570), its stream, and what
llama.vim, llama.vscode, its web UI and its benchmark send."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from compat_gateway import Raw, curl
from fake_runner import FakeRunner
from gateway_client import Api, serve
from governed import Governed, governed, until

import llmkit
from llmkit.bridge.server import BridgeServer
from llmkit.errors import InvalidRequestError
from llmkit.gateway.bodies import parse
from llmkit.gateway.compat.llama_schemas import InfillBody, LlamaCompletionBody
from llmkit.gateway.compat.llama_words import translate
from llmkit.gateway.compat.stopping import Stopping
from llmkit.protocol import ModelDescription
from llmkit.runtime.local import LocalEngine

FINAL = {
    "index", "content", "tokens", "id_slot", "stop", "model", "tokens_predicted",
    "tokens_evaluated", "generation_settings", "prompt", "has_new_line", "truncated", "stop_type",
    "stopping_word", "tokens_cached", "timings",
}  # fmt: skip
PARTIAL = {"index", "content", "tokens", "stop", "id_slot", "tokens_predicted", "tokens_evaluated"}
TIMINGS = {
    "cache_n", "prompt_n", "prompt_ms", "prompt_per_token_ms", "prompt_per_second", "predicted_n",
    "predicted_ms", "predicted_per_token_ms", "predicted_per_second",
}  # fmt: skip
SETTINGS = {
    "seed", "temperature", "dynatemp_range", "dynatemp_exponent", "top_k", "top_p", "min_p",
    "top_n_sigma", "xtc_probability", "xtc_threshold", "typical_p", "repeat_last_n",
    "repeat_penalty", "presence_penalty", "frequency_penalty", "dry_multiplier", "dry_base",
    "dry_allowed_length", "dry_penalty_last_n", "dry_sequence_breakers", "mirostat",
    "mirostat_tau", "mirostat_eta", "adaptive_target", "adaptive_decay", "stop", "max_tokens",
    "n_predict", "n_keep", "n_discard", "ignore_eos", "stream", "logit_bias", "n_probs",
    "min_keep", "grammar", "grammar_lazy", "grammar_triggers", "preserved_tokens", "chat_format",
    "reasoning_format", "reasoning_in_content", "generation_prompt", "samplers",
    "speculative.types", "timings_per_token", "post_sampling_probs", "backend_sampling", "lora",
}  # fmt: skip
PROPS = {
    "default_generation_settings", "total_slots", "model_alias", "model_ftype", "model_path",
    "modalities", "media_marker", "endpoint_slots", "endpoint_props", "endpoint_metrics", "ui",
    "ui_settings", "chat_template", "chat_template_caps", "bos_token", "eos_token", "build_info",
    "is_sleeping", "cors_proxy_enabled",
}  # fmt: skip
CAPS = {
    "supports_object_arguments", "supports_parallel_tool_calls", "supports_preserve_reasoning",
    "supports_reasoning_effort", "supports_string_content", "supports_system_role",
    "supports_tool_calls", "supports_tools", "supports_typed_content",
}  # fmt: skip
MODEL = ModelDescription("m", "m.gguf", n_ctx=512)


@pytest.fixture
async def gateway() -> AsyncIterator[Governed]:
    async with governed() as made:
        yield made


@pytest.fixture
async def real(engine: LocalEngine) -> AsyncIterator[Api]:
    await until(lambda: not engine.stats().num_running)  # what tests before this one have left
    bridge = BridgeServer(engine)
    async for api in serve(None):
        yield api
    bridge.close()


async def ask(api: Api, path: str, body: Any = None) -> Raw:
    return await curl(api.url, path, body)


@pytest.mark.model
async def test_a_completion_has_the_fields_of_llama_servers(real: Api) -> None:
    body = {"prompt": "Once upon a", "n_predict": 4, "temperature": 0}
    whole = (await ask(real, "/completion", body)).json
    assert whole.keys() == FINAL and whole["timings"].keys() == TIMINGS
    assert whole["generation_settings"].keys() == SETTINGS
    assert whole["content"] == " time, the city", "what llama-server says"
    assert (whole["tokens_predicted"], whole["tokens_evaluated"]) == (4, 3)
    assert (whole["stop_type"], whole["tokens_cached"], whole["prompt"]) == (
        "limit",
        6,
        "Once upon a",
    )
    reply = await ask(real, "/completion", {**body, "stream": True, "n_probs": 2})
    assert "[DONE]" not in reply.text and reply.headers["content-type"] == "text/event-stream"
    *parts, last = reply.objects
    assert all(part.keys() == PARTIAL | {"completion_probabilities"} for part in parts)
    assert "".join(part["content"] for part in parts) == whole["content"]
    assert [t for part in parts for t in part["tokens"]] == [655, 28, 260, 2240]
    (first, *_) = parts[0]["completion_probabilities"]
    assert first.keys() == {"id", "token", "bytes", "logprob", "top_logprobs"}
    assert (first["id"], first["token"]) == (655, " time")
    assert [t["id"] for t in first["top_logprobs"]] == [655, 3163]
    assert abs(first["logprob"] + 1.77) < 0.05, "as llama-server has it"
    assert last.keys() == FINAL and last["content"] == "" and last["stop"] is True
    with_tokens = await ask(real, "/completion", {**body, "return_tokens": True})
    assert with_tokens.json["tokens"] == [655, 28, 260, 2240]


@pytest.mark.model
async def test_prompts_in_every_form(real: Api) -> None:
    common = {"n_predict": 2, "temperature": 0, "response_fields": ["content", "prompt", "index"]}
    text = (await ask(real, "/completion", {**common, "prompt": "Once upon a"})).json
    tokens = (await ask(real, "/tokenize", {"content": "Once upon a"})).json["tokens"]
    for prompt in (tokens, [tokens[0], " upon a"], {"prompt_string": "Once upon a"}):
        assert (await ask(real, "/completion", {**common, "prompt": prompt})).json == text, prompt
    many = (await ask(real, "/completion", {**common, "prompt": ["Once upon a", tokens]})).json
    assert [m["index"] for m in many] == [0, 1]
    assert many[0]["content"] == many[1]["content"] == text["content"]
    stopped = {"prompt": "Once upon a", "n_predict": 9, "temperature": 0, "stop": [" city"]}
    reply = (await ask(real, "/completion", stopped)).json
    assert (reply["stop_type"], reply["stopping_word"]) == ("word", " city")
    assert reply["content"] == " time, the"


@pytest.mark.model
async def test_what_it_says_of_itself(real: Api) -> None:
    props = (await ask(real, "/props")).json
    assert props.keys() == PROPS and props["chat_template_caps"].keys() == CAPS
    params = props["default_generation_settings"]["params"]
    assert props["endpoint_metrics"] is False, "this one has no /metrics"
    assert props["default_generation_settings"]["n_ctx"] == 1024 and params.keys() == SETTINGS
    assert props["bos_token"] == "<|im_start|>" and "<|im_start|>" in props["chat_template"]
    slots = (await ask(real, "/slots")).json
    assert [slot["id"] for slot in slots] == [0, 1, 2, 3]
    wanted = {"id", "n_ctx", "speculative", "is_processing"}
    assert all(wanted <= slot.keys() and not slot["is_processing"] for slot in slots)


@pytest.mark.model
async def test_a_model_without_the_tokens_does_not_fill_in(real: Api) -> None:
    for stream in (False, True):
        body = {"input_prefix": "a", "input_suffix": "b", "stream": stream}
        reply = await ask(real, "/infill", body)
        error = reply.json["error"]
        assert reply.code == 501 and error["type"] == "not_supported_error"
        assert error["code"] == 501 and error["message"].startswith("Infill is not supported")


VIM = {  # llama.vim, as its autoload/llama.vim makes it
    "id_slot": 0,
    "input_prefix": "def add(a, b):\n",
    "input_suffix": "\nprint(add(1, 2))\n",
    "input_extra": [{"text": "import math\n", "time": 12, "filename": "m.py"}],
    "prompt": "    ret",
    "n_predict": 8,
    "stop": [],
    "n_indent": 0,
    "top_k": 40,
    "top_p": 0.9,
    "samplers": ["top_k", "top_p", "infill"],
    "stream": False,
    "cache_prompt": True,
    "t_max_prompt_ms": 500,
    "t_max_predict_ms": 1000,
    "response_fields": [
        "content", "timings/prompt_n", "timings/prompt_ms", "timings/prompt_per_token_ms",
        "timings/prompt_per_second", "timings/predicted_n", "timings/predicted_ms",
        "timings/predicted_per_token_ms", "timings/predicted_per_second", "truncated",
        "tokens_cached",
    ],
}  # fmt: skip


async def test_llama_vim_gets_what_it_looks_for(gateway: Governed) -> None:
    reply = await ask(gateway.api, "/infill", VIM)
    assert reply.code == 200 and '"content":"' in reply.text, "its pattern allows no space"
    assert reply.json.keys() == set(VIM["response_fields"])  # type: ignore[call-overload]
    (request,) = gateway.records[-1].requests
    assert request.suffix == VIM["input_suffix"]
    assert request.prompt == (
        "\n\n--- snippet ---\n\nimport math\n\n\n--- snippet ---\n\ndef add(a, b):\n    ret"
    )
    assert (request.sampling.temperature, request.sampling.min_p) == (1.0, 0.2)
    warm = {**VIM, "n_predict": 0, "samplers": [], "response_fields": [""], "temperature": 0.0}
    reply = await ask(gateway.api, "/infill", warm)
    assert reply.code == 200 and reply.json == {}


async def test_llama_vscode_may_want_several(gateway: Governed) -> None:
    body = {**VIM, "n_cmpl": 3, "model": " ", "lora": [{"id": 0, "scale": 0}]}
    del body["response_fields"]
    reply = await ask(gateway.api, "/infill", body)
    assert reply.code == 200 and [r["index"] for r in reply.json] == [0, 1, 2]
    refused = await ask(gateway.api, "/infill", {**body, "lora": [{"id": 0, "scale": 0.5}]})
    assert refused.code == 400 and "the model has none" in refused.json["error"]["message"]


async def test_code_round_a_gap_is_shortened_to_fit(gateway: Governed) -> None:
    body = {
        "input_prefix": "p" * 9000 + "END",
        "input_suffix": "START" + "s" * 9000,
        "input_extra": [{"text": "old" * 3000}, {"text": "new" * 400, "filename": "f"}],
        "n_predict": 10,
    }
    reply = await ask(gateway.api, "/infill", body)
    assert reply.code == 200, reply.text
    (request,) = gateway.records[-1].requests
    prompt, suffix = str(request.prompt), str(request.suffix)
    assert prompt.endswith("pppEND") and suffix.startswith("STARTsss")
    assert len(suffix) == 512 and prompt.count("p") > 1500, "a quarter after it, the rest before"
    assert "newnew" in prompt and len(prompt) + len(suffix) < 5000


async def test_its_benchmark_counts_tokens_in_its_stream(gateway: Governed) -> None:
    """As scripts/server-bench.py reads it."""
    for prompt in ("Once", [1, 2, 3]):
        body = {"prompt": prompt, "ignore_eos": True, "cache_prompt": False, "seed": 2,
                "n_predict": 20, "stream": True}  # fmt: skip
        reply = await ask(gateway.api, "/completion", body)
        lines = [line for line in reply.text.split("\n") if line.startswith("data: ")]
        assert len(lines) > 1 and "timings" not in json.loads(lines[-2][6:])
        assert json.loads(lines[-1][6:])["tokens_predicted"] == 20


WEB_UI = {  # as chat.service.ts makes it
    "messages": [{"role": "user", "content": "hi"}],
    "return_progress": True,
    "sse_ping_interval": 1,
    "stream": True,
    "reasoning_format": "auto",
    "chat_template_kwargs": {"enable_thinking": True},
    "reasoning_control": True,
    "timings_per_token": True,
    "max_tokens": -1,
    "dynatemp_range": 0,
    "samplers": ["top_k", "typ_p", "top_p", "min_p", "temperature"],
    "backend_sampling": False,
    "temperature": 0.8,
    "typ_p": 1,
}


async def test_its_web_ui_shows_how_fast_a_chat_was(gateway: Governed) -> None:
    reply = await ask(gateway.api, "/v1/chat/completions", WEB_UI)
    assert reply.code == 200, reply.text
    chunks = [json.loads(event) for event in reply.events[:-1]]
    assert chunks[-1]["choices"][0]["finish_reason"] and chunks[-1]["timings"].keys() >= TIMINGS
    assert all("timings" not in chunk for chunk in chunks[:-1])
    whole = {**WEB_UI, "stream": False, "max_tokens": 3}
    del whole["return_progress"], whole["sse_ping_interval"]
    reply = await ask(gateway.api, "/v1/chat/completions", whole)
    assert reply.json["timings"]["predicted_n"] == 3
    plain = {"messages": WEB_UI["messages"], "max_tokens": 3}
    reply = await ask(gateway.api, "/v1/chat/completions", plain)
    assert "timings" not in reply.json, "who does not ask gets OpenAI's object"


async def test_llama_vim_warms_up_and_chats(gateway: Governed) -> None:
    warm = {"id_slot": 1, "messages": WEB_UI["messages"], "samplers": [], "n_predict": 0,
            "stream": False, "cache_prompt": True, "response_fields": [""]}  # fmt: skip
    assert (await ask(gateway.api, "/v1/chat/completions", warm)).code == 200
    chat = {"id_slot": 1, "messages": WEB_UI["messages"], "min_p": 0.1, "temperature": 0.1,
            "samplers": ["min_p", "temperature"], "stream": True, "cache_prompt": True,
            "max_tokens": 4}  # fmt: skip
    assert (await ask(gateway.api, "/v1/chat/completions", chat)).code == 200
    sampling = gateway.records[-1].requests[0].sampling
    assert (sampling.min_p, sampling.temperature) == (0.1, 0.1)
    assert (sampling.top_k, sampling.top_p) == (0, 1.0), "samplers that are not named are off"


async def test_without_a_prefix_its_words_are_understood(gateway: Governed) -> None:
    reply = await ask(gateway.api, "/completions", {"prompt": "x", "n_predict": 3})
    assert reply.json.keys() == FINAL


@pytest.mark.parametrize(
    ("body", "code", "kind", "word"),
    [
        ({}, 400, "invalid_request_error", "prompt"),
        ({"prompt": []}, 400, "invalid_request_error", "prompt"),
        ({"prompt": [1, ["a"]]}, 400, "invalid_request_error", "prompt"),
        ({"prompt": "x", "samplers": ["magic"]}, 400, "invalid_request_error", "samplers"),
        ({"prompt": "x", "dynatemp_range": 0.5}, 400, "invalid_request_error", "dynatemp_range"),
        ({"prompt": "x", "n_predict": -2}, 400, "invalid_request_error", "n_predict"),
        ({"prompt": "x", "logit_bias": {"a": 1}}, 400, "invalid_request_error", "logit_bias"),
        ({"prompt": "x", "model": "none"}, 404, "not_found_error", "none"),
        ({"prompt": "x" * 6000}, 400, "exceed_context_size_error", "6000"),
    ],
)
async def test_errors_have_its_shape(
    gateway: Governed, body: dict[str, Any], code: int, kind: str, word: str
) -> None:
    reply = await ask(gateway.api, "/completion", body)
    error = reply.json["error"]
    assert (reply.code, error["code"], error["type"]) == (code, code, kind), error
    assert word in error["message"]
    if kind == "exceed_context_size_error":
        assert (error["n_prompt_tokens"], error["n_ctx"]) == (6000, 5000)


async def test_what_it_has_and_we_do_not_is_said_so(gateway: Governed) -> None:
    for path, body in (("/props", {}), ("/slots/0?action=save", {"filename": "x"}),
                       ("/embedding", {"content": "x"}),
                       ("/embeddings", {"content": "x"})):  # fmt: skip
        reply = await ask(gateway.api, path, body)
        assert reply.code == 501 and reply.json["error"]["type"] == "not_supported_error", path


@pytest.mark.model
async def test_embeddings_come_in_lists() -> None:
    with await asyncio.to_thread(llmkit.load, "minilm"):
        async for api in serve(None):
            (one,) = (await ask(api, "/embedding", {"content": "hi"})).json
            assert one["index"] == 0 and len(one["embedding"]) == 1
            assert abs(one["embedding"][0][0] + 0.0904640) < 0.001, "as llama-server has it"
            two = (await ask(api, "/embedding", {"input": ["hi", "ho"]})).json
            assert [t["index"] for t in two] == [0, 1]
            reply = await ask(api, "/completion", {"prompt": "x"})
            assert reply.code == 404 and "generate" in reply.json["error"]["message"]
            assert (await ask(api, "/slots")).code == 200


class Lines(FakeRunner):
    """Says a letter and a newline in turn."""

    def next_token(self, tokens: list[int], adapters: Any = ()) -> int:
        return 10 if tokens[-1] == ord("a") else ord("a")


async def test_an_editors_time_ends_an_answer_and_counts() -> None:
    async with governed(Lines(n_ctx=5000)) as gateway:
        body = {"prompt": "x", "n_predict": 3000, "t_max_predict_ms": 0, "temperature": 0}
        gateway.model.runner.step_s = 0.002
        for stream in (False, True):
            reply = await ask(gateway.api, "/completion", {**body, "stream": stream})
            last = reply.objects[-1] if stream else reply.json
            assert last["stop_type"] == "limit" and last["has_new_line"]
            assert 0 < last["tokens_predicted"] < 3000 and last["tokens_evaluated"] == 1
            await until(lambda: len(gateway.records) == 1 + stream)  # noqa: B023
            usage = gateway.records[-1].usage
            assert usage.completion_tokens == last["tokens_predicted"] and usage.prompt_tokens == 1
            assert gateway.records[-1].num_unfinished_tokens == 0, "nothing is charged twice"
            await until(lambda: gateway.model.stats().num_running == 0)
        many = await ask(
            gateway.api, "/completion", {**body, "t_max_predict_ms": -1, "n_cmpl": 2, "n_indent": 1}
        )
        assert [m["content"] for m in many.json] == ["a", "a"], "the next line is not indented"


def test_time_is_counted_from_the_first_token() -> None:
    clock = iter([10.0, 10.05, 10.2, 10.3])
    stopping = Stopping(max_ms=100, now=lambda: next(clock))
    assert [stopping.take(t, 1) for t in ("a", "b", "c")] == ["a", "b", "c"]
    assert not stopping.is_over, "there is no line yet"
    assert stopping.take("\n", 1) == "\n" and stopping.is_over
    assert stopping.so_far(7).usage.prompt_tokens == 7


def test_indentation_ends_where_a_block_does() -> None:
    stopping = Stopping(indent=4)
    parts = ["    a\n", "\n", "    b\n ", " x"]
    assert "".join(stopping.take(p, 1) for p in parts[:3]) == "    a\n\n    b\n "
    assert not stopping.is_over
    stopping.take(parts[3], 1)
    assert stopping.is_over and stopping.text == "    a\n\n    b"


def test_words_are_translated() -> None:
    body = parse(
        LlamaCompletionBody,
        json.dumps(
            {"prompt": "x", "n_predict": -1, "seed": -1, "repeat_last_n": -1, "typ_p": 0.5,
             "logit_bias": [[5, 1], [6, False]], "json_schema": {}, "repeat_penalty": 1.1}
        ).encode(),
    )  # fmt: skip
    sampling = body.sampling(MODEL)
    assert (sampling.max_tokens, sampling.seed, sampling.penalty_last_n) == (None, None, 512)
    assert sampling.logit_bias == ((5, 1.0), (6, -1e6)) and sampling.typical_p == 0.5
    assert sampling.repetition_penalty == 1.1
    assert sampling.grammar is not None and json.loads(sampling.grammar.text) == {"type": "object"}
    with pytest.raises(InvalidRequestError, match="input_suffix"):
        parse(InfillBody, b'{"input_prefix": ""}')
    fields: dict[str, Any] = {"max_tokens": -1, "n_predict": 5}
    translate(fields, lambda _: None)
    assert fields == {}
    with pytest.raises(InvalidRequestError, match="samplers"):
        translate({"samplers": "kfp"}, lambda _: None)
