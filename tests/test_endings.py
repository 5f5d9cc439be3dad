"""How child processes end, in words, and the last of what they said."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys

import pytest

from llmkit.errors import EngineGoneError, ModelUnloadedError
from llmkit.runtime.lifetime import Lifetime
from llmkit.system.endings import LastWords, ended, reason_in


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
        words.wait(5)
    assert ended(process.poll()) == "was ended by SIGABRT"
    assert words.reason == "\\x1b[1mggml.c:7: GGML_ASSERT(n) failed"
    assert words.last(2) == ["libggml-base.so.0(+0x18e33)"] * 2
    assert reason_in(["loading", "42 %", " "]) == "42 %"
    assert reason_in([]) == ""


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
        words.wait(5)
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
