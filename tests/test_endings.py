"""How child processes end, in words, and the last of what they said."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import tiny_models
from fakes import wait_for

from llmkit.errors import EngineGoneError, ModelUnloadedError
from llmkit.models.registry import resolve
from llmkit.runtime.lifetime import Lifetime
from llmkit.settings.options import EngineOptions
from llmkit.system.endings import LastWords, ended, reason_in
from llmkit.workers import engine
from llmkit.workers.supervisor import Supervisor


def run(code: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE)


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (signal.SIGSEGV, "was ended by SIGSEGV"),
        (signal.SIGKILL, "was ended by SIGKILL, perhaps because memory ran out"),
        (signal.SIGRTMIN + 3, f"was ended by signal {signal.SIGRTMIN + 3}"),
    ],
)
def test_a_signal_that_ended_a_process(number: int, words: str) -> None:
    with run(f"import os; os.kill(os.getpid(), {int(number)})") as process:
        process.wait()
        assert ended(process.poll()) == words
    assert ended(0) == "ended with exit status 0"
    assert ended(None) == "does not answer any more"


def test_the_reason_is_no_line_of_a_backtrace() -> None:
    code = (
        "import os, sys; print('\\x1b[1mggml.c:7: GGML_ASSERT(n) failed', file=sys.stderr); "
        "print('libggml-base.so.0(+0x18e33)\\n' * 12, file=sys.stderr, flush=True); os.abort()"
    )
    with run(code) as process:
        assert process.stderr is not None
        words = LastWords(process.stderr)
        process.wait()
        words.wait(30)
    assert ended(process.poll()) == "was ended by SIGABRT"
    assert words.reason == "\\x1b[1mggml.c:7: GGML_ASSERT(n) failed"
    assert words.last(2) == ["libggml-base.so.0(+0x18e33)"] * 2
    assert reason_in(["loading", "42 %", " "]) == "42 %"
    assert reason_in([]) == ""


def test_empty_lines_are_not_passed_on(capsys: pytest.CaptureFixture[str]) -> None:
    """A notebook would show each of them as an output."""
    code = "import sys; sys.stderr.write('\\n  \\nWarning: old.\\n\\n')"
    with subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        words = LastWords(process.stderr)
        words.wait(30)
    assert capsys.readouterr().err == "Warning: old.\n" and words.last() == ["Warning: old."]


def test_a_child_that_says_much_without_a_line_end_or_a_reader(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    gone = open(writing, "w")  # noqa: SIM115
    with run("import os; os.write(2, b'x' * (1 << 22))") as process:
        monkeypatch.setattr(sys, "stderr", gone)
        assert process.stderr is not None
        words = LastWords(process.stderr)
        assert process.wait(30) == 0, "its pipe is read on"
        words.wait(30)
        monkeypatch.undo()
    with contextlib.suppress(BrokenPipeError):
        gone.close()
    assert sum(map(len, words.last())) <= 20 * (64 << 10)


def test_a_model_of_this_process_may_be_used_until_it_ends() -> None:
    life = Lifetime()
    assert not life.state("tiny", None).is_gone
    with pytest.raises(EngineGoneError, match="the thread ended"):
        life.check("tiny", "the thread ended")
    life.closed = True
    with pytest.raises(ModelUnloadedError, match="'tiny' was unloaded"):
        life.check("tiny", "the thread ended")

    child = os.fork()
    if not child:
        try:
            life.check("tiny", None)
        except ModelUnloadedError as error:
            os._exit(7 if "before a fork" in str(error) else 1)
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert life.is_ours


@pytest.mark.model
def test_nothing_is_left_of_a_worker_that_was_killed(
    tmp_path: Path, private_runtime: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = resolve(tiny_models.write(tmp_path / "tiny.gguf", "llama"))
    with tempfile.TemporaryDirectory() as folder:
        monkeypatch.setenv("XDG_RUNTIME_DIR", folder)
        worker = Supervisor(engine.task(spec, EngineOptions(n_ctx=64), name="tiny"))
        try:
            wait_for(lambda: worker.state.phase == "ready", 60)
            (first,) = os.listdir(folder)
            os.kill(worker.pid or 0, signal.SIGKILL)
            wait_for(lambda: worker.restarts == 1 and worker.state.phase == "ready", 60)
            (second,) = os.listdir(folder)
            assert second != first
        finally:
            worker.close()
        assert not os.listdir(folder) and not os.listdir(private_runtime)
