"""Models of other processes: ``isolated=True`` (a child) and ``attach`` (somebody else's), with
real processes and the real model."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import psutil
import pytest
import tiny_models
from children import children
from fakes import FakeClient, wait_for

import llmkit
from llmkit.bridge.connection import find_connections
from llmkit.errors import (
    EngineGoneError,
    InvalidRequestError,
    ModelNotFoundError,
    ModelUnloadedError,
)
from llmkit.handle import Handle
from llmkit.models.registry import resolve
from llmkit.protocol import Origin
from llmkit.settings.options import EngineOptions
from llmkit.system.process import process_start_time
from llmkit.workers import isolated

pytestmark = pytest.mark.model


@pytest.fixture(autouse=True)
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))
    return tmp_path / "runtime"


def test_a_model_in_a_process_of_its_own() -> None:
    own = psutil.Process().memory_info().rss
    llm = llmkit.load("smollm2", n_ctx=512, n_slots=2, isolated=True)
    (connection,) = find_connections()
    assert connection.pid != os.getpid() and connection.model.name == llm.name == "smollm2"
    assert llmkit.load("smollm2", n_ctx=512, n_slots=2, isolated=True) is llm
    assert "Paris" in llm.generate("The capital of France is", temperature=0, max_tokens=8).text
    assert "".join(llm.stream("Once", max_tokens=5, ignore_eos=True)) == llm.last.text  # type: ignore[union-attr]
    assert len(llm.generate(["a", "b", "c"], max_tokens=3)) == 3
    assert psutil.Process().memory_info().rss - own < 60 << 20, "the weights are not here"
    monitor = llm.monitor()
    assert monitor.sample().rss_bytes == pytest.approx(
        psutil.Process(connection.pid).memory_info().rss, rel=0.2
    )
    with pytest.raises(InvalidRequestError, match="other settings"):
        llmkit.load("smollm2", n_ctx=256, isolated=True)
    llm.unload()
    assert not psutil.pid_exists(connection.pid) and find_connections() == []
    with pytest.raises(ModelUnloadedError):
        llm.generate("a")


def test_its_death_is_an_error_here_and_not_the_end() -> None:
    llm = llmkit.load("smollm2", n_ctx=512, n_slots=2, isolated=True)
    (connection,) = find_connections()
    stream = llm.stream("Once upon a time", max_tokens=450, ignore_eos=True)
    pieces = iter(stream)
    next(pieces)
    os.kill(connection.pid, signal.SIGKILL)
    with pytest.raises(EngineGoneError, match="ended"):
        stream.result(30)
    wait_for(lambda: llm.closed)
    again = llmkit.load("smollm2", n_ctx=512, n_slots=2, isolated=True)
    assert (
        again is not llm
        and again.generate("a", max_tokens=2, ignore_eos=True).usage.completion_tokens == 2
    )
    again.unload()


def test_loads_that_fail(tmp_path: Path) -> None:
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(b"GGUF and nothing else")
    with pytest.raises(llmkit.InvalidModelFileError):
        llmkit.load(bad, isolated=True)
    with pytest.raises(llmkit.InsufficientMemoryError, match="n_ctx"):
        llmkit.load("smollm2", isolated=True, n_ctx=8192, n_slots=256)
    wait_for(lambda: not children("isolated"))


def test_every_option_reaches_the_child(tmp_path: Path) -> None:
    tiny, lora = (
        tiny_models.write(tmp_path / "tiny.gguf", "llama"),
        tiny_models.write_lora(tmp_path / "change.gguf"),
    )
    with llmkit.load(
        tiny,
        isolated=True,
        n_ctx=256,
        n_slots=2,
        lora={lora: 0.5},
        prefix_dir=tmp_path / "kv",
        context_shift=True,
    ) as llm:
        changed = llm.generate("abc", max_tokens=8, temperature=0, ignore_eos=True)
        assert (
            llm.generate("abc", max_tokens=8, temperature=0, ignore_eos=True, lora={}).tokens
            != changed.tokens
        )
        assert llm.generate("abc", max_tokens=300, ignore_eos=True).usage.completion_tokens == 300
        llm.generate("some words " * 10, max_tokens=2, ignore_eos=True)
    assert list((tmp_path / "kv").glob("*.kv")), "it had the time to say farewell"


def test_a_busy_owner_is_not_taken_for_gone() -> None:
    """A cell that holds the interpreter for longer than a gateway may be silent."""
    code = """
import ctypes, llmkit
llm = llmkit.load("smollm2", n_ctx=512, n_slots=1, isolated=True)
stream = llm.stream("Once upon a time", max_tokens=60, ignore_eos=True)
ctypes.PyDLL(None).usleep(4_000_000)  # in one go: between two calls the bridge would run
print(stream.result(300).usage.completion_tokens)
llm.unload()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == "60\n", done


