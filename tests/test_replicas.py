"""`llmkit serve --replicas 2` with a real model: replicas are killed under running streams."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from fakes import wait_for

KILLS = max(3, int(os.environ.get("SOAK", "0")) // 40)  # 50 with `make soak`
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "likes": {
            "type": "array",
            "items": {"type": "string", "maxLength": 30},
            "minItems": 3,
            "maxItems": 5,
        },
    },
    "required": ["name", "age", "likes"],
    "additionalProperties": False,
}


class Gateway:
    """A gateway over two replicas that compute the same for the same."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "llmkit", "serve", "smollm2", "--replicas", "2"]
        command += ["--port", "0", "--deterministic", "--n-slots", "8", "--n-ctx", "512"]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self.address = ""
        self._listening = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        assert self._listening.wait(60), "it does not listen"
        self.http = httpx.Client(base_url=self.address, timeout=120)
        self.wait_for_both()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as lines:
            for line in lines:
                found = re.search(r"https?://[^\s/]+", line)
                if found and not self.address:
                    self.address = found[0]
                    self._listening.set()

    def replicas(self) -> list[dict[str, Any]]:
        models = self.http.get("/status").json()["models"]
        found = models[0]["replicas"] if models else []
        return [r for r in found if r["phase"] == "ready"]

    def wait_for_both(self) -> None:
        wait_for(lambda: len(self.replicas()) == 2, 60)

    def stream(self, prompt: str, **more: Any) -> str:
        """All text of a streamed answer. Raises `AssertionError` for a failed one."""
        body = {"model": "smollm2", "prompt": prompt, "stream": True, "temperature": 0, **more}
        text = []
        with self.http.stream("POST", "/v1/completions", json=body) as answer:
            assert answer.status_code == 200, answer.read()
            for line in answer.iter_lines():
                if line.startswith("data: ") and line != "data: [DONE]":
                    event = json.loads(line[6:])
                    assert "error" not in event, event
                    text.append(event["choices"][0]["text"])
        return "".join(text)

    def close(self) -> None:
        self.http.close()
        self.process.terminate()
        self.process.wait(30)
        self._reader.join(5)


@pytest.fixture(scope="module")
def gateway() -> Iterator[Gateway]:
    made = Gateway()
    yield made
    made.close()


def ask_all(gateway: Gateway, requests: list[dict[str, Any]]) -> tuple[list[Any], Any]:
    results: list[Any] = [None] * len(requests)

    def ask(i: int) -> None:
        try:
            results[i] = gateway.stream(**requests[i])
        except Exception as error:
            results[i] = error

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(requests))]
    for thread in threads:
        thread.start()
    return results, threads


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


@pytest.mark.timeout(900)
def test_killed_replicas_lose_nothing(gateway: Gateway) -> None:
    """kill -9 of the busier replica at a random moment of eight streams, six of text and two of
    JSON: each is what it is undisturbed."""
    rng = random.Random(7)
    requests: list[dict[str, Any]] = [
        {"prompt": f"A story about number {i}:", "max_tokens": 48} for i in range(6)
    ]
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}
    requests += [
        {"prompt": f"Person {i} as JSON:", "max_tokens": 200, "response_format": form}
        for i in range(2)
    ]
    results, threads = ask_all(gateway, requests)
    for thread in threads:
        thread.join()
    undisturbed = list(results)
    assert all(isinstance(text, str) for text in undisturbed), undisturbed
    for _ in range(KILLS):
        gateway.wait_for_both()
        # Another beginning each time would be another text; the cache must not answer it alone.
        results, threads = ask_all(gateway, requests)
        time.sleep(rng.uniform(0.05, 1.5))
        there = gateway.replicas()
        if there:
            victim = max(there, key=lambda r: r["num_running"])
            os.kill(int(victim["name"]), signal.SIGKILL)
        for thread in threads:
            thread.join()
        assert results == undisturbed
        for text in results[6:]:
            made = json.loads(text)
            assert set(made) == {"name", "age", "likes"} and 3 <= len(made["likes"]) <= 5


def test_a_prompt_that_kills_engines_kills_two(gateway: Gateway) -> None:
    gateway.wait_for_both()
    results, [thread] = ask_all(gateway, [{"prompt": "Doom:", "max_tokens": 400}])
    killed: list[int] = []
    while thread.is_alive() and len(killed) < 4:
        for each in gateway.replicas():
            pid = int(each["name"])
            if each["num_running"] and pid not in killed:
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)
        time.sleep(0.1)
    thread.join()
    assert len(killed) == 2 and "engines ended" in str(results[0]), results
    gateway.wait_for_both()
    refused = gateway.http.post(
        "/v1/completions", json={"model": "smollm2", "prompt": "Doom:", "max_tokens": 4}
    )
    assert refused.status_code == 500 and refused.json()["error"]["code"] == "engine_died"
    assert gateway.stream("All is well", max_tokens=4)
