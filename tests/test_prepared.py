"""A child that was started ahead of its task: taken, not taken, dead, and left by a dead owner."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from fakes import wait_for

from llmkit.bridge import child
from llmkit.bridge.child import Child, Owner, prepare

TARGET = "test_prepared:answer"


def answer(owner: Owner) -> None:
    owner.ready(said=owner.task["say"], pid=os.getpid())
    owner.wait()


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "python_path", lambda: os.pathsep.join(sys.path))


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
    pid = child._prepared[TARGET].pid
    prepare(TARGET)
    assert child._prepared[TARGET].pid == pid, "one is enough"
    assert told() == {"said": "hello", "pid": pid} and not child._prepared
    assert told()["pid"] != pid


def test_one_that_has_died_is_not_taken() -> None:
    prepare(TARGET)
    process = child._prepared[TARGET]
    process.kill()
    process.wait()
    assert told()["said"] == "hello"


def test_one_of_another_environment_is_not_taken() -> None:
    prepare(TARGET)
    process = child._prepared[TARGET]
    assert told(environment={"LLMKIT_X": "1"})["pid"] != process.pid
    assert child._prepared.pop(TARGET) is process
    process.communicate()
    assert process.returncode == 0, "without a task it ends by itself"


def test_it_ends_with_its_owner() -> None:
    code = (
        "import sys; from llmkit.bridge import child; child.prepare('llmkit.workers.engine:run'); "
        "print(child._prepared['llmkit.workers.engine:run'].pid, flush=True); sys.stdin.read()"
    )
    owner = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert owner.stdout is not None
    pid = int(owner.stdout.readline())
    owner.kill()
    owner.communicate()
    wait_for(lambda: not _runs(pid), 20)


def _runs(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
