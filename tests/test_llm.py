"""The handle people hold, on the real model, in this process and in plain python."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
from fakes import interrupt_after, wait_for

import llmkit
from llmkit.errors import InvalidRequestError
from llmkit.llm import Interrupted
from llmkit.system.process import process_start_time

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def llm() -> Iterator[llmkit.LLM]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("JUPYTER_RUNTIME_DIR", raising=False)
        handle = llmkit.load("smollm2", n_ctx=1024, n_slots=4, share=False)
    yield handle
    handle.unload()


def test_generate_chat_stream_and_batches(llm: llmkit.LLM) -> None:
    one = llm.generate("The capital of France is", max_tokens=4, temperature=0)
    assert "Paris" in one.text and llm.last == one
    many = llm.generate(
        ["The capital of France is", "The capital of Italy is"], max_tokens=4, temperature=0
    )
    assert [c.usage.completion_tokens for c in many] == [4, 4] and "Rome" in many[1].text
    assert len(llm.generate([f"Number {i}:" for i in range(300)], max_tokens=1)) == 300
    assert llm.generate([]) == []
    reply = llm.chat("Say yes.", max_tokens=8, temperature=0)
    assert (
        "".join(
            llm.chat(
                [{"role": "user", "content": "Say yes."}], stream=True, max_tokens=8, temperature=0
            )
        )
        == reply.text
    )
    assert (
        llm.chat(llmkit.Message("user", "Say yes."), max_tokens=8, temperature=0).text == reply.text
    )


async def test_async(llm: llmkit.LLM) -> None:
    whole = llm.generate("One, two,", max_tokens=8, temperature=0).text
    assert "".join([p async for p in llm.stream("One, two,", max_tokens=8, temperature=0)]) == whole
    assert (await llm.chat("Hi", stream=True, max_tokens=3)).usage.completion_tokens == 3


def test_the_same_file_is_the_same_engine(llm: llmkit.LLM) -> None:
    assert llmkit.load("smollm2", n_ctx=1024, n_slots=4) is llm
    with pytest.raises(InvalidRequestError, match=r"n_ctx=2048.*unload"):
        llmkit.load("smollm2", n_ctx=2048, n_slots=4)


def test_friendly_errors(llm: llmkit.LLM) -> None:
    with pytest.raises(InvalidRequestError, match="generate"):
        llm.stream(["a"])  # type: ignore[arg-type]
    with pytest.raises(InvalidRequestError, match="prompt 1"):
        llm.generate(["a", 5])  # type: ignore[list-item]
    for bad in (
        [],
        [{"role": "user"}],
        [{"role": "user", "content": None}],
        [3],
        {"role": "nobody", "content": "x"},
    ):
        with pytest.raises(InvalidRequestError):
            llm.chat(bad)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="temprature"):
        llm.generate("a", temprature=1)
    with pytest.raises(InvalidRequestError, match="share=True"):
        llm.serve()


def test_stop_keeps_the_text_so_far(llm: llmkit.LLM) -> None:
    interrupt_after(llm, 30)
    with pytest.raises(Interrupted) as stopped:
        llm.generate("Once upon a time", max_tokens=1000, ignore_eos=True)
    assert isinstance(stopped.value, KeyboardInterrupt) and stopped.value._render_traceback_() == [
        f"Interrupted: {stopped.value}"
    ]
    assert (
        llm.last is not None
        and llm.last.finish_reason is llmkit.FinishReason.ABORT
        and len(llm.last.text) > 20
    )
    interrupt_after(llm, 30)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["Once upon a time"] * 300, max_tokens=500, ignore_eos=True)
    wait_for(lambda: llm.stats.num_running == llm.stats.num_waiting == 0)
    assert llm.generate("The", max_tokens=2).usage.completion_tokens == 2


def test_stop_in_a_batch_loses_nothing(llm: llmkit.LLM) -> None:
    prompts = ["Say", *["Once upon a time"] * 7]
    interrupt_after(llm, 40)
    with pytest.raises(Interrupted, match="last_batch"):
        llm.generate(prompts, max_tokens=700, ignore_eos=True)
    assert len(llm.last_batch) == 8 and {c.finish_reason.value for c in llm.last_batch} <= {
        "abort",
        "length",
    }
    assert sum(len(c.text) for c in llm.last_batch) > 40 and llm.last is not None and llm.last.text
    done = llm.generate(["One,", "Two,"], max_tokens=3)
    assert llm.last_batch == done


def test_a_bad_prompt_ends_its_batch(llm: llmkit.LLM) -> None:
    with pytest.raises(llmkit.ContextLengthError):
        llm.generate(["Once"] * 6 + ["word " * 5000], max_tokens=900, ignore_eos=True)
    wait_for(lambda: llm.stats.num_running == llm.stats.num_waiting == 0)


def test_profile(llm: llmkit.LLM) -> None:
    profile = llm.profile(prompt_tokens=(16, 64, 99_999), batch_sizes=(1, 2, 64), max_tokens=4)
    assert len(profile.df) == 6 and set(profile.df["batch_size"]) == {1, 2}
    assert (profile.df[["ttft_s", "decode_tok_s"]] > 0).all().all() and (
        profile.df["completion_tokens"] == 4
    ).all()
    summary = profile.summary()
    assert len(summary) == 4 and (summary["prefill_tok_s"] > 0).all()
    import matplotlib

    matplotlib.use("Agg")
    axes = profile.plot()
    assert len(axes.figure.axes) == 2 and axes.get_title() == "Decode"
    assert "prefill_tok_s" in repr(profile) and "<table" in profile._repr_html_()
    with pytest.raises(InvalidRequestError, match="nothing to measure"):
        llm.profile(prompt_tokens=(99_999,))


def test_monitor_samples_and_shows_itself_in_every_form(llm: llmkit.LLM) -> None:
    monitor = llm.monitor(interval=0.25)
    stream = llm.stream("Once", max_tokens=900, ignore_eos=True)
    wait_for(lambda: monitor.sample().decode_tok_s > 0 and monitor.sample().stats.num_running == 1)
    assert monitor.sample().rss_bytes > 100 << 20
    bundle = monitor._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in bundle
    assert (
        "<svg" in bundle["text/html"]
        and "RAM" in bundle["text/plain"]
        and "1 running" in bundle["text/plain"]
    )
    before = monitor._widget.value
    wait_for(lambda: monitor._widget.value != before)
    stream.close()
    wait_for(lambda: llm.stats.num_running == 0)
    monitor.stop()
    assert (
        not monitor.running
        and "stopped" in monitor._widget.value
        and "0 of 4 / 0" in monitor._widget.value
    )


def test_monitor_without_widgets(llm: llmkit.LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    monitor = llm.monitor()
    assert set(monitor._repr_mimebundle_()) == {"text/plain", "text/html"}
    monitor.stop()


def run(code: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, **options
    )  # type: ignore[call-overload,no-any-return]


def test_plain_python_serves_itself_and_leaves_nothing() -> None:
    code = """
