"""Dead is dead: what has ended says so everywhere, with its reason, and is loaded anew; a fault
ends exactly what it hit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import tiny_models
from fake_runner import FakeRunner
from fakes import FakeClient, ask, wait_for
from gateway_client import serve

import llmkit
from llmkit.bridge.client import BridgeClient
from llmkit.bridge.server import BridgeServer
from llmkit.engine.batch import Batch, StepOutput
from llmkit.errors import EngineError, EngineGoneError
from llmkit.runtime.local import LocalEngine


@pytest.fixture
def tiny(tmp_path: Path) -> Iterator[llmkit.LLM]:
    llm = llmkit.load(tiny_models.write(tmp_path / "tiny.gguf", "llama"), n_ctx=256, n_slots=2)
    yield llm
    llm.unload()


def crash(llm: llmkit.LLM) -> None:
    """As a bug, or a runner that breaks."""
    engine = llm.engine
    assert isinstance(engine, LocalEngine)

    def broken(_: Batch) -> StepOutput:
        raise RuntimeError("out of luck")

    engine._runner.execute = broken  # type: ignore[method-assign]
    with pytest.raises(EngineError, match="out of luck"):
        llm.generate("a", max_tokens=2)


def test_a_handle_says_that_its_engine_has_ended_and_load_loads_anew(tiny: llmkit.LLM) -> None:
    path = Path(tiny.model.path)
    assert not tiny.closed
    crash(tiny)
    wait_for(lambda: tiny.closed)
    assert "out of luck" in repr(tiny)
    with pytest.raises(EngineGoneError, match="out of luck"):
        tiny.generate("a")
    again = llmkit.load(path, n_ctx=256, n_slots=2)
    assert (
        again is not tiny
        and again.generate("a", max_tokens=2, ignore_eos=True).usage.completion_tokens == 2
    )
    again.unload()


async def test_the_gateway_says_so_too(tiny: llmkit.LLM) -> None:
    async for api in serve(None):
        assert (await api.fetch("GET", "/health")).code == 200
        crash(tiny)
        for _ in range(1000):
            health = await api.fetch("GET", "/health")
            if health.code == 503:
                break
            time.sleep(0.02)
        assert health.code == 503 and "out of luck" in json.loads(health.body)["error"]["message"]
        models = json.loads((await api.fetch("GET", "/v1/models")).body)
        assert (
            models["data"] == []
            and models["unavailable"][0]["id"] == tiny.name
            and "out of luck" in models["unavailable"][0]["reason"]
        )
        status, body = await api.post("/v1/completions", {"model": tiny.name, "prompt": "a"})
        assert status == 503 and "out of luck" in body["error"]["message"]
        assert "out of luck" in (await api.fetch("GET", "/status?part=1")).body.decode()
    runtime = Path(os.environ["JUPYTER_RUNTIME_DIR"])
    wait_for(lambda: not list(runtime.glob("llmkit-*")))  # its connection file is gone


def test_a_bridge_that_breaks_says_goodbye(
    fake: FakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = BridgeServer(fake)
    remote = BridgeClient(server.connection)
    assert remote.submit(ask("a")).result(30)

    def broken(self: BridgeServer) -> None:
        raise RuntimeError("no more news")

    monkeypatch.setattr(BridgeServer, "_send_news", broken)
    with pytest.raises(EngineGoneError):
        remote.submit(ask("b", max_tokens=50)).result(30)
    wait_for(lambda: remote.state.is_gone)
    assert "no more news" in str(remote.state.reason)
    wait_for(lambda: not server.connection.path.exists())
    remote.close()
    server.close()


def test_a_fault_of_one_group_ends_its_requests_only(tmp_path: Path) -> None:
    """Requests with different adapters are decoded apart; one decode fails."""
    lora = tiny_models.write_lora(tmp_path / "change.gguf")
    with llmkit.load(
        tiny_models.write(tmp_path / "tiny.gguf", "llama"),
        n_ctx=256,
        n_slots=3,
        lora=lora,
        share=False,
    ) as llm:
        engine = llm.engine
        assert isinstance(engine, LocalEngine)
        plain = llm.generate("abc", max_tokens=40, temperature=0, ignore_eos=True, lora={})
        runner, decode = engine._runner, engine._runner._decode_together
        failing = threading.Event()

        def sometimes(chunks, lost):  # type: ignore[no-untyped-def]
            adapters = runner._adapters.get(runner._serials[chunks[0].slot], ())
            if adapters and failing.is_set() and chunks[0].start > 8:  # within its answer
                return StepOutput(
                    [()] * len(chunks), [0] * len(chunks), error="it broke", lost=lost
                )
            return decode(chunks, lost)

        runner._decode_together = sometimes  # type: ignore[method-assign]
        good = llm.stream("abc", max_tokens=40, temperature=0, ignore_eos=True, lora={})
        failing.set()
        bad = llm.stream("abc", max_tokens=200, temperature=0, ignore_eos=True)
        with pytest.raises(EngineError, match="it broke"):
            bad.result(30)
        assert good.result(30).tokens == plain.tokens
        failing.clear()
        assert (
            llm.generate("abc", max_tokens=40, temperature=0, ignore_eos=True, lora={}).tokens
            == plain.tokens
        ), "no slot is dirty"
        changed = llm.generate("abc", max_tokens=10, temperature=0, ignore_eos=True).tokens
        assert llm.generate("abc", max_tokens=10, temperature=0, ignore_eos=True).tokens == changed


def test_a_warning_that_is_an_error_ends_no_thread(tmp_path: Path) -> None:
    folder = tmp_path / "kv"
    with llmkit.load(
        tiny_models.write(tmp_path / "tiny.gguf", "llama"),
        n_ctx=256,
        n_slots=1,
        share=False,
        prefix_dir=folder,
        disk_cache_mb=1,
    ) as llm:
        engine = llm.engine
        assert isinstance(engine, LocalEngine)
        engine._runner._store._max_disk_bytes = 10
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(EngineError, match="could not be saved"):
                llm.save_prefix("some words that are worth keeping " * 4)
        assert llm.generate("a", max_tokens=2, ignore_eos=True).usage.completion_tokens == 2


def test_pythons_switch_interval_comes_back(tmp_path: Path) -> None:
    before = sys.getswitchinterval()
    file = tiny_models.write(tmp_path / "tiny.gguf", "llama")
    first = llmkit.load(file, n_ctx=128, n_slots=1, share=False)
    second = llmkit.load(
        tiny_models.write(tmp_path / "b.gguf", "llama"), n_ctx=128, n_slots=1, share=False
    )
    assert sys.getswitchinterval() < 0.001 or before < 0.001
    first.unload()
    assert sys.getswitchinterval() < 0.001 or before < 0.001
    second.unload()
    assert sys.getswitchinterval() == pytest.approx(before)


@pytest.mark.parametrize("kind", ["isolated", "engine"])
def test_a_child_that_loads_does_not_outlive_its_owner(kind: str, tmp_path: Path) -> None:
    large = tiny_models.write_large(tmp_path / "large.gguf")
    code = {
        "isolated": (
            "import llmkit; print('on', flush=True); "
            f"llmkit.load({str(large)!r}, isolated=True, n_ctx=256)"
        ),
        "engine": "import subprocess, sys, time\n"
        f"p = subprocess.Popen([sys.executable, '-m', 'llmkit', 'engine', {str(large)!r}, "
        "'--n-ctx=256'], stdin=subprocess.PIPE)\n"
        "print('on', flush=True); time.sleep(60)",
    }[kind]
    owner = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True
    )
    assert owner.stdout is not None and owner.stdout.readline() == b"on\n"
    wait_for(lambda: psutil.Process(owner.pid).children(recursive=True), 30)
    time.sleep(0.3)
    children = psutil.Process(owner.pid).children(recursive=True)
    owner.kill()
    owner.wait()
    owner.stdout.close()
    _, alive = psutil.wait_procs(children, timeout=60)
    for process in alive:
        process.kill()
    assert not alive


def test_a_stopped_gateway_finishes_what_runs_and_a_second_signal_ends_it() -> None:
    with subprocess.Popen(
        [
            sys.executable,
            "-m",
            "llmkit",
            "serve",
            "smollm2",
            "--n-ctx=512",
            "--n-slots=2",
            "--port=0",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        url = process.stdout.readline().split(" at ")[1].strip()
        while "ready" not in process.stdout.readline():
            pass
        import openai

        client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
        client.models.list()
        stream = client.completions.create(
            model="smollm2",
            prompt="Once",
            max_tokens=120,
            stream=True,
            temperature=0,
            extra_body={"ignore_eos": True},
        )
        next(iter(stream))
        process.send_signal(signal.SIGTERM)
        assert len("".join(c.choices[0].text for c in stream)) > 100
        assert process.wait(30) == 0
        process.stdout.read()
        process.stderr.read()


def test_two_files_of_one_name_are_both_reached(tmp_path: Path) -> None:
    from llmkit.gateway.directory import EngineDirectory

    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first = llmkit.load(
        tiny_models.write(tmp_path / "a" / "same.gguf", "llama", seed=1), n_ctx=128, n_slots=1
    )
    second = llmkit.load(
        tiny_models.write(tmp_path / "b" / "same.gguf", "llama", seed=2), n_ctx=128, n_slots=1
    )
    assert [first.name, second.name] == ["same", "same-2"] and set(llmkit.models) >= {
        "same",
        "same-2",
    }
    third = llmkit.load(
        tiny_models.write(tmp_path / "third.gguf", "llama", seed=3),
        n_ctx=128,
        n_slots=1,
        name="same",
    )
    directory = EngineDirectory()
    entries = directory.entries()
    assert len({e.model_id for e in entries}) == 3
    for entry in entries:
        assert directory.lookup(entry.model_id) is entry.client
    directory.close()
    for llm in (first, second, third):
        llm.unload()


def test_a_second_load_asks_only_for_what_it_names(tmp_path: Path) -> None:
    file = tiny_models.write(tmp_path / "tiny.gguf", "llama")
    llm = llmkit.load(file, n_ctx=256, n_slots=2)
    assert llmkit.load(file) is llm and llmkit.load(file, n_ctx=256) is llm
    with pytest.raises(llmkit.InvalidRequestError, match="n_ctx=512"):
        llmkit.load(file, n_ctx=512)
    with pytest.raises(llmkit.InvalidRequestError, match="share=False"):
        llmkit.load(file, share=False)
    llm.unload()


def test_runner_without_faults_keeps_the_books() -> None:
    """`emptied` slots begin anew, also in the fake."""
    client = FakeClient(runner=FakeRunner(n_slots=2))
    execute = client.runner.execute

    def once(batch: Batch) -> StepOutput:
        client.runner.execute = execute  # type: ignore[method-assign]
        output = execute(batch)
        slot = batch.chunks[0].slot
        client.runner.slots[slot].clear()
        return replace(
            output,
            faults=((slot, "gone wrong"),),
            emptied=(slot,),
            resident=[0, *output.resident[1:]],
            tokens=[(), *output.tokens[1:]],
        )

    client.runner.execute = once  # type: ignore[method-assign]
    with pytest.raises(EngineError, match="gone wrong"):
        client.submit(ask("first words")).result(30)
    assert client.submit(ask("first words")).result(30).text.encode() == client.runner.reference(
        b"first words", 8
    )
    client.close()
