"""Several models in one server: loaded when asked for, within a budget, one evicted for another,
and what happens when one crashes. Real workers, but for the budget's arithmetic."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from fakes import wait_for

from llmkit.bridge.client import BridgeClient
from llmkit.bridge.connection import find_connections
from llmkit.errors import (
    InsufficientMemoryError,
    ModelBusyError,
    ModelLoadError,
    ModelNotFoundError,
)
from llmkit.protocol import GenerationRequest, SamplingParams
from llmkit.wanted import worker_task
from llmkit.workers.budget import Budget, Need, need_of
from llmkit.workers.models import ModelManager
from llmkit.workers.place import ModelStatus, ServedModel

MB = 1 << 20
LOAD_S = 60


def small(name: str, mb: int = 300, **options: Any) -> ServedModel:
    """The embedded model under a name, said to need so much memory."""
    return ServedModel(
        name,
        lambda: worker_task("smollm2", name=name, tuned=False, force=True, n_ctx=1024, n_slots=1),
        lambda _: Need(mb * MB),
        **options,
    )


@pytest.fixture
def manage() -> Iterator[Callable[..., ModelManager]]:
    managers: list[ModelManager] = []

    def make(*models: ServedModel, **options: Any) -> ModelManager:
        managers.append(ModelManager(models, **options))
        return managers[-1]

    yield make
    for manager in managers:
        manager.close()


def phases(manager: ModelManager) -> dict[str, str]:
    return {status.name: status.phase for status in manager.statuses()}


def test_a_model_is_loaded_when_first_asked_for_and_ends_with_its_manager(
    manage: Callable[..., ModelManager],
) -> None:
    seen: list[tuple[str, str]] = []
    manager = manage(
        small("a"),
        small("b", lazy=True, aliases=("bee",)),
        on_change=lambda s: seen.append((s.name, s.phase)),
    )
    assert manager.default == "a"
    wait_for(lambda: phases(manager) == {"a": "ready", "b": "unloaded"}, LOAD_S)
    manager.load("bee").result(LOAD_S)
    assert phases(manager) == {"a": "ready", "b": "ready"}
    assert {c.model.name for c in find_connections() if c.pid in manager.pids()} == {"a", "b"}
    status = manager.status("bee")
    assert status.loads == 1 and status.load_s > 0 and status.ram_bytes > 50 * MB
    with pytest.raises(ModelNotFoundError, match="there are: 'a', 'b'"):
        manager.load("c")
    pids = manager.pids()
    manager.close()
    assert not any(psutil.pid_exists(pid) for pid in pids) and not find_connections()
    assert ("b", "loading") in seen and ("b", "ready") in seen


def test_the_least_recently_used_model_makes_way_but_never_one_in_use(
    manage: Callable[..., ModelManager],
) -> None:
    # Resident memory counts where it is more than the estimate, which it is not here.
    models = [small(name, 500, lazy=True) for name in "abc"]
    manager = manage(*models, budget=Budget(ram_bytes=1200 * MB))
    manager.load("a").result(LOAD_S)
    manager.load("b").result(LOAD_S)
    manager.enter("a")  # now b is the older one, and a is in use
    manager.load("c").result(LOAD_S)
    assert phases(manager) == {"a": "ready", "b": "unloaded", "c": "ready"}
    entered = manager.enter("c")
    waiting = manager.load("b")
    time.sleep(1)
    assert not waiting.done() and phases(manager)["a"] == phases(manager)["c"] == "ready"
    manager.leave("c", entered)
    waiting.result(LOAD_S)
    assert phases(manager) == {"a": "ready", "b": "ready", "c": "unloaded"}


def test_a_pinned_model_stays_and_one_that_can_never_fit_is_refused(
    manage: Callable[..., ModelManager], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmkit.workers.models.WAIT_FOR_ROOM_S", 0.5)
    manager = manage(
        small("a", 800, pinned=True),
        small("b", 800, lazy=True),
        small("huge", 5000, lazy=True),
        budget=Budget(ram_bytes=1000 * MB),
    )
    wait_for(lambda: phases(manager)["a"] == "ready", LOAD_S)
    with pytest.raises(ModelBusyError, match=r"no room for 'b'.*'a' must stay"):
        manager.load("b").result(LOAD_S)
    with pytest.raises(InsufficientMemoryError, match=r"needs 4.9 GiB of RAM.*budget"):
        manager.load("huge").result(LOAD_S)
    assert phases(manager)["a"] == "ready"


def test_an_idle_model_is_unloaded_and_comes_back(manage: Callable[..., ModelManager]) -> None:
    manager = manage(small("a"), idle_unload_s=0.5)
    entered = manager.enter("a")
    manager.load("a").result(LOAD_S)
    time.sleep(1.2)
    assert phases(manager)["a"] == "ready"  # in use
    manager.leave("a", entered)
    wait_for(lambda: phases(manager)["a"] == "unloaded", 60)
    assert not manager.pids()
    manager.keep("a", None)  # never again
    manager.load("a").result(LOAD_S)
    time.sleep(1.2)
    assert phases(manager)["a"] == "ready"
    manager.keep("a", 0)
    wait_for(lambda: phases(manager)["a"] == "unloaded", 60)


def test_unloading_waits_for_requests_or_is_refused_or_ends_them(
    manage: Callable[..., ModelManager],
) -> None:
    manager = manage(small("a"))
    manager.load("a").result(LOAD_S)
    entered = manager.enter("a")
    with pytest.raises(ModelBusyError, match="is answering requests"):
        manager.unload("a", drain=False)
    done = manager.unload("a")
    late = manager.enter("a")  # it comes in time to have the model loaded again
    again = manager.load("a")
    time.sleep(0.6)
    assert not done.done() and not again.done()
    manager.leave("a", entered)
    done.result(30)
    again.result(LOAD_S)
    manager.leave("a", late)
    (before,) = manager.pids()
    manager.enter("a")
    manager.unload("a", force=True, again=True).result(LOAD_S)
    (after,) = manager.pids()
    assert before != after and phases(manager)["a"] == "ready"


def test_a_crash_is_one_models_alone(manage: Callable[..., ModelManager]) -> None:
    manager = manage(small("a"), small("b"))
    wait_for(lambda: set(phases(manager).values()) == {"ready"}, LOAD_S)
    engines = {c.model.name: BridgeClient(c) for c in find_connections()}
    params = {n: SamplingParams(max_tokens=t, ignore_eos=True) for n, t in (("a", 900), ("b", 200))}
    many, (other,) = (
        [engines[n].submit(GenerationRequest(f"{n}{i}", params[n], prompt="One")) for i in range(c)]
        for n, c in (("a", 9), ("b", 1))
    )
    next(iter(many[0]))
    pid = manager.status("a").pid
    assert pid is not None
    os.kill(pid, signal.SIGSEGV)
    with pytest.raises(Exception, match="has ended"):
        many[-1].result(30)  # which cannot have ended by itself
    assert other.result(300).usage.completion_tokens == 200
    wait_for(lambda: manager.status("a").restarts == 1, 30)
    wait_for(lambda: phases(manager)["a"] == "ready", LOAD_S)
    assert manager.status("a").pid != pid
    for engine in engines.values():
        engine.close()


def test_a_crash_loop_ends_with_the_last_lines_of_its_log(
    manage: Callable[..., ModelManager], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmkit.workers.supervisor.MAX_CRASHES", 2)
    monkeypatch.setattr("llmkit.workers.supervisor.FIRST_DELAY_S", 0.05)
    manager = manage(small("a"), small("b"))
    wait_for(lambda: set(phases(manager).values()) == {"ready"}, LOAD_S)
    killed: list[int | None] = [None]
    for _ in range(2):
        wait_for(lambda: phases(manager)["a"] == "ready", LOAD_S)
        wait_for(lambda: manager.status("a").pid not in killed)
        pid = manager.status("a").pid
        assert pid is not None
        killed.append(pid)
        os.kill(pid, signal.SIGKILL)
    wait_for(lambda: phases(manager)["a"] == "failed", 30)
    assert "ended 2 times" in manager.status("a").reason
    assert "SIGKILL, perhaps because memory ran out" in manager.status("a").reason
    assert phases(manager)["b"] == "ready"
    manager.check()  # one of two may fail


def test_a_file_that_cannot_be_loaded_fails_its_own_callers(
    manage: Callable[..., ModelManager], tmp_path: Path
) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + bytes(100))
    bad = ServedModel(
        "bad",
        lambda: worker_task(tmp_path / "bad.gguf", name="bad", tuned=False, force=False),
        need_of,
        lazy=True,
    )
    manager = manage(bad, small("a", lazy=True))
    first, second = manager.load("bad"), manager.load("bad")
    for future in (first, second):
        with pytest.raises(ModelLoadError):
            future.result(LOAD_S)
    with pytest.raises(ModelLoadError):  # at once, for a while
        manager.load("bad").result(0.1)
    manager.load("a").result(LOAD_S)
    assert phases(manager) == {"bad": "failed", "a": "ready"}


def test_models_that_are_found_later(manage: Callable[..., ModelManager]) -> None:
    asked: list[str] = []

    def find(name: str) -> ServedModel | None:
        asked.append(name)
        return small("found", lazy=True) if name.startswith("found") else None

    manager = manage(find=find)
    assert manager.default is None and manager.name_of("other") is None
    assert manager.name_of("found:latest") == "found" and manager.name_of("found") == "found"
    assert asked == ["other", "found:latest"]
    manager.load("found").result(LOAD_S)


def test_waiters_do_not_wait_forever(manage: Callable[..., ModelManager]) -> None:
    manager = manage(small("a", lazy=True))
    future = manager.load("a")
    manager.close()
    assert isinstance(future, Future) and future.done()


def test_what_is_measured_counts_where_it_is_more_than_the_estimate() -> None:
    budget = Budget(free=lambda: 10 * MB)
    # 4 MB of its 6 are resident already, so only 2 more are spoken for.
    assert budget.lacking(Need(8 * MB), [Need(6 * MB, resident_bytes=4 * MB)]) == ""
    assert "needed" in budget.lacking(Need(9 * MB), [Need(6 * MB, resident_bytes=4 * MB)])
    gpu = Budget(gpu_bytes=10 * MB, free=lambda: 1 << 40)
    assert "GPU memory" in gpu.lacking(Need(0, 6 * MB), [Need(0, 5 * MB)])
    assert gpu.lacking(Need(0, 5 * MB), [Need(0, 5 * MB)]) == ""


def test_the_need_of_a_task_is_the_estimate_of_its_load() -> None:
    import llmkit

    task = worker_task("smollm2", name="a", tuned=False, force=False, n_ctx=1024, n_slots=4)
    estimate = llmkit.estimate("smollm2", n_ctx=1024, n_slots=4)
    assert need_of(task).ram_bytes == estimate.ram_bytes
    beyond = worker_task("minilm", name="m", tuned=False, force=False, n_ctx=1024, n_slots=4)
    assert 0 < need_of(beyond).ram_bytes < 500 * MB  # an embedder takes less than it is told
    with_draft = worker_task(
        "smollm2", name="a", tuned=False, force=False, n_ctx=1024, n_slots=4, draft="smollm2"
    )
    assert need_of(with_draft).ram_bytes == 2 * estimate.ram_bytes


def test_a_status_is_plain_data(manage: Callable[..., ModelManager]) -> None:
    (status,) = manage(small("a", lazy=True, aliases=("x",), pinned=True)).statuses()
    assert status == ModelStatus("a", "unloaded", is_default=True, pinned=True, aliases=("x",))


def test_killing_does_not_wait_for_a_worker_that_is_stuck(
    manage: Callable[..., ModelManager],
) -> None:
    manager = manage(small("a"))
    manager.load("a").result(LOAD_S)
    pid = manager.status("a").pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    closing = threading.Thread(target=manager.close)
    closing.start()
    time.sleep(0.5)
    assert psutil.pid_exists(pid)
    manager.kill()
    closing.join(30)
    assert not closing.is_alive() and not psutil.pid_exists(pid)


def test_a_server_ends_only_when_nothing_is_left_to_serve(
    manage: Callable[..., ModelManager],
) -> None:
    def broken() -> dict[str, Any]:
        raise ModelLoadError("broken")

    lazy = manage(ServedModel("bad", broken, lazy=True))
    with pytest.raises(ModelLoadError):
        lazy.load("bad").result(30)
    lazy.check()  # a request must not end the server
    finding = manage(find=lambda name: ServedModel(name, broken, lazy=True))
    assert finding.name_of("huge") == "huge"
    with pytest.raises(ModelLoadError):
        finding.load("huge").result(30)
    finding.check()
    eager = manage(ServedModel("bad", broken))
    wait_for(lambda: phases(eager) == {"bad": "failed"})
    with pytest.raises(ModelLoadError, match="broken"):
        eager.check()


def test_who_waits_longer_goes_first_though_its_victim_is_asked_for_again(
    manage: Callable[..., ModelManager],
) -> None:
    manager = manage(
        small("victim", 500, lazy=True),
        small("new", 500, lazy=True),
        budget=Budget(ram_bytes=800 * MB),
    )
    manager.load("victim").result(LOAD_S)
    new = manager.load("new")
    wait_for(lambda: phases(manager)["victim"] in ("draining", "stopping", "unloaded"))
    again = manager.load("victim")  # comes first in the table, but later in time
    new.result(LOAD_S)
    assert not again.done() or again.exception() is None


def test_models_of_the_start_push_nobody_out(manage: Callable[..., ModelManager]) -> None:
    first = threading.Event()
    late = replace(small("b"), need=lambda _: (first.wait(60), Need(500 * MB))[1])
    manager = manage(
        small("a", 500), late, budget=Budget(ram_bytes=800 * MB),
        on_change=lambda s: first.set() if s.phase == "ready" else None,
    )  # fmt: skip
    wait_for(lambda: phases(manager) == {"a": "ready", "b": "failed"}, LOAD_S)
    assert "make it lazy" in manager.status("b").reason and manager.status("a").loads == 1


def test_a_reload_waits_for_old_requests_only(manage: Callable[..., ModelManager]) -> None:
    manager = manage(small("a"), drain_s=600)
    manager.load("a").result(LOAD_S)
    old = manager.enter("a")
    done = manager.unload("a", again=True)
    new = manager.enter("a")  # waits for the reload, so the reload must not wait for it
    manager.leave("a", old)
    done.result(LOAD_S)
    assert phases(manager)["a"] == "ready"
    assert manager.status("a").num_used == 1
    manager.leave("a", new)
    assert manager.status("a").num_used == 0


def test_unloading_what_is_being_prepared_ends_it(manage: Callable[..., ModelManager]) -> None:
    go, made = threading.Event(), []

    def slow() -> dict[str, Any]:
        made.append(1)
        go.wait(30)
        return worker_task("smollm2", name="a", tuned=False, force=True, n_ctx=256, n_slots=1)

    manager = manage(ServedModel("a", slow, lambda _: Need(1), lazy=True))
    waiting = manager.load("a")
    wait_for(lambda: made == [1])
    manager.unload("a").result(30)
    with pytest.raises(ModelBusyError, match="being unloaded"):
        waiting.result(30)
    go.set()
    time.sleep(0.5)
    assert phases(manager) == {"a": "unloaded"} and made == [1] and not manager.pids()
    manager.load("a").result(LOAD_S)
    assert made == [1, 1]


def test_nobody_waits_for_a_load_that_all_have_left(manage: Callable[..., ModelManager]) -> None:
    manager = manage(
        small("a", 700, pinned=True), small("b", 700, lazy=True), budget=Budget(1000 * MB)
    )
    manager.load("a").result(LOAD_S)
    waiting = manager.load("b")
    waiting.cancel()
    wait_for(lambda: manager._places["b"].waiters == [])


def test_after_the_end_nothing_waits(manage: Callable[..., ModelManager]) -> None:
    manager = manage(small("a", lazy=True))
    manager.close()
    with pytest.raises(Exception, match="shutting down"):
        manager.load("a").result(30)
    with pytest.raises(Exception, match="shutting down"):
        manager.unload("a", again=True).result(30)
