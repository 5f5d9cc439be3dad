"""A model of a manager, on workers that do what the test says: loaded again, and what it holds."""

from __future__ import annotations

import mmap
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fakes import wait_for

from llmkit.models.registry import resolve
from llmkit.protocol import EngineState
from llmkit.workers import place as places
from llmkit.workers.budget import Budget, Need
from llmkit.workers.models import ModelManager
from llmkit.workers.place import Place, ServedModel
from llmkit.workers.resident import Resident, resident

HUNG_S = 30.0
MB = 1 << 20


class Hand:
    """A `Crew` whose model is loaded when the test says so."""

    made: list[Hand]

    def __init__(
        self, task: dict[str, Any], replicas: int, *, on_ready: Callable[[], None]
    ) -> None:
        self.made.append(self)
        self.state = EngineState("loading")
        self.restarts, self.num_ready, self.pids, self.failure = 0, 0, (), None
        self.is_closed = False
        self._on_ready = on_ready

    def becomes_ready(self) -> None:
        self.state = EngineState("ready")
        self._on_ready()

    def close(self) -> None:
        self.is_closed = True

    kill = close


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Hand]:
    """The workers, as they are started."""
    Hand.made = []
    monkeypatch.setattr(places, "Crew", Hand)
    return Hand.made


@pytest.fixture
def manager(made: list[Hand]) -> Iterator[ModelManager]:
    task = {"path": "/nothing/a.gguf", "options": {"projector": "none"}}
    manager = ModelManager([ServedModel("a", lambda: task)], drain_s=600.0)
    yield manager
    manager.close()


def test_a_reload_does_not_wait_for_requests_that_wait_for_the_load(
    manager: ModelManager, made: list[Hand]
) -> None:
    wait_for(lambda: len(made) == 1)
    entered = manager.enter("a")
    request = manager.load("a")
    with manager._lock:  # both before the next worker
        reloads = [manager.unload("a", again=True) for _ in range(2)]
    wait_for(lambda: len(made) == 2, HUNG_S)
    assert made[0].is_closed and not request.done()
    made[1].becomes_ready()
    for future in (request, *reloads):
        future.result(HUNG_S)
    assert manager.phase("a") == "ready" and manager.status("a").num_used == 1
    manager.leave("a", entered)
    assert manager.status("a").num_used == 0


@pytest.mark.parametrize("phase", ["ready", "loading", "unloaded"])
def test_a_model_is_loaded_again_though_who_asked_for_that_has_left(
    manager: ModelManager, made: list[Hand], phase: str
) -> None:
    wait_for(lambda: len(made) == 1)
    if phase != "loading":
        made[0].becomes_ready()
        wait_for(lambda: manager.phase("a") == "ready")
    if phase == "unloaded":
        manager.unload("a").result(HUNG_S)
    manager.unload("a", again=True).cancel()
    wait_for(lambda: len(made) == 2, HUNG_S)
    made[1].becomes_ready()
    wait_for(lambda: manager.phase("a") == "ready", HUNG_S)


def test_who_asks_again_puts_no_unload_off() -> None:
    place = Place(ServedModel("a", dict), lambda: None, phase="ready")
    place.drain(None, 10.0, True)
    until = place.drain_until
    place.drain(None, 600.0, True)
    assert place.drain_until == until
    place.drain(None, 0.0, True)
    assert place.drain_until <= time.monotonic()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells")
def test_what_is_mapped_is_resident_but_not_used() -> None:
    weights = resolve("smollm2").path  # on a disk; folders for temporary files may be in memory
    before = resident(os.getpid())
    with weights.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        assert sum(mapped[i] for i in range(0, 64 * MB, 4096))
        after = resident(os.getpid())
    assert after.all_bytes - before.all_bytes > 60 * MB
    assert after.used_bytes - before.used_bytes < 20 * MB


def test_what_the_system_says_of_a_process(tmp_path: Path) -> None:
    status = tmp_path / str(os.getpid()) / "status"
    status.parent.mkdir()
    status.write_text("VmRSS:\t 9 kB\nRssAnon:\t 4 kB\nRssFile:\t 3 kB\nRssShmem:\t 2 kB\n")
    assert resident(os.getpid(), proc=tmp_path).used_bytes == 6 * 1024
    elsewhere = resident(os.getpid(), proc=tmp_path / "none")
    assert elsewhere.used_bytes == elsewhere.all_bytes > MB
    assert resident(1 << 30) == Resident(0, 0)


def test_mapped_weights_count_though_the_system_calls_them_free(
    monkeypatch: pytest.MonkeyPatch, made: list[Hand]
) -> None:
    monkeypatch.setattr(places, "resident", lambda pid, with_children: Resident(600 * MB, 100 * MB))
    task = {"path": "/nothing/a.gguf", "options": {"projector": "none"}}
    place = Place(ServedModel("a", lambda: task, lambda _: Need(600 * MB)), lambda: None)
    wait_for(lambda: place.need() is not None)
    place.start()
    made[0].pids = (1,)
    assert place.status(False).ram_bytes == 600 * MB
    budget = Budget(free=lambda: 900 * MB)  # of 1000, as the 500 in files count as free
    assert budget.lacking(Need(400 * MB), [place.holding()]) == ""
    assert "needed" in budget.lacking(Need(401 * MB), [place.holding()])
    made[0].pids = (1, 2, 3)  # replicas map the same 500
    assert budget.lacking(Need(400 * MB), [place.holding()]) == ""
    assert "needed" in budget.lacking(Need(401 * MB), [place.holding()])
