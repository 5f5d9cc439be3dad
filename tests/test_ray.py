"""Engines on a real Ray cluster, and a gateway that knows nothing of it."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from hub_server import free_ports
from ray_cluster import LLMKIT, PLAIN, RayCluster, until

pytestmark = [pytest.mark.model, pytest.mark.skipif(sys.platform != "linux", reason="Ray here")]
FILE = """
gateways = ["tcp://127.0.0.1:{port}"]
fleet_key_file = "{key}"
program = "{program}"
drain_s = 30
[models.small]
model = "{model}"
{scale}
num_cpus = 0.5
threads = 1
n_slots = 4
n_ctx = {n_ctx}
"""
TWO, ONE = "replicas = 2", "replicas = 1"
FOLLOW = "max_replicas = 2\ntarget_queue = 1\nscale_up_s = 0\nscale_down_s = 3"


class Fleet:
    """A gateway, and a Ray cluster that is started when it is needed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.key = folder / "fleet.key"
        self.key.touch(mode=0o600)
        self.key.write_text(secrets.token_hex(32))
        http, self.port = free_ports(2)
        self.url = f"http://127.0.0.1:{http}"
        self._cluster: RayCluster | None = None
        listen = f"tcp://127.0.0.1:{self.port}"
        command = [str(LLMKIT), "serve", "--port", str(http), "--fleet-listen", listen]
        self.gateway = subprocess.Popen(
            [*command, "--fleet-key-file", str(self.key)],
            env={**PLAIN, "HOME": str(folder)},
            stdin=subprocess.DEVNULL,
        )

    @property
    def ray(self) -> RayCluster:
        if self._cluster is not None and not self._cluster.alive:
            self._cluster.stop()
            self._cluster = None
        if self._cluster is None:
            self._cluster = RayCluster()
        return self._cluster

    def up(self, scale: str = TWO, **other: Any) -> subprocess.CompletedProcess[str]:
        path = self._folder / "fleet.toml"
        values = {"model": "smollm2", "n_ctx": 1024, "program": LLMKIT, **other}
        path.write_text(FILE.format(scale=scale, port=self.port, key=self.key, **values))
        return self.ray.llmkit("up", str(path))

    def stop(self) -> None:
        self.gateway.terminate()
        with suppress(subprocess.TimeoutExpired):
            self.gateway.wait(30)
        self.gateway.kill()
        self.gateway.wait()
        if self._cluster is not None:
            self._cluster.stop()

    def post(self, **body: Any) -> Any:
        headers = {"Content-Type": "application/json"}
        sent = {"model": "small", "messages": [{"role": "user", "content": "Count."}], **body}
        request = urllib.request.Request(
            f"{self.url}/v1/chat/completions", json.dumps(sent).encode(), headers
        )
        return OPENER.open(request, timeout=60)

    def answer(self) -> str:
        with self.post(max_tokens=4) as reply:
            text: str = json.load(reply)["choices"][0]["message"]["content"]
            return text

    def replicas(self) -> int:
        """How many engines the gateway knows."""
        with OPENER.open(f"{self.url}/status", timeout=10) as reply:
            return sum(len(m["replicas"]) for m in json.load(reply)["models"])


OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class Streams:
    """Some answers of a fixed length, read at the same time."""

    def __init__(self, fleet: Fleet, number: int, tokens: int) -> None:
        self._fleet, self._tokens = fleet, tokens
        self.begun = threading.Semaphore(0)
        self.usages: list[int] = []
        self._threads = [threading.Thread(target=self._read) for _ in range(number)]
        for thread in self._threads:
            thread.start()
        for _ in self._threads:
            assert self.begun.acquire(timeout=30)

    def _read(self) -> None:
        more = {"stream": True, "stream_options": {"include_usage": True}, "ignore_eos": True}
        with self._fleet.post(max_tokens=self._tokens, **more) as reply:
            for number, line in enumerate(reply):
                if number == 4:
                    self.begun.release()
                if line.startswith(b"data: {") and b'"usage":{' in line.replace(b" ", b""):
                    usage = json.loads(line[6:])["usage"]
                    if usage:
                        self.usages.append(usage["completion_tokens"])

    def whole(self) -> bool:
        for thread in self._threads:
            thread.join(60)
        return self.usages == [self._tokens] * len(self._threads)


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    fleet = Fleet(tmp_path_factory.mktemp("fleet"))
    try:
        yield fleet
    finally:
        fleet.stop()


