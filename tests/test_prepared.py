"""A child that was started ahead of its task: taken, not taken, dead, and left by a dead owner."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from fakes import wait_for

from llmkit.bridge.child import Child, Owner, code_of, prepare, release
from llmkit.cli.early import WORKER, _serves_a_model
from llmkit.system import prepared
from llmkit.workers import engine

TARGET = "test_prepared:answer"
CODE = code_of(TARGET)


def answer(owner: Owner) -> None:
    owner.ready(said=owner.task["say"], pid=os.getpid())
    owner.wait()


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepared, "python_path", lambda: os.pathsep.join(sys.path))


def told(**more: object) -> dict[str, object]:
    taken = Child(TARGET, {"say": "hello"}, errors=subprocess.PIPE, **more)  # type: ignore[arg-type]
    try:
        return taken.ready()
    finally:
        taken.end(5)
        assert taken.stderr is not None
        taken.stderr.close()


def test_the_next_child_takes_it_and_the_one_after_is_another() -> None:
    prepare(TARGET)
    pid = prepared._prepared[CODE].pid
    prepare(TARGET)
    assert prepared._prepared[CODE].pid == pid, "one is enough"
    assert told() == {"said": "hello", "pid": pid} and CODE not in prepared._prepared
    assert told()["pid"] != pid


def test_one_that_has_died_is_not_taken() -> None:
    prepare(TARGET)
    process = prepared._prepared[CODE]
    process.kill()
    process.wait()
    assert told()["said"] == "hello"


def test_one_of_another_environment_is_not_taken() -> None:
    prepare(TARGET)
    process = prepared._prepared[CODE]
    assert told(environment={"LLMKIT_X": "1"})["pid"] != process.pid
    assert prepared._prepared.pop(CODE) is process
    process.communicate()
    assert process.returncode == 0, "without a task it ends by itself"


def test_one_that_is_not_wanted_ends_at_once() -> None:
    prepare(TARGET)
    process = prepared._prepared[CODE]
    release(TARGET)
    assert process.returncode == -9 and CODE not in prepared._prepared
    release(TARGET)


def test_the_command_starts_the_worker_that_serve_takes() -> None:
    assert code_of(engine.TARGET) == WORKER
    for given, wanted in (
        (["serve", "smollm2", "--port", "0"], True),
        (["serve", "--port", "0"], False),
        (["serve"], False),
        (["serve", "echo"], False),
        (["serve", "smollm2", "--help"], False),
        (["chat", "smollm2"], False),
        ([], False),
    ):
        assert _serves_a_model(given) == wanted


def test_it_ends_with_its_owner() -> None:
    code = (
        "import sys; from llmkit.system import prepared; from llmkit.cli.early import WORKER; "
        "prepared.prepare(WORKER); "
        "print(prepared._prepared[WORKER].pid, flush=True); sys.stdin.read()"
    )
    owner = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert owner.stdout is not None
    pid = int(owner.stdout.readline())
    owner.kill()
    owner.communicate()
    wait_for(lambda: not _runs(pid), 20)


def test_ctrl_c_while_modules_are_imported_is_no_traceback() -> None:
    code = (
        "import os, signal, sys; from llmkit.cli.early import main\n"
        "class Pressing:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'llmkit.cli.app': os.kill(os.getpid(), signal.SIGINT)\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "sys.meta_path.insert(0, Pressing()); sys.exit(main(['--version']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def _runs(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
