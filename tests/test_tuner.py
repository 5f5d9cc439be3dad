"""`llmkit.tune()`: on a tiny model, and prepared files on the real one. What is fastest is the
machine's business; that it is remembered and used is ours."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_models

import llmkit
from llmkit.backend.library import num_threads
from llmkit.bench import tuner
from llmkit.cli import main
from llmkit.errors import InvalidRequestError
from llmkit.models.gguf import read_header
from llmkit.models.registry import resolve

pytestmark = pytest.mark.model


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_tune_and_load(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tiny_models.write(tmp_path / "tiny.gguf", "llama")
    with pytest.raises(InvalidRequestError, match=r"llmkit\.tune"):
        llmkit.load(path, tuned=True)
    found = llmkit.tune(path)
    assert (
        found.trials[0].label == "defaults"
        and found.file == path
        and (found.df[list(tuner.RATES)] > 0).all().all()
    )
    assert found.speedup >= 1 and "defaults" in repr(found) and "<table" in found._repr_html_()
    assert tuner.tuned(resolve(path)) == (path, found.options)
    with llmkit.load(path, tuned=True, share=False, n_slots=1) as llm:
        assert (
            llm.name == "tiny"
            and llm.generate("a", max_tokens=2, ignore_eos=True).usage.completion_tokens == 2
        )
    assert main(["tune", str(path)]) == 0 and "Tuning(" in capsys.readouterr().out


def test_a_prepared_file(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    spec = resolve("smollm2")
    speed = {"Q4_1": 300.0, "Q8_0": 800.0, "Q4_0": 1000.0}

    def measure(path: Path, candidates: list[tuple[str, dict[str, object]]]) -> list[tuner.Trial]:
        rate = speed[read_header(path).quantization]
        return [
            tuner.Trial(label, options, str(path), rate, rate / 3, rate / 2)
            for label, options in candidates
        ]

    monkeypatch.setattr(tuner, "_measure", measure)
    found = llmkit.tune("smollm2")
    assert (
        found.file == llmkit.quantize(spec, "Q8_0") and found.speedup > 2 and "Q8_0" in repr(found)
    )
    rough = found.trials[-1]
    assert rough.label == "Q4_0" and rough.agreement < 0.9 <= found.best.agreement, (
        "a faster file that answers otherwise is not chosen"
    )
    with llmkit.load("smollm2", tuned=True, share=False, n_ctx=512, n_slots=1) as llm:
        assert (
            llm.model.quantization == "Q8_0"
            and llm.name == "smollm2"
            and "Paris" in llm.generate("The capital of France is", temperature=0).text
        )
    for file in cache.rglob("*Q8_0.gguf"):
        file.unlink()
    with pytest.raises(InvalidRequestError, match="not been tuned"):
        llmkit.load("smollm2", tuned=True)


def test_threads_are_measured_once_where_there_is_a_choice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    spec = resolve(tiny_models.write(tmp_path / "tiny.gguf", "llama"))
    monkeypatch.setattr("os.getloadavg", lambda: (0.0, 0.0, 0.0))
    with llmkit.load(spec.path, share=False, n_ctx=256, n_slots=1) as llm:
        assert llm._client._runner.num_threads == num_threads() and (
            num_threads() >= 4 or not list(cache.rglob("*.threads"))
        )  # type: ignore[union-attr]
    monkeypatch.setattr("llmkit.backend.llama.num_threads", lambda: 4)
    with llmkit.load(spec.path, share=False, n_ctx=256, n_slots=1) as llm:
        assert llm._client._runner.num_threads in (2, 4)  # type: ignore[union-attr]
        text = llm.generate("abc", max_tokens=5, temperature=0, ignore_eos=True).text
    (file,) = cache.rglob("*.threads")
    file.write_text('{"threads": 3}')
    monkeypatch.setattr("llmkit.runtime.threads._measure", lambda *_: pytest.fail("measured again"))
    with llmkit.load(spec.path, share=False, n_ctx=256, n_slots=1) as llm:
        assert llm._client._runner.num_threads == 3  # type: ignore[union-attr]
        assert llm.generate("abc", max_tokens=5, temperature=0, ignore_eos=True).text == text
    file.write_text('{"threads": 99}')
    monkeypatch.setattr("llmkit.runtime.threads._measure", lambda *_: None)
    with llmkit.load(spec.path, share=False, n_ctx=256, n_slots=1) as llm:
        assert llm._client._runner.num_threads == 4, "from another machine"  # type: ignore[union-attr]
