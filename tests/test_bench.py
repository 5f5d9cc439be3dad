"""Measuring: what a load run counts, what `tune` compares with, and that no server is left over."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import ROOT
from fakes import FakeClient

from llmkit.bench import comparing, tuner, workload
from llmkit.bench.comparing import compare_models
from llmkit.bench.tuner import Trial, Tuning
from llmkit.bench.workload import Reply, _summary, run_load
from llmkit.errors import EngineError, InvalidRequestError, ModelLoadError
from llmkit.handle import Handle
from llmkit.llm import LLM
from llmkit.runtime.loaded import loaded


async def test_a_long_prompt_that_fails_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    good = Reply(0.0, [1.0, 2.0], 2.0, completion_tokens=2)
    found = _summary([good, good], 1, 4.0, Reply(1.0, error="HTTP 500"))
    assert (found.requests, found.errors, found.error) == (3, 1, "HTTP 500")
    assert found.tok_s == 1.0 and found.long_ttft_ms is None
    monkeypatch.setattr(workload, "LONG_DELAY_S", 0)
    nobody = await run_load("http://127.0.0.1:9/v1", workload="long", requests=2, concurrency=2)
    assert (nobody.requests, nobody.errors, nobody.tok_s) == (3, 3, 0)


def test_what_a_server_says_is_no_escape_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def fails(*_: Any, **__: Any) -> Any:
        return _summary([Reply(0.0, error="HTTP 500 \x1b[2Jboom")], 1, 1.0, None)

    monkeypatch.setattr(workload, "run_load", fails)
    load = {"clients": [1], "requests": 1, "seed": 0, "as_json": False}
    assert workload.main("http://h/v1", **load) == 1
    assert "HTTP 500 \\x1b[2Jboom" in capsys.readouterr().err


def trial(label: str, rate: float, **rest: Any) -> Trial:
    return Trial(label, {"threads": 1}, "m.gguf", rate, rate, rate, **rest)


def test_where_the_defaults_do_not_run_the_next_trial_is_compared_with() -> None:
    slow, fast = trial("threads=3", 100.0), trial("threads=2", 150.0)
    found = Tuning("m", [slow, fast])
    assert found.best is fast and found.speedup == pytest.approx(1.5)
    assert "1.50x threads=3 with" in repr(found) and "the defaults do not run here" in repr(found)
    assert found.df.ratio.tolist() == pytest.approx([1, 1.5])
    alone = Tuning("m", [slow])
    assert alone.best is slow and alone.speedup == 1
    assert "best: threads=3;" in repr(alone) and "the defaults do not run here" in repr(alone)
    coarse = Tuning("m", [trial("kv_type='q8_0'", 100.0, agreement=0.5), fast])
    assert coarse.baseline is coarse.best is fast, "what answers otherwise is no measure"
    usual = Tuning("m", [trial("defaults", 100.0), fast])
    assert "1.50x the defaults" in repr(usual) and "do not run" not in repr(usual)


class Runner:
    """Runs with two threads only."""

    def __init__(self, threads: int) -> None:
        if threads != 2:
            raise ModelLoadError("no room")

    def close(self) -> None: ...


class Model:
    def __init__(self, path: Path) -> None: ...

    def close(self) -> None: ...


def test_trials_that_fail_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[Runner] = []

    def time(runner: Runner) -> Trial:
        timed.append(runner)
        if len(timed) == 1:
            raise RuntimeError("llama_decode failed")
        return Trial("", {}, "", 1.0, 1.0, 1.0)

    monkeypatch.setattr("llmkit.backend.model.LlamaModel", Model)
    monkeypatch.setattr(
        tuner, "_runner", lambda model, n_slots, threads=1, **options: Runner(threads)
    )
    monkeypatch.setattr(tuner, "_time", time)
    measure: Callable[..., Any] = tuner._measure
    candidates = [("defaults", {}), ("fails", {"threads": 2}), ("threads=2", {"threads": 2})]
    (found,) = measure(Path("m.gguf"), candidates)
    assert found.label == "threads=2" and len(timed) == 3, "the first that runs is warmed up"
    with pytest.raises(EngineError, match=r"m\.gguf could not be measured here: no room"):
        list(measure(Path("m.gguf"), candidates[:1]))


def test_compare_knows_the_model_of_a_file_whatever_was_made_of_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A model that was loaded with ``quantize=`` has another file than its name says."""
    monkeypatch.setattr(
        comparing, "resolve", lambda name: SimpleNamespace(path=Path(f"{name}.f16"))
    )
    monkeypatch.setattr(comparing, "_measure", lambda *_: measured.append(1) or {})
    measured: list[int] = []
    mine = LLM(FakeClient("mine"))
    hears = Handle(FakeClient("hears"))
    hears._description = replace(hears.model, hears=True)
    made: list[LLM] = []

    def load(name: str, **_: Any) -> LLM:
        made.append(LLM(FakeClient(name)))
        return made[-1]

    loaded.add(Path("mine.f16"), mine)
    loaded.add(Path("hears.f16"), hears)
    given = ("text to score", 1, 16, 64, {})
    try:
        rows = compare_models(load, ["other", "mine"], *given).df
        assert list(rows.index) == ["other", "mine"] and len(measured) == 2
        assert [llm.name for llm in made] == ["other"] and made[0].closed and not mine.closed
        with pytest.raises(InvalidRequestError, match="'hears' does not write"):
            compare_models(load, ["other", "hears"], *given)
        assert len(made) == 1 and len(measured) == 2, "before the first is measured"
    finally:
        for handle in (mine, hears):
            loaded.forget(handle)
            handle.unload()


def test_a_comparison_that_does_not_start_leaves_no_server(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    compare = importlib.import_module("compare")
    running: list[str] = []

    class Arm:
        def __init__(self, label: str, *_: Any) -> None:
            self.label = label
            running.append(label)

        def close(self) -> None:
            running.remove(self.label)

    def fails(*_: Any) -> None:
        assert running == ["engine", "jupyter"]
        raise RuntimeError("does not answer")

    monkeypatch.setattr(compare, "EngineArm", lambda *_: Arm("engine"))
    monkeypatch.setattr(compare, "JupyterArm", lambda *_: Arm("jupyter"))
    monkeypatch.setattr(compare, "gateway_arm", fails)
    args = argparse.Namespace(threads=1, against=None, no_peer=True, unified=False, clients=[1])
    with pytest.raises(RuntimeError, match="does not answer"):
        compare.run("unique", "m.gguf", args)
    assert running == []
    arms = importlib.import_module("arms")
    ended = tmp_path / "ended"
    code = f"import atexit, pathlib; atexit.register(pathlib.Path({str(ended)!r}).touch)"
    process = arms.subprocess.Popen([sys.executable, "-c", code])
    with pytest.raises(RuntimeError, match="gone does not answer"):
        arms.ServerArm("gone", "http://127.0.0.1:9/v1", "", process)
    assert process.returncode == 0 and ended.exists()
