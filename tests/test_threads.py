"""The thread governor against a simulated machine, the turns of two models, and readers of one."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import threading
import time

import pytest
from fakes import wait_for

from llmkit.engine.threads import ThreadGovernor
from llmkit.errors import ModelUnloadedError
from llmkit.runtime.cpu_turns import CpuTurns
from llmkit.runtime.reading import Reading
from llmkit.system.waiting import deferred, uninterrupted


class Machine:
    """``cores`` of which ``busy`` are taken by others: as soon as a thread shares its core, all of
    them wait for it."""

    def __init__(self, cores: int) -> None:
        self.cores, self.busy, self.threads, self.now = cores, 0, cores, 0.0
        self.rng = random.Random(1)
        self.spent: dict[int, float] = {}

    def set_threads(self, count: int) -> None:
        self.threads = count

    def step(self, num_tokens: int) -> float:
        crowded = self.threads > self.cores - self.busy
        seconds = (
            0.02
            * (2 + num_tokens)
            / self.threads
            * (3 if crowded else 1)
            * self.rng.uniform(0.95, 1.1)
        )
        self.now += seconds
        self.spent[self.threads] = self.spent.get(self.threads, 0.0) + seconds
        return seconds


@pytest.mark.parametrize(("cores", "best_when_busy"), [(2, 1), (8, 7), (16, 15)])
def test_follows_the_load(cores: int, best_when_busy: int) -> None:
    machine = Machine(cores)
    governor = ThreadGovernor(cores, machine.set_threads, clock=lambda: machine.now)

    def run(steps: int) -> float:
        """The share of the time that was spent with the best count for this load."""
        machine.spent.clear()
        for _ in range(steps):
            tokens = machine.rng.choice([1, 4, 8, 64])
            governor.observe(tokens, machine.step(tokens))
        best = best_when_busy if machine.busy else cores
        return machine.spent.get(best, 0.0) / sum(machine.spent.values())

    assert run(300) == 1, "nothing is tried while nothing is wrong"
    machine.busy = 1
    run(40)
    assert governor.count == best_when_busy and run(600) > 0.85
    machine.busy = 0
    run(400)
    assert governor.count == cores and run(300) > 0.95


def test_when_its_owner_knows_the_cores_are_free_nothing_is_tried() -> None:
    """As when the last picture is encoded: the next step is the picture's own, and long."""
    machine = Machine(2)
    governor = ThreadGovernor(2, machine.set_threads, clock=lambda: machine.now)
    for busy in (0, 1, 1):
        machine.busy = busy
        for _ in range(100):
            governor.observe(1, machine.step(1))
    assert machine.threads == 1
    machine.busy = 0
    governor.free()
    assert machine.threads == governor.count == 2
    machine.spent.clear()
    for tokens in [64, *[1] * 300]:
        governor.observe(tokens, machine.step(tokens))
    assert list(machine.spent) == [2]


def test_a_machine_that_got_slower_for_good_is_not_tried_for_ever() -> None:
    machine = Machine(4)
    governor = ThreadGovernor(4, machine.set_threads, clock=lambda: machine.now)
    for _ in range(100):
        governor.observe(8, machine.step(8))
    switches = 0
    for _ in range(1000):
        before = machine.threads
        governor.observe(
            8, 2 * machine.step(8)
        )  # everything takes twice as long, whatever the count
        switches += machine.threads != before
    assert governor.count == 4 and switches < 30


def test_one_core_is_left_alone() -> None:
    governor = ThreadGovernor(1, lambda _: pytest.fail("there is no choice"))
    for seconds in (0.01, 1.0) * 100:
        governor.observe(4, seconds)


def test_turns_are_taken_in_order() -> None:
    turns, order = CpuTurns(), []

    def work(name: int) -> None:
        with turns:
            order.append(name)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(9)]
    with turns:
        for i, thread in enumerate(threads, 1):
            thread.start()
            wait_for(lambda i=i: len(turns._waiting) == i)
    for thread in threads:
        thread.join(30)
    assert order == list(range(9))


def test_a_turn_is_not_handed_to_one_that_was_stopped() -> None:
    """The stop button while a load waits for its turn: the others go on."""
    turns = CpuTurns()

    def press() -> None:
        wait_for(lambda: len(turns._waiting) == 1)
        os.kill(os.getpid(), signal.SIGINT)

    ended, inside = threading.Event(), threading.Event()

    def compute() -> None:
        with turns:
            inside.set()
            ended.wait(30)

    thread = threading.Thread(target=compute)
    thread.start()
    assert inside.wait(30)
    threading.Thread(target=press).start()
    with pytest.raises(KeyboardInterrupt), turns:
        pytest.fail("it is not our turn")
    ended.set()
    thread.join(30)
    with turns:
        assert not turns._waiting


def test_the_stop_button_waits_for_what_must_be_finished() -> None:
    """Half of an unload would be worse than none: the work ends first, and an interrupt comes after
    it; what fails, fails."""
    done = []

    def work() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.2)
        done.append(threading.current_thread().name)

    with pytest.raises(KeyboardInterrupt):
        uninterrupted(work)
    assert done == ["llmkit-finish"]
    with pytest.raises(ZeroDivisionError):
        uninterrupted(lambda: 1 / 0)
    result = 0
    with pytest.raises(KeyboardInterrupt), deferred():
        os.kill(os.getpid(), signal.SIGINT)
        result = 1 + len("what a C call returned")
    assert result and signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.model
@pytest.mark.parametrize("chosen", [{}, {"GOMP_SPINCOUNT": "77"}, {"OMP_WAIT_POLICY": "active"}])
def test_openmp_spins_shortly_unless_the_user_says_else(chosen: dict[str, str]) -> None:
    """Told by OpenMP itself, which prints its settings when it is loaded; nothing of it stays in
    the environment for child processes."""
    code = (
        "import os; before = dict(os.environ); import llmkit.backend.llama; "
        "print(dict(os.environ) == before)"
    )
    outside = {
        name: value
        for name, value in os.environ.items()
        if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    }
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**outside, **chosen, "OMP_DISPLAY_ENV": "verbose"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout == "True\n"
    if "GOMP_SPINCOUNT" in done.stderr:  # GNU's OpenMP
        (count,) = set(re.findall(r"GOMP_SPINCOUNT = '(\w+)'", done.stderr))
        assert (
            count == chosen.get("GOMP_SPINCOUNT", "3000")
            if "OMP_WAIT_POLICY" not in chosen
            else count not in ("3000", "77")
        )


def test_what_is_read_is_not_freed() -> None:
    closed = threading.Event()

    def check_open() -> None:
        if closed.is_set():
            raise ModelUnloadedError("unloaded")

    reading, order = Reading(threading.Lock(), check_open), []

    def close() -> None:
        closed.set()
        assert reading.ended()
        order.append("freed")

    with reading(), reading():
        closing = threading.Thread(target=close)
        closing.start()
        wait_for(closed.is_set)
        with pytest.raises(ModelUnloadedError), reading():
            pytest.fail("nobody begins any more")
        assert not reading.ended(0.05)
        order.append("read")
    closing.join()
    assert order == ["read", "freed"] and reading.ended(0)
