"""Gateways over real replicas, and streams to compare with what they are undisturbed."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import httpx
from fakes import wait_for
from fleet_parts import KEY

LLMKIT = [sys.executable, "-m", "llmkit"]
ENGINE = ["--deterministic", "--n-slots", "8", "--n-ctx", "512"]  # alike, they compute alike
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
FORM = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}
# Six streams of text and two of JSON.
REQUESTS: list[dict[str, Any]] = [
    *({"prompt": f"A story about number {i}:", "max_tokens": 48} for i in range(6)),
    *(
        {"prompt": f"Person {i} as JSON:", "max_tokens": 200, "response_format": FORM}
        for i in range(2)
    ),
]


class Lines:
    """Reads what a process says, and keeps the first match of a pattern."""

    def __init__(self, process: subprocess.Popen[str], pattern: str) -> None:
        self.process, self._pattern = process, pattern
        self._found: list[str] = []
        self._is_there = threading.Event()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as lines:
            for line in lines:
                match = re.search(self._pattern, line)
                if match and not self._found:
                    self._found.append(match[0])
                    self._is_there.set()

    def wait(self) -> str:
        assert self._is_there.wait(60), f"{self.process.args!r} says no {self._pattern}"
        return self._found[0]

    def close(self) -> None:
        self._thread.join(30)


def started(command: list[str], pattern: str) -> Lines:
    process = subprocess.Popen(
        [*LLMKIT, *command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    return Lines(process, pattern)


class Gateway:
    """A gateway over replicas that compute the same for the same: two workers of its own."""

    def __init__(self) -> None:
        self._serve(["smollm2", "--replicas", "2", *ENGINE])
        self.wait_for(2)

    def _serve(self, options: list[str]) -> None:
        self._lines = started(["serve", *options, "--port", "0"], r"https?://[^\s/]+")
        self.http = httpx.Client(base_url=self._lines.wait(), timeout=120)

    def replicas(self) -> list[dict[str, Any]]:
        """Those that are ready."""
        models = self.http.get("/status").json()["models"]
        found = models[0]["replicas"] if models else []
        return [r for r in found if r["phase"] == "ready"]

    def busiest(self) -> tuple[str, int]:
        """The replica with most requests, and how many: this gateway's own, which it counts as
        they come and go. What an engine says of itself may be half a second old."""
        found = max(self.replicas(), key=lambda r: r["requests"])
        return found["name"], found["requests"]

    def wait_for(self, count: int) -> None:
        wait_for(lambda: len(self.replicas()) == count, 60)

    def stream(self, prompt: str, **more: Any) -> str:
        """All text of a streamed answer. Raises `AssertionError` for a failed one."""
        body = {"model": "smollm2", "prompt": prompt, "stream": True, "temperature": 0, **more}
        text, ends = [], []
        with self.http.stream("POST", "/v1/completions", json=body) as answer:
            assert answer.status_code == 200, answer.read()
            for line in answer.iter_lines():
                if line == "data: [DONE]":
                    ends.append(line)
                elif line.startswith("data: "):
                    event = json.loads(line[6:])
                    assert "error" not in event, event
                    text.append(event["choices"][0]["text"])
        assert len(ends) == 1, "it ends once"
        return "".join(text)

    def ask(self, requests: list[dict[str, Any]]) -> tuple[list[Any], list[threading.Thread]]:
        """Streams that run, and where their texts or errors will be."""
        results: list[Any] = [None] * len(requests)

        def ask(i: int) -> None:
            try:
                results[i] = self.stream(**requests[i])
            except Exception as error:
                results[i] = error

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(requests))]
        for thread in threads:
            thread.start()
        return results, threads

    def undisturbed(self) -> list[str]:
        """What `REQUESTS` are answered with."""
        results, threads = self.ask(REQUESTS)
        for thread in threads:
            thread.join()
        assert all(isinstance(text, str) for text in results), results
        for text in results[6:]:
            made = json.loads(text)
            assert set(made) == {"name", "age", "likes"} and 3 <= len(made["likes"]) <= 5
        return results

    def close(self) -> None:
        self.http.close()
        self._lines.process.terminate()
        self._lines.process.wait(30)
        self._lines.close()


class FleetGateway(Gateway):
    """The same over engines that join it: processes that can be killed, stopped and drained.

    An engine is called by the port in its replica's name.
    """

    def __init__(self, folder: Path, count: int) -> None:
        self.engines: dict[str, Lines] = {}
        key = folder / "fleet.key"
        key.touch(0o600)
        key.write_text(KEY.hex())
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._gate = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
        self._key = ["--fleet-key-file", str(key)]
        self._serve(["--fleet-listen", self._gate, *self._key])
        self.count = count
        try:
            self.fill()
        except BaseException:
            self.close()
            raise

    def fill(self) -> None:
        """Start engines in the place of those that have ended, and wait until all have joined."""
        for name in [n for n, e in self.engines.items() if e.process.poll() is not None]:
            self.engines.pop(name).close()
        command = ["engine", "smollm2", "--join", self._gate, *self._key, "--threads", "1"]
        more = self.count - len(self.engines)
        fresh = [
            started([*command, "--drain-s", "0.5", *ENGINE], r"ready at tcp://\S+:\d+")
            for _ in range(more)
        ]
        for each in fresh:
            self.engines[each.wait().rpartition(":")[2]] = each
        self.wait_for(self.count)

    def signal(self, replica: str, number: signal.Signals) -> subprocess.Popen[str]:
        """Send a signal to the engine of a replica."""
        process = self.engines[replica.rpartition(":")[2]].process
        process.send_signal(number)
        return process

    def close(self) -> None:
        for engine in self.engines.values():
            engine.process.kill()
            engine.process.wait(30)
            engine.close()
        super().close()
