"""What llama-server says of its models: their list (recorded from llama-server b1-0c1e570), and
LoRA adapters, which its clients scale for one request or for all."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import tiny_models
from compat_gateway import Raw, curl
from gateway_client import Api, serve

from llmkit.bridge.server import BridgeServer
from llmkit.runtime.local import LocalEngine

pytestmark = pytest.mark.model

DATA = {"id", "aliases", "tags", "object", "created", "owned_by", "meta"}  # in /v1/models
LISTED = {
    "name", "model", "modified_at", "size", "digest", "type", "description", "tags",
    "capabilities", "parameters", "details",
}  # fmt: skip
DETAILS = {
    "parent_model", "format", "family", "families", "parameter_size", "quantization_level",
}  # fmt: skip
BODY = {"prompt": "hello there", "n_predict": 8, "temperature": 0, "ignore_eos": True}
CHAT = {"messages": [{"role": "user", "content": "hello there"}], "max_tokens": 8,
        "temperature": 0, "logprobs": True, "ignore_eos": True}  # fmt: skip


@pytest.fixture
async def styled(tmp_path: Path) -> AsyncIterator[Api]:
    """A model with two adapters: what they do is asked of "loud" alone, at 1."""
    base = tiny_models.write(tmp_path / "base.gguf", "llama")
    loud = tiny_models.write_lora(tmp_path / "loud.gguf")
    calm = tiny_models.write_lora(tmp_path / "calm.gguf", 0.5)
    # Their order is not that of their names.
    engine = LocalEngine(base, n_ctx=256, n_slots=2, lora={loud: 1.0, calm: 0.0})
    bridge = BridgeServer(engine)
    async for api in serve("key", admin=True):
        yield api
    bridge.close()
    engine.close()


async def ask(api: Api, path: str, body: Any = None) -> Raw:
    return await curl(api.url, path, body, headers={"Authorization": "Bearer key"})


async def logprobs(api: Api, lora: list[dict[str, float]] | None = None) -> list[float]:
    more = {} if lora is None else {"lora": lora}
    reply = await ask(api, "/completion", {**BODY, "n_probs": 1, **more})
    assert reply.code == 200, reply.text
    return [entry["logprob"] for entry in reply.json["completion_probabilities"]]


def same(some: list[float], others: list[float]) -> bool:
    """Whether they are alike; what was cached is rounded otherwise."""
    return some == pytest.approx(others, abs=0.02)


@pytest.fixture
async def real(engine: LocalEngine) -> AsyncIterator[Api]:
    bridge = BridgeServer(engine)
    async for api in serve("key", admin=True):
        yield api
    bridge.close()


async def test_models_have_its_fields(real: Api) -> None:
    models = (await ask(real, "/v1/models")).json
    (meta,) = (each["meta"] for each in models["data"])
    sizes = {"n_vocab": 49152, "n_ctx": 1024, "n_ctx_train": 8192, "n_embd": 576}
    wanted = {**sizes, "n_params": 134515008, "vocab_type": 2}
    assert wanted.items() <= meta.items() and {"size", "ftype"} <= meta.keys()
    assert models["data"][0].keys() >= DATA and models["data"][0]["aliases"] == ["smollm2"]
    (listed,) = models["models"]
    assert listed.keys() == LISTED and listed["details"].keys() == DETAILS
    assert (listed["name"], listed["model"]) == ("smollm2", "smollm2")


async def test_a_model_without_adapters_has_none(real: Api) -> None:
    assert (await ask(real, "/lora-adapters")).json == []
    assert (await ask(real, "/lora-adapters", [])).json == {"success": True}
    assert (await ask(real, "/lora-adapters", [{"id": 3, "scale": 0}])).code == 200, "it is off"
    bad: Any
    for bad in ([{"id": 0, "scale": 1.0}], {}, [1], b"]", b'[], "x": 1'):
        assert (await ask(real, "/lora-adapters", bad)).code == 400, bad


async def test_what_is_loaded_is_listed(styled: Api, tmp_path: Path) -> None:
    listed = (await ask(styled, "/lora-adapters")).json
    assert listed == [
        {"id": i, "path": str(tmp_path / f"{name}.gguf"), "scale": scale, "task_name": "",
         "prompt_prefix": ""}
        for i, (name, scale) in enumerate((("loud", 1.0), ("calm", 0.0)))
    ]  # fmt: skip


async def test_a_request_scales_its_own(styled: Api) -> None:
    loud, plain = await logprobs(styled), await logprobs(styled, [{"id": 0, "scale": 0}])
    assert not same(loud, plain)
    assert same(await logprobs(styled, [{"id": 0, "scale": 1}]), loud)
    assert same(await logprobs(styled, []), loud), "none is named: as they were loaded"
    calm = await logprobs(styled, [{"id": 1, "scale": 1}])
    assert not same(calm, loud) and not same(calm, plain), "those that are not named are off"
    reply = await ask(styled, "/completion", {**BODY, "lora": [{"id": 1, "scale": 0.5}]})
    assert reply.json["generation_settings"]["lora"] == [{"id": 1, "scale": 0.5}]
    for wrong in ([{"id": 2, "scale": 1}], [{"id": -1, "scale": 1}], [{"id": 0, "scale": 1e9}]):
        for path, body in (("/completion", BODY), ("/v1/chat/completions", CHAT)):
            reply = await ask(styled, path, {**body, "lora": wrong})
            assert reply.code == 400 and "lora" in reply.json["error"]["message"], reply.text


async def test_an_administrator_scales_for_all(styled: Api) -> None:
    async def chat(**more: Any) -> list[float]:
        reply = await ask(styled, "/v1/chat/completions", {**CHAT, **more})
        assert reply.code == 200, reply.text
        return [c["logprob"] for c in reply.json["choices"][0]["logprobs"]["content"]]

    loud, plain = await logprobs(styled), await logprobs(styled, [{"id": 0, "scale": 0}])
    said, said_plainly = await chat(), await chat(lora=[{"id": 0, "scale": 0}])
    assert not same(said, said_plainly), "OpenAI's chat knows llama-server's word"
    reply = await ask(styled, "/lora-adapters", [{"id": 1, "scale": 0.0}])
    assert reply.json == {"success": True}
    assert [a["scale"] for a in (await ask(styled, "/lora-adapters")).json] == [0.0, 0.0]
    assert same(await logprobs(styled), plain) and same(await chat(), said_plainly)
    own = await logprobs(styled, [{"id": 0, "scale": 1}])
    assert same(own, loud), "a request may say otherwise"
    await ask(styled, "/lora-adapters", [{"id": 0, "scale": 1}])
    assert same(await logprobs(styled), loud) and same(await chat(), said)
    refused = await ask(styled, "/lora-adapters", [{"id": 7, "scale": 1}])
    assert refused.code == 400 and "0 to 1" in refused.json["error"]["message"]
    stranger = await curl(styled.url, "/lora-adapters", [])
    assert stranger.code == 401


async def test_paths_are_for_administrators_and_scales_too(tmp_path: Path) -> None:
    base = tiny_models.write(tmp_path / "base.gguf", "llama")
    engine = LocalEngine(base, n_ctx=64, lora=tiny_models.write_lora(tmp_path / "a.gguf"))
    bridge = BridgeServer(engine)
    async for api in serve(None):
        forwarded = {"X-Forwarded-For": "203.0.113.9"}  # whom a proxy lets in is not the owner
        listed = await curl(api.url, "/lora-adapters", headers=forwarded)
        assert [a["path"] for a in listed.json] == ["a.gguf"]
        refused = await curl(api.url, "/lora-adapters", [])
        assert refused.code == 404 and "--admin" in json.loads(refused.text)["error"]["message"]
    bridge.close()
    engine.close()
