"""`llmkit serve --replicas 2` with a real model: replicas are killed under running streams."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator

import pytest
from fakes import wait_for
from replica_parts import REQUESTS, Gateway

KILLS = 2  # a worker that ends five times in a row is given up; `test_replicas_fleet.py` does more


@pytest.fixture(scope="module")
def gateway() -> Iterator[Gateway]:
    made = Gateway()
    yield made
    made.close()


def test_replicas_are_seen_and_answer(gateway: Gateway) -> None:
    answer = gateway.http.post(
        "/v1/chat/completions",
        json={"model": "smollm2", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 8},
    ).json()
    assert answer["usage"]["completion_tokens"] <= 8 and answer["choices"]
    [model] = gateway.http.get("/v1/models").json()["data"]
    assert model["id"] == "smollm2"
    metrics = gateway.http.get("/metrics").text
    assert 'llmkit_model_replicas{model="smollm2",state="ready"} 2.0' in metrics
    [offered] = gateway.http.get("/status").json()["offered"]
    assert offered["replicas"] == offered["replicas_ready"] == len(offered["pids"]) == 2


def test_killed_replicas_lose_nothing(gateway: Gateway) -> None:
    """kill -9 of the busier replica at a random moment of eight streams, six of text and two of
    JSON: each is what it is undisturbed."""
    rng = random.Random(7)
    undisturbed = gateway.undisturbed()
    for _ in range(KILLS):
        gateway.wait_for(2)
        results, threads = gateway.ask(REQUESTS)
        time.sleep(rng.uniform(0.05, 1.5))
        os.kill(int(gateway.busiest()[0]), signal.SIGKILL)
        for thread in threads:
            thread.join()
        assert results == undisturbed


def test_a_stopped_replica_loses_nothing_and_is_replaced(gateway: Gateway) -> None:
    gateway.wait_for(2)
    undisturbed = gateway.undisturbed()
    results, threads = gateway.ask(REQUESTS)
    time.sleep(0.5)
    stopped = gateway.busiest()[0]
    os.kill(int(stopped), signal.SIGSTOP)
    for thread in threads:
        thread.join()
    assert results == undisturbed

    def is_replaced() -> bool:
        names = [replica["name"] for replica in gateway.replicas()]
        return len(names) == 2 and stopped not in names

    wait_for(is_replaced, 60)


def test_a_prompt_that_kills_engines_kills_two(gateway: Gateway) -> None:
    gateway.wait_for(2)
    results, [thread] = gateway.ask([{"prompt": "Doom:", "max_tokens": 400}])
    killed: list[int] = []
    while thread.is_alive() and len(killed) < 4:
        for each in gateway.replicas():
            pid = int(each["name"])
            if each["requests"] and pid not in killed:
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)
        time.sleep(0.1)
    thread.join()
    assert len(killed) == 2 and "2 engines ended" in str(results[0]), results
    assert "killed or restarted. The prompt is refused for a minute." in str(results[0])
    gateway.wait_for(2)
    refused = gateway.http.post(
        "/v1/completions", json={"model": "smollm2", "prompt": "Doom:", "max_tokens": 4}
    )
    assert refused.status_code == 500 and refused.json()["error"]["code"] == "engine_died"
    assert gateway.stream("All is well", max_tokens=4)
