"""Rates that several gateways share, in a real Redis that goes and comes back."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from access_client import COMPLETION, entry, served
from fakes import FakeClient, wait_for

from llmkit.errors import InvalidRequestError
from llmkit.gateway.access.windows import Redis, Windows
from llmkit.settings.allowances import Rate


class RealRedis:
    """Debian's redis-server on a free port, which a test can stop and start."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.folder = folder
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://:not-shown@127.0.0.1:{self.port}/0"

    @property
    def socket_url(self) -> str:
        return f"unix://:not-shown@{self.folder}/redis.sock"

    def start(self) -> None:
        self.process = subprocess.Popen(
            f"redis-server --port {self.port} --bind 127.0.0.1 --requirepass not-shown "
            f"--unixsocket {self.folder}/redis.sock".split(),
            cwd=self.folder,
            stdout=subprocess.DEVNULL,
        )
        wait_for(lambda: self._answers())

    def _answers(self) -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
            return True
        return False

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def tell(self, command: str) -> None:
        with socket.create_connection(("127.0.0.1", self.port), 5) as line:
            line.sendall(f"AUTH not-shown\r\n{command}\r\n".encode())
            answer = b""
            while answer.count(b"\n") < 2:
                answer += line.recv(100)
        assert answer == b"+OK\r\n+OK\r\n"

    def freeze(self, on: bool) -> None:
        assert self.process is not None
        os.kill(self.process.pid, signal.SIGSTOP if on else signal.SIGCONT)


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RealRedis]:
    if shutil.which("redis-server") is None:
        pytest.skip("redis-server is not installed")
    server = RealRedis(tmp_path)
    server.start()
    yield server
    server.stop()


