"""Weights in another type: made once, kept, and loaded."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import gguf as reader_package
import numpy as np
import pytest
import tiny_models

import llmkit
from llmkit.cli import main
from llmkit.errors import InvalidRequestError
from llmkit.models.copies import copies_of, places_for
from llmkit.models.gguf import read_header
from llmkit.models.library import Library
from llmkit.models.quantization import TYPES, bits_of, kind_of, scaled, step_to, type_of
from llmkit.models.registry import ModelSpec, cache_folder, resolve
from llmkit.runtime import quantizing
from llmkit.runtime.quantizing import Quantized, quantized

pytestmark = [pytest.mark.model, pytest.mark.usefixtures("own_cache")]


def values(path: Path) -> dict[str, np.ndarray]:
    return {
        t.name: reader_package.quants.dequantize(t.data, t.tensor_type)
        for t in reader_package.GGUFReader(path).tensors
    }


# The most that a value may be off, relative to the largest of its tensor.
@pytest.mark.parametrize(
    ("kind", "error"),
    [("F16", 0.001), ("Q8_0", 0.01), ("Q6_K", 0.05), ("Q4_K_M", 0.1), ("Q2_K", 0.4)],
)
def test_the_weights_are_the_models(kind: str, error: float, tiny: ModelSpec) -> None:
    seen: list[float] = []
    done = quantized(tiny, kind.lower(), on_progress=seen.append)
    assert done.made and type_of(read_header(done.path)) == kind
    assert done.path.parent == tiny.path.parent / ".llmkit" and done.path.stem.startswith("tiny-")
    before, after = values(tiny.path), values(done.path)
    assert before.keys() == after.keys()
    for name, weights in before.items():
        assert np.abs(weights - after[name]).max() <= error * np.abs(weights).max(), name
    assert seen == sorted(seen) and (not seen or seen[-1] == 1.0)
    expected = scaled(read_header(tiny.path), kind).file_bytes
    assert 0.9 < done.path.stat().st_size / expected < 1.1, "what the disk was asked for"
    with llmkit.load(done.path, n_ctx=256, n_slots=1, share=False) as llm:
        assert llm.generate("a", max_tokens=3, ignore_eos=True).usage.completion_tokens == 3


@pytest.mark.parametrize("architecture", ["mamba", "jamba"])
def test_other_families(architecture: str, tmp_path: Path) -> None:
    spec = resolve(tiny_models.write(tmp_path / "m.gguf", architecture))
    done = quantized(spec, "Q4_K_M")
    with llmkit.load(done.path, n_ctx=256, n_slots=1, share=False) as llm:
        assert llm.generate("a", max_tokens=3, ignore_eos=True).usage.completion_tokens == 3


def test_it_is_made_once(tiny: ModelSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    done = quantized(tiny, "Q8_0")
    monkeypatch.setattr(quantizing, "_run", lambda *a: pytest.fail("made again"))
    assert quantized(tiny, "Q8_0") == Quantized(done.path)
    assert copies_of([tiny.path]) == [done.path]
    assert Library(tiny.path.parent).models()[0].id == "tiny", "the copy is no model of its own"
    monkeypatch.undo()
    done.path.write_bytes(done.path.read_bytes()[:1000])
    assert quantized(tiny, "Q8_0").made, "a damaged copy is made again"
    tiny_models.write(tiny.path, "llama", seed=1)
    newer = quantized(tiny, "Q8_0")
    assert newer.made and newer.path != done.path, "the file has changed"
    assert not done.path.exists(), "nobody would find the former one again"


def test_where_copies_are_kept(tiny: ModelSpec, tmp_path: Path) -> None:
    (tiny.path.parent / ".llmkit").write_text("no folder")  # as one that cannot be written
    assert quantized(tiny, "Q8_0").path.parent == cache_folder()
    packaged = tmp_path / "lib" / "site-packages" / "p" / "m.gguf"
    packaged.parent.mkdir(parents=True)
    shutil.copy(tiny.path, packaged)
    assert places_for([packaged], "Q8_0")[0].parent == cache_folder()
    in_cache = tmp_path / "cache" / "huggingface" / "hub" / "models--o--r" / "x.gguf"
    in_cache.parent.mkdir(parents=True)
    shutil.copy(tiny.path, in_cache)
    assert all(p.parent != in_cache.parent for p in places_for([in_cache], "Q8_0")[-1:])
    long = tmp_path / f"{'ü' * 120}.gguf"
    shutil.copy(tiny.path, long)
    assert quantized(resolve(long), "Q8_0").made
    strange = tmp_path / "a\n-b'\"$(x).gguf"
    shutil.copy(tiny.path, strange)
    assert quantized(resolve(strange), "Q8_0").made


def test_what_gains_nothing(tiny: ModelSpec) -> None:
    q8 = ModelSpec("q8", quantized(tiny, "Q8_0").path)
    same = quantized(q8, "Q8_0")
    assert same.path == q8.path and not same.made and same.note == "q8 is Q8_0 already."
    with pytest.raises(InvalidRequestError, match="q8 is Q8_0: F16 is larger and cannot restore"):
        quantized(q8, "F16")
    assert "cannot restore the precision" in quantized(q8, "F16", upward=True).note
    assert "a second time" in quantized(q8, "Q4_0").note
    assert quantized(tiny, "Q4_0").note == ""
    assert quantized(ModelSpec("f16", quantized(tiny, "F16").path), "BF16").note == ""


def test_types_that_a_model_may_have(tiny: ModelSpec) -> None:
    info = read_header(tiny.path)
    assert type_of(info) == "F32" and step_to(info, "F16") == "down" and bits_of(info) == 32
    claims = dict(info.metadata)
    for claim in (15, 99, -1, True, "x", 1024 + 15, 2**70):
        lying = info.__class__(info.path, info.file_bytes, {**claims, "general.file_type": claim},
                               info.tensors)  # fmt: skip
        assert type_of(lying) == "F32", "a header that claims too much"
    assert math.isclose(bits_of(scaled(info, "F16")), 16, rel_tol=0.01)
    for kind, made in TYPES.items():
        assert kind_of(kind.lower()) == kind and made.bits > 2


@pytest.mark.parametrize("text", ["", "q9", "Q4_K_M; rm -rf /", "IQ1_S", "Q4_K_M\0", "x" * 9999])
def test_types_that_are_none(text: str, tiny: ModelSpec) -> None:
    with pytest.raises(InvalidRequestError, match="not a type of weights"):
        quantized(tiny, text)
    with pytest.raises(InvalidRequestError, match="quantize must be one of"):
        llmkit.estimate(tiny.path, quantize=text)


def test_load_in_a_smaller_type(tiny: ModelSpec, capfd: pytest.CaptureFixture[str]) -> None:
    whole, small = (llmkit.estimate(tiny.path, quantize=kind) for kind in (None, "Q4_K_M"))
    assert small.weights_bytes < whole.weights_bytes / 3
    options: dict[str, Any] = {"n_ctx": 256, "n_slots": 1, "share": False}
    with llmkit.load(tiny.path, quantize="Q8_0", **options) as llm:
        assert llm.name == "tiny" and llm.model.quantization == "Q8_0"
        first = llm.generate("abc", max_tokens=8, temperature=0, ignore_eos=True).text
        assert llmkit.load(tiny.path, quantize="Q8_0", **options) is llm
    (copy,) = copies_of([tiny.path])
    with llmkit.load(copy, **options) as llm:
        assert llm.generate("abc", max_tokens=8, temperature=0, ignore_eos=True).text == first
    with llmkit.load(tiny.path, quantize="Q8_0", isolated=True, **options) as llm:
        assert llm.generate("abc", max_tokens=8, temperature=0, ignore_eos=True).text == first
    assert copies_of([tiny.path]) == [copy]
    with pytest.raises(InvalidRequestError, match="cannot restore the precision"):
        llmkit.load(copy, quantize="F16", **options)
    with (
        pytest.warns(RuntimeWarning, match="a second time"),
        llmkit.load(copy, quantize="Q4_0", **options) as llm,
    ):
        assert llm.model.quantization == "Q4_0"


def test_adapters_fit_the_smaller_model(tiny: ModelSpec, tmp_path: Path) -> None:
    lora = tiny_models.write_lora(tmp_path / "lora.gguf")
    before = lora.read_bytes()
    with llmkit.load(
        tiny.path, quantize="Q8_0", lora=str(lora), n_ctx=256, n_slots=1, share=False
    ) as llm:
        on = llm.generate("abc", max_tokens=8, temperature=0, ignore_eos=True).text
        off = llm.generate("abc", max_tokens=8, temperature=0, ignore_eos=True, lora={}).text
        assert on != off
    assert lora.read_bytes() == before


def test_the_command(tiny: ModelSpec, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.gguf"
    assert main(["quantize", str(tiny.path), "q8_0", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}\n" and type_of(read_header(out)) == "Q8_0"
    assert main(["quantize", str(tiny.path), "Q8_0", str(out)]) == 1
    assert "exists already" in capsys.readouterr().err
    assert main(["quantize", str(tiny.path), "Q4_K_M", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["made"] and told["type"] == "Q4_K_M" and "29 of 39 tensors" in told["notes"][0]
    assert main(["quantize", str(out), "F16"]) == 0
    assert "cannot restore the precision" in capsys.readouterr().err
    assert main(["quantize", str(tiny.path), "Q4_K_N"]) == 1
    assert "did you mean 'Q4_K_S' or 'Q4_K_M'" in capsys.readouterr().err
    assert main(["quantize", str(tmp_path / "none.gguf"), "Q8_0"]) == 1


def test_the_embedded_model(tmp_path: Path) -> None:
    """Q4_1 as packaged, to F16 and down again: the same answer as from Q4_1 at once."""
    f16 = llmkit.quantize("smollm2", "F16")
    assert read_header(f16).quantization == "F16" and f16.parent == cache_folder()
    assert llmkit.quantize("smollm2", "Q4_1") == resolve("smollm2").path
    down = llmkit.quantize(f16, "Q8_0")
    at_once = llmkit.quantize("smollm2", "Q8_0")
    assert down.stat().st_size == at_once.stat().st_size < f16.stat().st_size
    said = []
    for path in (down, at_once):
        with llmkit.load(path, n_ctx=512, n_slots=1, share=False) as llm:
            said.append(llm.generate("The capital of France is", max_tokens=12, temperature=0).text)
    assert said[0] == said[1] and "Paris" in said[0]
    with pytest.raises(InvalidRequestError, match="smollm2 is Q4_1: F16 is larger"):
        llmkit.load("smollm2", quantize="F16", share=False)