import llmkit, subprocess, sys, os, glob
llm = llmkit.load("smollm2", n_ctx=512, n_slots=2)
e = llm.serve()
assert not e.in_jupyter and e.api_key not in repr(e) + e._repr_html_(), "the secret is not shown"
assert llm.serve() is e
python = dict(args=[sys.executable, "-c", e.python], capture_output=True, text=True)
r = subprocess.run(**python, env={**os.environ, **e.environment})
assert r.returncode == 0 and r.stdout.strip(), r
bad = subprocess.run(**python, env={**os.environ, **e.environment, "OPENAI_API_KEY": "x"})
assert "401" in bad.stderr
pid = e._process.pid
if "unload" in sys.argv: llm.unload(); assert not e.alive
print(pid)
"""
    for argument in ([], ["unload"]):
        done = subprocess.run(
            [sys.executable, "-c", code, *argument], capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        assert not done.stderr
        pid = int(done.stdout)
        wait_for(lambda pid=pid: process_start_time(pid) is None)
    assert not list(os.scandir(os.environ["JUPYTER_RUNTIME_DIR"]))


def test_exit_while_generating_is_clean() -> None:
    code = (
        "import llmkit; llm = llmkit.load('smollm2', n_slots=1); "
        "s = llm.stream('Once', max_tokens=3000, ignore_eos=True); print(next(iter(s)) != '')"
    )
    done = run(code)
    assert (done.returncode, done.stdout, done.stderr) == (0, "True\n", "")


def test_a_forked_child_is_told_and_the_parent_unharmed() -> None:
    code = """
import llmkit, os
llm = llmkit.load("smollm2", n_ctx=512, n_slots=1)
pid = os.fork()
if pid == 0:
    try: llm.generate("a", max_tokens=1)
    except llmkit.ModelUnloadedError as e: print("child:", "fork" in str(e), flush=True)
    again = llmkit.load("smollm2", n_ctx=256, n_slots=1)
    n = again.generate("a", max_tokens=1).usage.completion_tokens
    print("again:", again is not llm and n, flush=True)
    again.unload()
    raise SystemExit
os.waitpid(pid, 0)
print("parent:", llm.generate("a", max_tokens=1).usage.completion_tokens)
"""
    done = run(code)
    assert done.returncode == 0 and done.stdout == "child: True\nagain: 1\nparent: 1\n", done


def test_unloaded(tmp_path: object) -> None:
    done = run(
        "import llmkit\n"
        "with llmkit.load('smollm2', n_ctx=512, n_slots=1) as llm: "
        "s = llm.stream('a', max_tokens=400, ignore_eos=True); next(iter(s))\n"
        "print(llm)\n"
        "for f in (lambda: llm.generate('a'), lambda: llm.stats, lambda: llm.monitor(), "
        "lambda: llm.profile(), lambda: llm.serve()):\n"
        "    try: f(); print('?')\n"
        "    except llmkit.ModelUnloadedError as e: assert 'smollm2' in str(e)\n"
        "llm.unload(); print(llmkit.load('smollm2', n_ctx=768, n_slots=1))\n"
    )
    assert done.returncode == 0, done.stderr
    assert (
        "LLM('smollm2', unloaded)" in done.stdout
        and "n_ctx=768" in done.stdout
        and "?" not in done.stdout
    )


def test_a_gpu_with_a_cpu_only_build_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from llmkit.runtime import local
    from llmkit.system.accelerators import Accelerator

    found = [Accelerator("nvidia", "NVIDIA H100")]
    monkeypatch.setattr("llmkit.runtime.assembly.accelerators", lambda: found)
    with pytest.warns(RuntimeWarning, match=r"H100.*make cuda.*\n.*DGGML_CUDA=on.*pip install"):
        engine = local.LocalEngine("smollm2", n_ctx=256, n_slots=1)
    engine.close()