@pytest.fixture
async def windows(
    redis: RealRedis, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[list[Windows]]:
    """Those of two gateways that share a Redis, and give it time to answer."""
    monkeypatch.setattr("llmkit.gateway.access.windows.REDIS_S", 20.0)
    both = [Windows(Redis(url)) for url in (redis.url, redis.socket_url)]
    yield both
    for each in both:
        await each.close()


async def test_gateways_share_rates_in_redis(windows: list[Windows]) -> None:
    rate = Rate(4, 60)
    standings = [await windows[i % 2].take(rate, "ann") for i in range(6)]
    assert [s.is_allowed for s in standings] == [True] * 4 + [False] * 2
    assert [s.remaining for s in standings] == [3, 2, 1, 0, 0, 0]
    assert all(50 < s.reset_s <= 60 for s in standings)
    assert (await windows[0].take(rate, "bob")).is_allowed
    short = Rate(2, 2)
    for i in range(20):
        began = time.monotonic()
        taken = [(await windows[0].take(short, f"x{i}")).is_allowed for _ in range(3)]
        if time.monotonic() - began < 2:  # else it is no wonder
            break
    assert taken == [True, True, False]
    async with asyncio.timeout(30):
        while not (await windows[1].take(short, f"x{i}")).is_allowed:
            await asyncio.sleep(0.1)


@pytest.mark.parametrize("jump", [-86_400.0, 86_400.0])
async def test_a_clock_that_jumps_moves_no_window_in_redis(
    windows: list[Windows], jump: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    rate, wall, real = Rate(2, 60), 0.0, time.time
    monkeypatch.setattr(time, "time", lambda: real() + wall)
    assert [(await windows[0].take(rate, "a")).is_allowed for _ in range(3)] == [True, True, False]
    wall = jump
    standing = await windows[0].take(rate, "a")
    assert not standing.is_allowed and 50 < standing.reset_s <= 61
    assert (await windows[0].take(rate, "b")).is_allowed


async def test_redis_may_go_and_come_back(
    redis: RealRedis, windows: list[Windows], caplog: pytest.LogCaptureFixture
) -> None:
    rate = Rate(4, 60)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert (await windows[0].take(rate, "ann")).is_allowed
        redis.stop()
        standings = [await windows[0].take(rate, "ann") for _ in range(4)]
        assert [s.is_allowed for s in standings] == [True, True, False, False], (
            "memory knows what Redis let through"
        )
        began = time.perf_counter()
        for _ in range(100):
            await windows[0].take(rate, "ann")
        assert time.perf_counter() - began < 20, "nobody waits for what is gone"
        assert caplog.text.count("is gone") == 1
        assert "not-shown" not in caplog.text and f"127.0.0.1:{redis.port}" in caplog.text
        redis.start()
        async with asyncio.timeout(30):
            while "shared again" not in caplog.text:
                await windows[0].take(rate, "bob")
                await asyncio.sleep(0.1)
    assert caplog.text.count("shared again") == 1
    fresh = Rate(1, 60)
    assert (await windows[0].take(fresh, "carl")).is_allowed
    assert not (await windows[1].take(fresh, "carl")).is_allowed, "shared again"


async def test_a_redis_that_hangs_holds_nobody_up(redis: RealRedis) -> None:
    rate, windows = Rate(1000, 60), [Windows(Redis(redis.url))]
    await windows[0].take(rate, "ann")
    redis.freeze(True)
    try:
        began = time.perf_counter()
        taken = await asyncio.gather(*(windows[0].take(rate, "ann") for _ in range(50)))
        assert time.perf_counter() - began < 20 and all(s.is_allowed for s in taken)
    finally:
        redis.freeze(False)
        await windows[0].close()


@pytest.mark.parametrize(
    ("fault", "cure"),
    [
        ("CONFIG SET maxmemory 1", "CONFIG SET maxmemory 0"),
        ("REPLICAOF 127.0.0.1 1", "REPLICAOF NO ONE"),
    ],
)
async def test_a_redis_that_answers_and_cannot_count(
    redis: RealRedis,
    windows: list[Windows],
    caplog: pytest.LogCaptureFixture,
    fault: str,
    cure: str,
) -> None:
    rate = Rate(1000, 60)
    with caplog.at_level(logging.WARNING):
        assert (await windows[0].take(rate, "ann")).is_allowed
        redis.tell(fault)
        for _ in range(25):
            assert (await windows[0].take(rate, "ann")).is_allowed
            await asyncio.sleep(0.1)
        assert caplog.text.count("is gone") == 1 and "shared again" not in caplog.text
        redis.tell(cure)
        async with asyncio.timeout(30):
            while "shared again" not in caplog.text:
                await windows[0].take(rate, "ann")
                await asyncio.sleep(0.1)


async def test_a_gateway_without_its_redis_serves(
    model: FakeClient, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "llmkit.gateway"):
        async with served([entry(rate="2/minute")], redis_url="redis://127.0.0.1:1/0") as api:
            ann = api.by("secret-ann")
            codes = [(await ann.post("/v1/completions", COMPLETION))[0] for _ in range(3)]
            assert codes == [200, 200, 429]
    assert caplog.text.count("Redis at 127.0.0.1:1/0 is gone") == 1


async def test_a_gateway_with_a_real_redis(
    model: FakeClient, redis: RealRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmkit.gateway.access.windows.REDIS_S", 20.0)
    async with (
        served([entry(rate="3/minute")], redis_url=redis.url) as one,
        served([entry(rate="3/minute")], redis_url=redis.socket_url) as two,
    ):
        codes = [
            (await api.by("secret-ann").post("/v1/completions", COMPLETION))[0]
            for api in (one, two, one, two)
        ]
        assert codes == [200, 200, 200, 429]


@pytest.mark.parametrize("wrong", ["", "127.0.0.1:6379", "http://x", "redis://", "redis://h:port"])
def test_what_is_no_redis_is_an_error(wrong: str) -> None:
    with pytest.raises(InvalidRequestError, match="redis_url"):
        Redis(wrong)


def test_passwords_in_the_address_are_not_shown() -> None:
    with pytest.raises(InvalidRequestError, match=r"redis_url must be like .*'foo'") as raised:
        Redis("redis://h:1/0?foo=bar&password=not-shown")
    assert "not-shown" not in str(raised.value)
    assert Redis("redis://ann:not-shown@h:1/0?password=not@shown").place == "h:1/0"
    with pytest.raises(InvalidRequestError, match=r"in a password, / .* as %2F") as raised:
        Redis("redis://secret/cd==@h:1/0")
    assert "secret" not in str(raised.value)
    assert Redis("redis://not%2Fshown@h:1/0").place == "h:1/0"
    assert Redis("unix://:not-shown@/run/redis.sock").place == "/run/redis.sock"
