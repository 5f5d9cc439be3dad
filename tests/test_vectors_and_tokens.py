"""Embeddings, rerank and the tokenizer's routes: strict shapes on the fake model, the stock client
on the real ones."""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import AsyncIterator, Iterator
from typing import Any

import numpy as np
import openai
import pytest
from fakes import FakeClient
from gateway_client import Api, is_error, serve

import llmkit
from llmkit.bridge.server import BridgeServer
from llmkit.runtime.local import LocalEngine


@pytest.fixture
def vectors(model: FakeClient) -> Iterator[FakeClient]:
    from dataclasses import replace

    client = FakeClient("vectors")
    client.description = replace(client.description, embedding_size=2)
    bridge = BridgeServer(client)
    yield client
    bridge.close()
    client.close()


@pytest.fixture
async def api(model: FakeClient, vectors: FakeClient) -> AsyncIterator[Api]:
    async for api in serve(None):
        yield api


@pytest.mark.parametrize(
    ("given", "count"), [("four", 1), (["a", "bc"], 2), ([1, 2, 3], 1), ([[1, 2], [3]], 2)]
)
async def test_embeddings(api: Api, given: Any, count: int) -> None:
    status, body = await api.post("/v1/embeddings", {"input": given})
    assert status == 200 and body["object"] == "list" and body["model"] == "vectors", (
        "default is the newest that can embed"
    )
    assert [d["index"] for d in body["data"]] == list(range(count)) and all(
        d["object"] == "embedding" and len(d["embedding"]) == 2 for d in body["data"]
    )
    assert body["usage"]["prompt_tokens"] == body["usage"]["total_tokens"] > 0
    _, packed = await api.post(
        "/v1/embeddings",
        {"input": given, "encoding_format": "base64", "model": "vectors", "user": "me"},
    )
    for plain, binary in zip(body["data"], packed["data"], strict=True):
        assert (
            list(struct.unpack("<2f", base64.b64decode(binary["embedding"]))) == plain["embedding"]
        )


async def test_dimensions_are_cut_and_normalised(api: Api) -> None:
    _, body = await api.post("/v1/embeddings", {"input": "four", "dimensions": 1})
    assert body["data"][0]["embedding"] == [1.0]
    _, whole = await api.post("/v1/embeddings", {"input": "four", "dimensions": 2})
    assert whole["data"][0]["embedding"] == [4.0, 1.0]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/embeddings", {"input": []}, "input"),
        ("/v1/embeddings", {"input": [""]}, "input"),
        ("/v1/embeddings", {"input": [1, "a"]}, "input"),
        ("/v1/embeddings", {"input": "a", "dimensions": 3}, "dimensions"),
        ("/v1/embeddings", {"input": "a", "encoding_format": "hex"}, "encoding_format"),
        ("/v1/embeddings", {}, "input"),
        ("/v1/embeddings", {"input": "a", "surprise": 1}, "surprise"),
        ("/v1/rerank", {"query": "q", "documents": []}, "documents"),
        ("/v1/rerank", {"query": "q", "documents": ["a"], "top_n": 0}, "top_n"),
        ("/v1/rerank", {"documents": ["a"]}, "query"),
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"content": "a", "prompt": "b"}, "prompt"),
        ("/detokenize", {"tokens": ["a"]}, "tokens"),
        ("/detokenize", {"tokens": [300]}, "tokens"),
        ("/apply-template", {"messages": [{"role": "king", "content": "a"}]}, "messages"),
    ],
)
async def test_bad_input_names_the_field(api: Api, path: str, body: Any, param: str) -> None:
    error = is_error(await api.fetch("POST", path, body), 400)
    assert error["param"] == param


async def test_rerank(api: Api) -> None:
    status, body = await api.post(
        "/v1/rerank",
        {
            "query": "aa",
            "documents": ["x", {"text": "yyy"}, "zz"],
            "top_n": 2,
            "return_documents": True,
        },
    )
    assert (
        status == 200
        and [r["index"] for r in body["results"]] == [1, 2]
        and body["results"][0]["document"] == {"text": "yyy"}
    )
    assert (
        body["results"][0]["relevance_score"] >= body["results"][1]["relevance_score"]
        and body["object"] == "list"
        and body["usage"]["total_tokens"] == 8
    )
    for path in ("/rerank", "/reranking", "/v1/reranking"):
        assert (await api.post(path, {"query": "aa", "documents": ["x"]}))[0] == 200


