"""`llmkit serve` and `llmkit bench` as a user types them."""

from __future__ import annotations

import inspect
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import openai
import psutil
import pytest
import tiny_models
from children import held_up
from fakes import wait_for
from tracing import traced

import llmkit
from llmkit.cli import app, main
from llmkit.errors import InvalidRequestError, ModelLoadError
from llmkit.models.registry import resolve
from llmkit.settings.options import OPTIONS, EngineOptions
from llmkit.settings.serving import read_settings
from llmkit.system.process import process_start_time
from llmkit.workers import engine, supervisor

LLMKIT = [sys.executable, "-m", "llmkit"]


class Served:
    def __init__(self, *args: str, **environment: str) -> None:
        env = {**os.environ, **environment}
        self.process = subprocess.Popen(
            [*LLMKIT, "serve", *args],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=env,
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if " at " not in line:
            self.process.kill()
            raise AssertionError((line, *self.process.communicate()))
        self.url = line.rsplit(" at ", 1)[1].strip()

    def health(self) -> int:
        try:
            with urllib.request.urlopen(
                self.url.removesuffix("/v1") + "/health", timeout=30
            ) as reply:
                return int(reply.status)
        except urllib.error.HTTPError as error:
            return error.code

    def stop(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        self.process.send_signal(number)
        _, errors = self.process.communicate(timeout=60)
        return self.process.returncode, errors


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    server = Served(
        "smollm2", "--port", "0", "--n-ctx", "512", "--n-slots", "4", LLMKIT_API_KEY="k"
    )
    wait_for(lambda: server.health() == 200, 60)
    yield server
    children = psutil.Process(server.process.pid).children()
    assert len(children) == 1
    code, errors = server.stop(signal.SIGINT)
    assert code == 0 and "Traceback" not in errors
    assert not children[0].is_running()


@pytest.mark.model
def test_serve_a_model(served: Served) -> None:
    client = openai.OpenAI(base_url=served.url, api_key="k", max_retries=0)
    reply = client.completions.create(
        model="default", prompt="The capital of France is", max_tokens=4, temperature=0
    )
    assert "Paris" in reply.choices[0].text
    assert client.models.list().data[0].id == "smollm2"
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=served.url, api_key="wrong", max_retries=0).models.list()


@pytest.mark.model
def test_bench_any_endpoint(served: Served, capsys: pytest.CaptureFixture[str]) -> None:
    common = [
        "bench",
        "--base-url",
        served.url,
        "--prompt-words",
        "20",
        "--max-tokens",
        "6",
        "--api-key",
    ]
    assert main([*common, "k", "--concurrency", "1,3", "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [r["concurrency"] for r in lines] == [1, 3] and all(
        r["errors"] == 0 and r["tok_s"] > 0 for r in lines
    )
    assert lines[1]["completion_tokens"] == 6 * 6 and lines[1]["cached_tokens"] == 0
    assert main([*common, "wrong", "--concurrency", "1"]) == 1
    assert "401" in capsys.readouterr().err


@pytest.mark.model
def test_a_killed_gateway_takes_its_engine_along() -> None:
    server = Served("smollm2", "--port", "0", "--n-ctx", "256", "--n-slots", "1")
    wait_for(lambda: server.health() == 200, 60)
    (engine,) = psutil.Process(server.process.pid).children()
    assert server.stop(signal.SIGKILL)[0] == -signal.SIGKILL
    wait_for(lambda: process_start_time(engine.pid) is None)


@pytest.mark.model
def test_a_killed_engine_is_started_again(tmp_path: Path) -> None:
    hold, options = held_up(tmp_path), ["--port", "0", "--n-ctx", "256", "--n-slots", "1"]
    server = Served("smollm2", *options, PYTHONPATH=str(tmp_path))
    wait_for(lambda: server.health() == 200, 60)
    (engine,) = psutil.Process(server.process.pid).children()
    hold.touch()
    engine.kill()
    wait_for(lambda: server.health() == 503)
    with pytest.raises(openai.InternalServerError, match="being started again"):
        ask(server)
    hold.unlink()
    wait_for(lambda: server.health() == 200, 60)
    assert ask(server).choices[0].text
    code, errors = server.stop()
    assert code == 0 and "has ended" in errors and "Traceback" not in errors


def ask(server: Served) -> openai.types.Completion:
    client = openai.OpenAI(base_url=server.url, api_key="x", max_retries=0)
    return client.completions.create(model="default", prompt="a", max_tokens=2)


@pytest.mark.model
def test_a_crash_loop_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "FIRST_DELAY_S", 0.05)
    monkeypatch.setattr(supervisor, "MAX_DELAY_S", 0.05)
    spec = resolve(tiny_models.write(tmp_path / "tiny.gguf", "llama"))
    worker = supervisor.Supervisor(engine.task(spec, EngineOptions(n_ctx=64), name="tiny"))
    killed: set[int | None] = set()
    for _ in range(supervisor.MAX_CRASHES):
        wait_for(lambda: worker.state.phase == "ready" and worker.pid not in killed, 60)
        pid = worker.pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        killed.add(pid)
    wait_for(lambda: worker.state.is_gone)
    with pytest.raises(ModelLoadError, match="has ended 5 times"):
        worker.check()
    worker.close()


@pytest.mark.model
def test_a_worker_that_is_stopped_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hold = held_up(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    spec = resolve(tiny_models.write(tmp_path / "tiny.gguf", "llama"))
    task = engine.task(spec, EngineOptions(n_ctx=64), name="tiny")
    worker = supervisor.Supervisor(task)
    wait_for(lambda: worker.state.phase == "ready", 60)
    pid = worker.pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    wait_for(lambda: worker._num_stopped)
    os.kill(pid, signal.SIGCONT)  # a short stop is nothing
    wait_for(lambda: not worker._num_stopped)
    assert worker.pid == pid and not worker.restarts
    worker._stopped_s = 1.0
    hold.touch()
    os.kill(pid, signal.SIGSTOP)
    wait_for(lambda: "stopped (SIGSTOP)" in str(worker.state.reason))
    assert worker.restarts == 1
    hold.unlink()
    wait_for(lambda: worker.state.phase == "ready" and worker.pid != pid, 60)
    worker.close()


@pytest.mark.model
def test_a_worker_that_is_stopped_while_it_loads_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hold = held_up(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    hold.touch()
    spec = resolve(tiny_models.write(tmp_path / "tiny.gguf", "llama"))
    task = engine.task(spec, EngineOptions(n_ctx=64), name="tiny")
    worker = supervisor.Supervisor(task, stopped_s=1.0)
    wait_for(lambda: worker.pid is not None)
    pid = worker.pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    assert worker.state.phase == "loading"
    wait_for(lambda: "stopped (SIGSTOP)" in str(worker.state.reason))
    assert worker.restarts == 1
    hold.unlink()
    wait_for(lambda: worker.state.phase == "ready" and worker.pid != pid, 60)
    worker.close()


@pytest.mark.model
def test_a_worker_that_a_debugger_holds_is_left_alone(tmp_path: Path) -> None:
    spec = resolve(tiny_models.write(tmp_path / "tiny.gguf", "llama"))
    task = engine.task(spec, EngineOptions(n_ctx=64), name="tiny")
    worker = supervisor.Supervisor(task, stopped_s=0.5)
    wait_for(lambda: worker.state.phase == "ready", 60)
    pid = worker.pid
    assert pid is not None
    with traced(pid):
        time.sleep(2)
    time.sleep(1)
    assert worker.pid == pid and not worker.restarts
    worker.close()


def test_whatever_load_takes_serve_takes() -> None:
    """One table: a name, a type and a sentence for each option, everywhere."""
    loads = inspect.signature(llmkit.load).parameters
    assert set(OPTIONS) == {f.name for f in fields(EngineOptions)} <= set(loads)
    values = {
        "number": "2.5", "layers": "-1", "adapters": "a.gguf", "text": "x",
        "path": "x", "shares": "3,1",
    }  # fmt: skip
    asked = {"kv_unified": True, "deterministic": False, "context_shift": False}
    for name, row in OPTIONS.items():
        assert row.help.endswith(".") and row.help in (llmkit.load.__doc__ or "")
        if name == "isolated":
            continue  # what `serve` loads always has a process of its own
        if row.kind in ("flag", "switch"):
            given = {name: asked.get(name, True)}
        else:
            value: object = values.get(row.kind) or (
                row.choices[0] if row.choices else str(int(row.low))
            )
            given = {name: [value] if row.kind == "adapters" else value}
        more = {"kv_unified": True} if name == "kv_tokens" else {}
        assert name in read_settings({**given, **more}).engine
        command = app.built("serve").registered_commands[0].callback
        assert name in inspect.signature(command).parameters  # type: ignore[arg-type]


def test_while_loading_it_is_503(tmp_path: Path) -> None:
    server = Served("--port", "0")  # no model, no engine anywhere
    assert server.health() == 503
    with pytest.raises(openai.InternalServerError, match="No model is loaded"):
        openai.OpenAI(base_url=server.url, api_key="x", max_retries=0).completions.create(
            model="default", prompt="a"
        )
    assert server.stop()[0] == 0


def fails(*args: str, **environment: str) -> str:
    done = subprocess.run(
        [*LLMKIT, *args],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 1, done
    assert done.stderr.startswith("llmkit: ") or "\nllmkit: " in done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


def test_mistakes_get_one_clear_line(tmp_path: Path) -> None:
    assert "without a key" in fails("serve", "smollm2", "--host", "0.0.0.0")
    assert "no model" in fails("serve", str(tmp_path / "none.gguf"), "--port", "0")
    (tmp_path / "text.gguf").write_text("hello")
    assert "not a GGUF file" in fails("serve", str(tmp_path / "text.gguf"), "--port", "0")
    assert "setting port" in fails("serve", "--port", "99999")
    assert "standard input has ended" in fails("engine", "smollm2")
    assert "setting n_ctx" in fails("serve", "smollm2", "--port", "0", "--n-ctx", "0")
    assert "base-url" in fails("bench", "--base-url", "nonsense")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        start = time.monotonic()
        port = str(taken.getsockname()[1])
        assert f"127.0.0.1 port {port}: another process uses it" in fails(
            "serve", "smollm2", "--port", port
        )
        assert time.monotonic() - start < 30


def test_settings_precedence_and_unknown_keys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "llmkit.toml"
    file.write_text('port = 1111\nhost = "127.0.0.9"\nn_ctx = 512')
    monkeypatch.setenv("LLMKIT_PORT", "2222")
    settings = read_settings({"n_ctx": 1024}, file)
    assert (settings.gateway.host, settings.gateway.port, settings.engine["n_ctx"]) == (
        "127.0.0.9",
        2222,
        1024,
    )
    file.write_text("prot = 1")
    with pytest.raises(InvalidRequestError, match="prot"):
        read_settings({}, file)
    file.write_text("= =")
    with pytest.raises(InvalidRequestError, match="cannot read"):
        read_settings({}, file)


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    for args in (["--help"], ["serve", "--help"], ["bench", "--help"], ["--version"]):
        assert main(args) == 0 and capsys.readouterr().out
    assert main(["serve", "--nope"]) == 2 and "--nope" in capsys.readouterr().err


def test_a_misspelt_variable_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMKIT_APIKEY", "x")
    with pytest.raises(InvalidRequestError, match=r"LLMKIT_APIKEY.*LLMKIT_API_KEY"):
        read_settings({})