def test_engines_are_started_replaced_and_leave_nothing(fleet: Fleet) -> None:
    done = fleet.up()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "llmkit-small: running, 2 of 2 engines ready" in done.stdout
    until(lambda: fleet.replicas() == 2, 20)
    assert fleet.answer()
    before = fleet.ray.engines()
    assert len(before) == 2

    streams = Streams(fleet, 4, 150)
    actor, engine = next(iter(before.items()))
    engine.kill()  # llama.cpp aborts
    assert streams.whole()
    until(lambda: len(after := fleet.ray.engines()) == 2 and engine.pid not in pids(after), 60)

    actor, engine = next(iter(fleet.ray.engines().items()))
    psutil.Process(actor).kill()
    until(lambda: not engine.is_running() or engine.status() == psutil.STATUS_ZOMBIE, 20)
    until(lambda: len(after := fleet.ray.engines()) == 2 and actor not in after, 60)
    until(lambda: fleet.replicas() == 2, 20)
    assert fleet.answer()


def pids(engines: dict[int, psutil.Process]) -> set[int]:
    return {each.pid for each in engines.values()}


def test_a_change_drains_and_a_number_alone_does_not(fleet: Fleet) -> None:
    assert fleet.up().returncode == 0
    before = pids(fleet.ray.engines())
    assert fleet.up().returncode == 0
    assert pids(fleet.ray.engines()) == before, "nothing had changed"
    assert fleet.up(ONE).returncode == 0
    until(lambda: len(fleet.ray.engines()) == 1, 40)
    assert pids(fleet.ray.engines()) < before
    assert fleet.up().returncode == 0

    streams = Streams(fleet, 4, 150)
    before = pids(fleet.ray.engines())
    assert fleet.up(n_ctx=768).returncode == 0
    assert streams.whole()
    until(lambda: not pids(fleet.ray.engines()) & before, 40)


def test_the_number_follows_the_load(fleet: Fleet) -> None:
    assert fleet.up(FOLLOW).returncode == 0
    until(lambda: len(fleet.ray.engines()) == 1, 60)
    streams = Streams(fleet, 4, 250)
    until(lambda: len(fleet.ray.engines()) == 2, 60)
    assert streams.whole()
    until(lambda: len(fleet.ray.engines()) == 1, 60)


def test_what_cannot_start_says_why(fleet: Fleet) -> None:
    done = fleet.up(ONE, model="no-such-model")
    assert done.returncode == 1, done.stdout
    assert "could not be started: the engine ended with exit status 1" in done.stderr
    assert "there is no model 'no-such-model'" in done.stderr and "Traceback" not in done.stderr


def test_down_leaves_nothing(fleet: Fleet) -> None:
    assert fleet.up(ONE).returncode == 0
    done = fleet.ray.llmkit("down", str(fleet._folder / "fleet.toml"))
    assert done.returncode == 0 and "ended llmkit-small" in done.stdout
    assert not fleet.ray.engines() and not fleet.ray.details()["applications"]
    again = fleet.ray.llmkit("down", str(fleet._folder / "fleet.toml"))
    assert again.returncode == 0 and "nothing of llmkit runs" in again.stdout


def test_the_end_of_rays_head_ends_no_stream(fleet: Fleet) -> None:
    assert fleet.up(ONE).returncode == 0
    assert fleet.answer()
    streams = Streams(fleet, 4, 150)
    os.kill(fleet.ray.one("gcs_server").pid, signal.SIGKILL)
    assert streams.whole()
    assert fleet.answer() and fleet.gateway.poll() is None