async def test_the_wrong_kind_of_model(api: Api) -> None:
    error = is_error(
        await api.fetch("POST", "/v1/embeddings", {"input": "a", "model": "vectors-2"}), 404
    )
    assert error["code"] == "model_not_found"
    status, body = await api.post("/v1/completions", {"prompt": "hello", "max_tokens": 2})
    assert status == 200 and body["model"] == "fake", "default is the newest that can generate"


async def test_no_model_for_it(model: FakeClient) -> None:
    async for api in serve(None):
        error = is_error(await api.fetch("POST", "/v1/embeddings", {"input": "a"}), 404)
        assert "embed" in error["message"] and "minilm" in error["message"]


async def test_tokenize_in_both_dialects(api: Api) -> None:
    assert await api.post("/tokenize", {"content": "hé"}) == (200, {"tokens": list("hé".encode())})
    _, pieces = await api.post("/tokenize", {"content": "hé", "with_pieces": True})
    assert pieces["tokens"] == [
        {"id": 104, "piece": "h"},
        {"id": 195, "piece": [195]},
        {"id": 169, "piece": [169]},
    ]
    status, body = await api.post(
        "/tokenize",
        {"model": "fake", "prompt": "hi", "add_special_tokens": False, "return_token_strs": True},
    )
    assert (status, body) == (
        200,
        {"count": 2, "max_model_len": 5000, "tokens": [104, 105], "token_strs": ["h", "i"]},
    )
    _, chat = await api.post("/v1/tokenize", {"messages": [{"role": "user", "content": "hi"}]})
    assert chat["count"] == len("[user]hi") and chat["token_strs"] is None
    assert await api.post("/detokenize", {"tokens": [104, 105]}) == (
        200,
        {"content": "hi", "prompt": "hi"},
    )
    assert await api.post("/apply-template", {"messages": [{"role": "user", "content": "hi"}]}) == (
        200,
        {"prompt": "[user]hi"},
    )
    info = json.loads((await api.fetch("GET", "/tokenizer_info")).body)
    assert info["eos_token"] == "\0" and info["tokenizer_class"]


@pytest.mark.model
async def test_the_stock_client_and_the_real_models(engine: LocalEngine) -> None:
    bridge = BridgeServer(engine)
    with llmkit.load("minilm") as minilm:
        async for api in serve(None):
            client = openai.AsyncOpenAI(base_url=f"{api.url}/v1", api_key="none")
            texts = ["A man is eating food.", "Someone eats a meal!", "Granite is a rock."]
            found = await client.embeddings.create(model="minilm", input=texts)
            ours = minilm.embed(texts)
            assert (
                np.allclose([d.embedding for d in found.data], ours, atol=1e-6)
                and found.usage.total_tokens > 15
            )
            small = await client.embeddings.create(
                model="default",
                input="A man is eating food.",
                dimensions=64,
                encoding_format="float",
            )
            assert (
                len(small.data[0].embedding) == 64
                and abs(np.linalg.norm(small.data[0].embedding) - 1) < 1e-5
            )
            _, ranked = await api.post(
                "/v1/rerank",
                {
                    "query": "What can I eat?",
                    "documents": [texts[2], "Bread and soup make a good meal."],
                },
            )
            assert ranked["results"][0]["index"] == 1
            with pytest.raises(openai.BadRequestError, match="generates text"):
                await client.embeddings.create(model="smollm2", input="a")
            _, tokens = await api.post(
                "/tokenize",
                {
                    "model": "smollm2",
                    "prompt": "The capital of France is Zürich 🙂",
                    "add_special_tokens": False,
                },
            )
            assert tokens["tokens"] == engine.tokenize("The capital of France is Zürich 🙂")
            assert (
                await api.post("/detokenize", {"model": "smollm2", "tokens": tokens["tokens"]})
            )[1]["prompt"] == "The capital of France is Zürich 🙂"
            _, prompt = await api.post(
                "/apply-template",
                {"model": "smollm2", "messages": [{"role": "user", "content": "hi"}]},
            )
            assert (
                prompt["prompt"].endswith("<|im_start|>assistant\n")
                and "<|im_start|>user\nhi<|im_end|>" in prompt["prompt"]
            )
            _, counted = await api.post(
                "/tokenize", {"model": "smollm2", "messages": [{"role": "user", "content": "hi"}]}
            )
            usage = (
                await client.chat.completions.create(
                    model="smollm2", messages=[{"role": "user", "content": "hi"}], max_tokens=1
                )
            ).usage
            assert usage is not None and counted["count"] == usage.prompt_tokens
            await client.close()
    bridge.close()


@pytest.mark.model
def test_tokens_in_python() -> None:
    with llmkit.load("minilm", share=False) as llm:
        ids = llm.tokenize("hello world")
        assert len(ids) == 4 and "hello world" in llm.detokenize(ids)
