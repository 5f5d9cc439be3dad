"""An engine as somebody's child: its reports, its end, and what its starter learns of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from contextlib import suppress

import psutil
import pytest
from ray_cluster import LLMKIT, until

from llmkit.cluster.child import EngineChild
from llmkit.cluster.reports import Reports
from llmkit.errors import EngineGoneError, InvalidRequestError

ENGINE = [str(LLMKIT), "engine", "smollm2", "--threads", "1", "--n-ctx", "512", "--n-slots", "2"]
# Starts an engine as a replica does, says where it is, and waits for its own end.
STARTER = """
import sys, time
from llmkit.cluster.child import EngineChild
child = EngineChild(sys.argv[1:])
print(child.pid, flush=True)
while not child.ready:
    time.sleep(0.05)
print("ready", flush=True)
time.sleep(600)
"""


@pytest.mark.model
def test_an_engine_reports_and_ends_when_it_is_asked() -> None:
    child = EngineChild(ENGINE)
    try:
        until(lambda: child.ready, 60)
        assert child.report == {"state": "ready", "running": 0, "waiting": 0}
        child.drain()
        until(lambda: child.ended, 20)
        with pytest.raises(EngineGoneError, match="the engine "):
            child.check()
    finally:
        child.kill()


@pytest.mark.model
@pytest.mark.parametrize("ready", [True, False])
def test_an_engine_ends_with_its_starter(ready: bool) -> None:
    command = [sys.executable, "-c", STARTER, *ENGINE]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as starter:
        try:
            assert starter.stdout is not None
            engine = psutil.Process(int(starter.stdout.readline()))
            while ready and starter.stdout.readline() != b"ready\n":
                assert starter.poll() is None
        finally:
            starter.kill()
    with suppress(psutil.NoSuchProcess):
        until(lambda: engine.status() == psutil.STATUS_ZOMBIE, 20)


def test_an_engine_that_cannot_load_says_why() -> None:
    child = EngineChild([str(LLMKIT), "engine", "no-such-model"])
    with pytest.raises(EngineGoneError, match=r"(?s)exit status 1.*no-such-model"):
        until(lambda: child.ready, 60)
    with pytest.raises(EngineGoneError, match="/no/llmkit cannot be started: No such file"):
        EngineChild(["/no/llmkit", "engine"])


def test_an_engine_that_was_killed() -> None:
    child = EngineChild([sys.executable, "-c", "import time; time.sleep(600)"])
    assert not child.ready and not child.report
    child.kill()
    with pytest.raises(EngineGoneError, match="ended by SIGKILL, perhaps because memory ran out"):
        child.check()


def test_reports_are_lines_until_nobody_reads() -> None:
    reading, writing = os.pipe()
    lost = threading.Event()
    reports = Reports(writing, lost.set)
    assert not lost.wait(0.2), "a reader is there, though nothing was said"
    reports.begin(lambda: {"running": 1})
    with open(reading, "rb") as pipe:
        assert json.loads(pipe.readline()) == {"running": 1}
    assert lost.wait(30)
    os.close(writing)


def test_a_reader_that_sleeps_stops_nobody() -> None:
    reading, writing = os.pipe()
    lost, said = threading.Event(), threading.Semaphore(0)

    def read() -> dict[str, str]:
        said.release()
        return {"long": "x" * 50_000}

    Reports(writing, lost.set, read)
    for _ in range(3):  # the pipe holds one
        assert said.acquire(timeout=30)
    os.close(reading)
    assert lost.wait(30)
    os.close(writing)


@pytest.mark.parametrize("fd", [-1, 987_654])
def test_reports_need_a_pipe(fd: int) -> None:
    with pytest.raises(InvalidRequestError, match="open pipe"):
        Reports(fd, lambda: None)
    with open(os.devnull) as file, pytest.raises(InvalidRequestError, match="open pipe"):
        Reports(file.fileno(), lambda: None)
