"""Real engines that have joined a gateway are killed, stopped and drained under running streams."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator

import pytest
from replica_parts import REQUESTS, FleetGateway

ROUNDS = max(3, int(os.environ.get("SOAK", "0")) // 40)  # 50 with `make soak`
ENDS = (signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM)  # the last drains it


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FleetGateway]:
    made = FleetGateway(tmp_path_factory.mktemp("fleet"), 3)
    yield made
    made.close()


@pytest.mark.timeout(180 + 90 * ROUNDS)
def test_whatever_ends_a_replica_loses_nothing(gateway: FleetGateway) -> None:
    """Each in turn, to the replica with most streams, at a random moment of eight: each stream is
    whole, and what it is undisturbed."""
    rng = random.Random(14)
    undisturbed = gateway.undisturbed()
    num_hit = 0
    for number in range(ROUNDS):
        end = ENDS[number % len(ENDS)]
        results, threads = gateway.ask(REQUESTS)
        time.sleep(rng.uniform(0.05, 1.5))
        victim, running = gateway.busiest()
        num_hit += running
        process = gateway.signal(victim, end)
        for thread in threads:
            thread.join()
        assert results == undisturbed, (number, end)
        if end is signal.SIGSTOP:
            process.send_signal(signal.SIGCONT)
        else:
            code = process.wait(30)
            assert code == (-signal.SIGKILL if end is signal.SIGKILL else 0)
        gateway.fill()
    assert num_hit >= ROUNDS, "streams that have lost their replica"