def test_serving_an_isolated_model_outside_jupyter() -> None:
    with llmkit.load("smollm2", n_ctx=256, n_slots=1, isolated=True) as llm:
        endpoint = llm.serve()
        request = urllib.request.Request(
            f"{endpoint.url}/models", headers={"Authorization": f"Bearer {endpoint.api_key}"}
        )
        with urllib.request.urlopen(request, timeout=20) as reply:
            assert [m["id"] for m in json.load(reply)["data"]] == ["smollm2"]
    with (
        llmkit.load("smollm2", n_ctx=256, n_slots=1, isolated=True, share=False) as llm,
        pytest.raises(InvalidRequestError, match="share"),
    ):
        llm.serve()


def test_it_ends_with_its_owner_and_hides_when_asked() -> None:
    code = """
import llmkit, sys, time
llm = llmkit.load("smollm2", n_ctx=256, n_slots=1, isolated=True, share=False)
print(llm.engine.origin.pid, flush=True)
print(llm.generate("a", max_tokens=1).usage.completion_tokens, flush=True)
time.sleep(60)
"""
    owner = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    child = int(owner.stdout.readline())
    assert owner.stdout.readline() == "1\n" and find_connections() == []
    owner.kill()
    owner.communicate()
    wait_for(lambda: process_start_time(child) is None)


@pytest.mark.parametrize("shared", [True, False])
def test_a_second_load_cannot_change_who_finds_it(
    monkeypatch: pytest.MonkeyPatch, shared: bool
) -> None:
    origin = Origin("process", 1, shared=shared)
    monkeypatch.setattr(FakeClient, "origin", origin)
    options = EngineOptions(isolated=True)
    with Handle(FakeClient(), None, options) as handle:
        for same in (shared, None):
            handle.check_same(options, None, share=same)
        with pytest.raises(InvalidRequestError, match=rf"share={not shared}; unload\(\) it first"):
            handle.check_same(options, None, share=not shared)


def test_attach_to_the_model_of_another_process() -> None:
    with pytest.raises(ModelNotFoundError, match="none at all"):
        llmkit.attach()
    code = (
        "import llmkit, sys; llm = llmkit.load('smollm2', n_ctx=512, n_slots=2, name='theirs'); "
        "print('ready', flush=True); sys.stdin.read(); llm.unload()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert (
        other.stdout is not None
        and other.stdin is not None
        and other.stdout.readline() == "ready\n"
    )
    with pytest.raises(ModelNotFoundError, match=f"'theirs@{other.pid}'"):
        llmkit.attach("ours")
    llm = llmkit.attach("theirs")
    assert llmkit.attach(f"theirs@{other.pid}").name == "theirs"
    assert "Paris" in llm.generate("The capital of France is", temperature=0, max_tokens=8).text
    assert llm.profile(prompt_tokens=[16], batch_sizes=[1], max_tokens=4).df is not None
    stats = llmkit.attach().stats
    assert stats.num_slots == 2
    llm.unload()
    again = llmkit.attach()
    assert again.generate("a", max_tokens=1).usage.completion_tokens == 1, (
        "letting go left it loaded"
    )
    other.communicate(timeout=60)
    wait_for(lambda: again.closed)
    with pytest.raises(EngineGoneError):
        again.generate("a")


def test_the_stop_button_spares_the_child() -> None:
    """Jupyter signals the whole process group of a kernel."""
    code = """
import llmkit, threading, time
llm = llmkit.load("smollm2", n_ctx=2048, n_slots=1, isolated=True)
def tell():
    while llm.stats.generation_tokens_total < 5: time.sleep(0.01)
    print("ready", flush=True)
threading.Thread(target=tell).start()
try: llm.generate("Once", max_tokens=2000, ignore_eos=True)
except KeyboardInterrupt: print("stopped", len(llm.last.text) > 0, flush=True)
print(llm.generate("a", max_tokens=2, ignore_eos=True).usage.completion_tokens)
llm.unload()
"""
    kernel = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert kernel.stdout is not None and kernel.stdout.readline() == "ready\n"
    os.killpg(kernel.pid, signal.SIGINT)
    out, _ = kernel.communicate(timeout=60)
    assert out == "stopped True\n2\n" and kernel.returncode == 0


def test_the_progress_of_a_load_in_another_process_is_seen() -> None:
    shares: list[float] = []
    spec = resolve("smollm2")
    engine = isolated.start(spec, EngineOptions(n_ctx=64, n_slots=1), on_progress=shares.append)
    assert shares == sorted(shares) and shares[-1] == 1.0 and engine.state.phase == "ready"
    engine.close()
