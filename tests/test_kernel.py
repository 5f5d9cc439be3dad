"""What people do to a kernel that holds a model: %autoreload, %reset, unload while Out[] remembers;
and plain IPython."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from fakes import wait_for
from jupyter_client_http import JupyterServer, Kernel
from tiny_models import write_large

pytestmark = pytest.mark.model
LOAD = "import llmkit\nllm = llmkit.load('smollm2', n_ctx=512, n_slots=2)"


def test_autoreload_leaves_a_model_alone(kernel: Kernel) -> None:
    kernel.run("%load_ext autoreload\n%autoreload 2")
    kernel.run(LOAD)
    kernel.run("first = llm.generate('Once', max_tokens=5, temperature=0).text")
    kernel.run(
        "import os, pathlib, llmkit.sessions.session as module\nos.utime(module.__file__)"
    )  # as if somebody had saved it
    assert (
        kernel.run(
            "print(llm.generate('Once', max_tokens=5, temperature=0).text == first, "
            "llm.session().say('Hi', max_tokens=3).text != '')"
        )
        == "True True\n"
    )


def test_reset_keeps_the_model_loadable(kernel: Kernel) -> None:
    kernel.run(LOAD)
    kernel.run("%reset -f")
    assert (
        kernel.run(
            f"{LOAD}\nprint(llm.generate('Once', max_tokens=3).usage.completion_tokens, "
            "len(llmkit.models))"
        )
        == "3 1\n"
    )


def test_memory_comes_back_twenty_times_while_out_remembers(kernel: Kernel) -> None:
    kernel.run(
        "import llmkit, psutil\nrss = lambda: psutil.Process().memory_info().rss / 1e6\nkept = []"
    )
    kernel.run(
        "llm = llmkit.load('smollm2', n_ctx=512, n_slots=2)\nllm.generate('Once', max_tokens=3)"
    )
    kernel.run("llm.unload()\nbefore = rss()")
    for _ in range(20):
        kernel.run(
            "llm = llmkit.load('smollm2', n_ctx=512, n_slots=2)\n"
            "kept += [llm, llm.generate('Once', max_tokens=3), llm.stream('x', max_tokens=50)]\n"
            "llm"
        )
        kernel.run("loaded = rss()\nllm.unload()")
    assert kernel.run("print(rss() - before < 40, loaded - rss() > 60)") == "True True\n", (
        kernel.run("print(before, loaded, rss())")
    )


@pytest.mark.parametrize("version", ["6.29", "7.3", "newest"])
def test_versions_of_ipykernel(
    version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What depends on the kernel's loops and threads: \u25a0, await, a widget that moves in a busy
    cell, the gateway in one, and a restart."""
    folder = Path(sys.prefix) / "clients" / f"ipykernel-{version}"
    if version != "newest":
        if not folder.is_dir():
            (pytest.fail if os.environ.get("CI") else pytest.skip)("set up by `make test`")
        monkeypatch.setenv("PYTHONPATH", str(folder))
    server = JupyterServer(tmp_path)
    try:
        kernel = server.kernel()
        assert version == "newest" or kernel.run(
            "import ipykernel; print(ipykernel.__version__)"
        ).startswith(version)
        kernel.run(f"{LOAD}\nmonitor = llm.monitor(interval=0.25); monitor")
        kernel.run(
            "done = await llm.stream('Once', max_tokens=3)\n"
            "pieces = [piece async for piece in llm.stream('Once', max_tokens=3)]"
        )
        assert (
            kernel.run("print(done.usage.completion_tokens, ''.join(pieces) != '')") == "3 True\n"
        )
        cell = kernel.start(
            "print('begun', flush=True)\nllm.generate('Once', max_tokens=400, ignore_eos=True)"
        )
        next(m for m in kernel.messages(cell) if m["msg_type"] == "stream")
        wait_for(
            lambda: (
                [m["num_running"] for m in server.request("GET", "/llmkit/status")["models"]] == [1]
            )
        )
        kernel.interrupt()
        _, error = kernel.wait(cell)
        assert error is not None and error.splitlines()[1:] == [
            "Interrupted: generation stopped; the text so far is in llm.last"
        ]
        kernel.run("stream, seen = llm.stream('Once', max_tokens=400, ignore_eos=True), set()")
        cell = kernel.start(
            "while not stream.channel.finished: seen.add(monitor.html())\nprint(len(seen) > 2)"
        )
        body = {"model": "smollm2", "prompt": "Once", "max_tokens": 3}
        assert (
            server.request("POST", "/llmkit/v1/completions", body)["usage"]["completion_tokens"]
            == 3
        )
        assert kernel.wait(cell) == ("True\n", None)
        kernel.start("llm.generate('Once', max_tokens=400, ignore_eos=True)")
        kernel.restart()
        assert (
            kernel.run(f"{LOAD}\nprint(llm.generate('Once', max_tokens=3).usage.completion_tokens)")
            == "3\n"
        )
    finally:
        server.stop()


def test_stop_ends_a_load(kernel: Kernel, tmp_path: Path) -> None:
    """While a gigabyte is loaded: the bar shows it, \u25a0 ends it, its memory is back, and the
    next load works."""
    large = write_large(tmp_path / "large.gguf")
    kernel.run(
        "import llmkit, psutil\nrss = lambda: psutil.Process().memory_info().rss / 1e6\n"
        "before = rss()"
    )
    cell = kernel.start(f"llmkit.load({str(large)!r}, n_slots=1, n_ctx=512, threads=2)")
    bar = next(
        m["content"]["data"]["text/plain"]
        for m in kernel.messages(cell)
        if m["msg_type"] == "display_data"
    )
    kernel.interrupt()
    text, error = kernel.wait(cell)
    assert (
        bar.startswith("loading large: ")
        and bar.endswith("%")
        and error is not None
        and "loading was stopped" in error
        and text == ""
    )
    assert error.splitlines()[1:] == ["Interrupted: loading was stopped; nothing stays in memory"]
    assert (
        kernel.run(
            f"{LOAD}\nprint(rss() - before < 500, len(llmkit.models), "
            "llm.generate('Once', max_tokens=3).usage.completion_tokens)"
        )
        == "True 1 3\n"
    )


def test_plain_ipython_and_plain_python(tmp_path: Path) -> None:
    script = (
        f"{LOAD}\nprint(repr(llm.chat('Hi', max_tokens=2))[:10], "
        "llm.monitor().sample().rss_bytes > 0)\n"
    )
    (tmp_path / "s.py").write_text(script)
    (tmp_path / "s.ipy").write_text(f"{script}%load_ext llmkit\n%llm list\n")
    for command in (
        [sys.executable, "s.py"],
        [sys.executable, "-m", "IPython", "--no-banner", "--colors=NoColor", "s.ipy"],
    ):
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert (
            done.returncode == 0
            and "Completion True" in done.stdout
            and "Traceback" not in done.stderr
        ), done.stdout + done.stderr
    assert "* LLM('smollm2'" in done.stdout
