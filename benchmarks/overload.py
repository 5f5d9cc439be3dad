"""Twice the load that a server can bear: what becomes of the requests that it accepts, and how fast
the others are refused.

A real ``llmkit serve`` with a bounded queue (``--max-queue``). First as many clients as it holds,
slots and queue, each with one request at a time: the server is exactly full. Then requests arrive
at random, ``--load`` times as often as it served them. Then the first load again, so that the
comparison is not one of before and after.

Each answer must begin with its request's number, to which a grammar holds the model: an answer that
went to another request shows. Everything that is neither an answer nor a refusal is lost.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Any

import psutil

MOST_RATIO, MOST_REFUSAL_MS, MOST_GROWTH = 1.2, 50.0, 0.05
READY_S = 120.0
HEAD = "POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {size}\r\n\r\n"


@dataclass
class Outcome:
    """Of one phase: seconds of answers and refusals, and what must not happen."""

    seconds: float = 0.0
    answered: list[float] = field(default_factory=list)
    refused: list[float] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    mixed: list[str] = field(default_factory=list)

    @property
    def rate(self) -> float:
        return len(self.answered) / self.seconds

    def line(self, name: str) -> str:
        waits = f"p50 {share(self.answered, 0.5):6.2f} p95 {share(self.answered, 0.95):6.2f} s"
        text = f"{name:10s} {len(self.answered):5d} answered ({self.rate:5.2f}/s)  {waits}"
        if self.refused:
            text += (
                f"  {len(self.refused)} refused: p50 {1000 * share(self.refused, 0.5):.1f} "
                f"p95 {1000 * share(self.refused, 0.95):.1f} p99 "
                f"{1000 * share(self.refused, 0.99):.1f} max {1000 * max(self.refused):.1f} ms"
            )
        return f"{text}  lost {len(self.lost)} mixed {len(self.mixed)}"


def share(values: list[float], part: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(part * len(ordered)))] if ordered else float("nan")


class Load:
    """Requests to one server, over connections that are kept."""

    def __init__(self, port: int, max_tokens: int) -> None:
        self._port, self._max_tokens = port, max_tokens
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
        self._number = 0

    async def ask(self, outcome: Outcome) -> bool:
        """One request; whether it was answered."""
        self._number += 1
        name = f"{self._number:07d}"
        body = json.dumps(
            {
                "prompt": f"Request {name}: tell me a story about the number {name}.",
                "regex": f"{name}[ a-z,.]*",
                "max_tokens": self._max_tokens,
                "temperature": 0.7,
            }
        ).encode()
        start = time.perf_counter()
        try:
            async with self._connection() as (reader, writer):
                writer.write(HEAD.format(size=len(body)).encode() + body)
                status, data = await _reply(reader)
        except (OSError, EOFError, ValueError) as error:
            outcome.lost.append(f"{name}: {error!r:.100}")
            return False
        seconds = time.perf_counter() - start
        if status == 503:
            outcome.refused.append(seconds)
            return False
        if status != 200:
            outcome.lost.append(f"{name}: {status} {data!r:.200}")
            return False
        outcome.answered.append(seconds)
        if not json.loads(data)["choices"][0]["text"].startswith(name):
            outcome.mixed.append(name)
        return True

    @contextlib.asynccontextmanager
    async def _connection(
        self,
    ) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        pair = None
        while self._idle and pair is None:
            pair = self._idle.pop()
            if pair[0].at_eof():  # the server closes what is idle for long
                pair[1].close()
                pair = None
        pair = pair or await asyncio.open_connection("127.0.0.1", self._port)
        yield pair
        self._idle.append(pair)

    async def full(self, clients: int, seconds: float) -> Outcome:
        """So many clients, each with one request at a time."""
        outcome, begin = Outcome(), time.perf_counter()
        end = begin + seconds

        async def client() -> None:
            while time.perf_counter() < end:
                await self.ask(outcome)

        await asyncio.gather(*(client() for _ in range(clients)))
        outcome.seconds = time.perf_counter() - begin
        return outcome

    async def arriving(self, rate: float, seconds: float) -> Outcome:
        """Requests that come at random, ``rate`` each second, whatever becomes of them."""
        outcome, rng = Outcome(), random.Random(1)
        tasks: set[asyncio.Task[bool]] = set()
        begin = at = time.perf_counter()
        end = begin + seconds
        while at < end:
            at += rng.expovariate(rate)
            await asyncio.sleep(max(0.0, at - time.perf_counter()))
            task = asyncio.create_task(self.ask(outcome))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        await asyncio.gather(*tasks)
        outcome.seconds = time.perf_counter() - begin
        return outcome


async def _reply(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
    size = int(head.split("content-length:")[1].split("\r\n")[0])
    return int(head.split(" ")[1]), await reader.readexactly(size)


@contextlib.contextmanager
def served(model: str, slots: int, queue: int) -> Iterator[tuple[int, psutil.Process]]:
    """The port and the process of a server that is ready."""
    command = [sys.executable, "-m", "llmkit", "serve", model, "--port", "0"]
    command += ["--n-slots", str(slots), "--n-ctx", "512", "--max-queue", str(queue)]
    server = subprocess.Popen(
        [*command, "--log-level", "error", "--no-access-log"],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert server.stdout is not None
        port = 0
        for line in server.stdout:
            if "gateway at http" in line:
                port = int(line.split("127.0.0.1:")[1].split("/")[0])
            if "ready" in line:
                break
        if server.poll() is not None or not port:
            raise SystemExit("the server did not start")
        yield port, psutil.Process(server.pid)
    finally:
        server.terminate()
        server.wait(60)


def memory(server: psutil.Process) -> int:
    """Bytes of the gateway and its worker."""
    return sum(p.memory_info().rss for p in (server, *server.children(recursive=True)))


async def measure(given: argparse.Namespace, port: int, server: psutil.Process) -> dict[str, Any]:
    load, clients = Load(port, given.max_tokens), given.slots + given.queue
    await load.full(clients, min(10.0, given.seconds / 4))  # warm
    before = await load.full(clients, given.seconds / 2)
    grown = memory(server)
    over = await load.arriving(given.load * before.rate, given.seconds)
    grown = memory(server) - grown
    after = await load.full(clients, given.seconds / 2)
    for name, outcome in (("full", before), (f"{given.load:g}x", over), ("full again", after)):
        print(outcome.line(name), flush=True)
    alone = share(before.answered + after.answered, 0.95)
    return {
        "p95_ratio": round(share(over.answered, 0.95) / alone, 3),
        "refused_p99_ms": round(1000 * share(over.refused, 0.99), 1),
        "refused_max_ms": round(1000 * max(over.refused, default=0.0), 1),
        "rate_ratio": round(over.rate / before.rate, 3),
        "growth_mb": round(grown / (1 << 20), 1),
        "growth": round(grown / memory(server), 4),
        "refused": len(over.refused),
        "answered": len(over.answered),
        "lost": sum(len(o.lost) for o in (before, over, after)),
        "mixed": sum(len(o.mixed) for o in (before, over, after)),
        "faults": [fault for o in (before, over, after) for fault in o.lost][:5],
    }


def broken(result: dict[str, Any]) -> list[str]:
    """The promises that a result does not keep."""
    promises = {
        f"the p95 of accepted requests is at most {MOST_RATIO}x": result["p95_ratio"] <= MOST_RATIO,
        f"99 % are refused within {MOST_REFUSAL_MS:g} ms": (
            result["refused_p99_ms"] <= MOST_REFUSAL_MS
        ),
        f"memory grows by at most {MOST_GROWTH:.0%}": result["growth"] <= MOST_GROWTH,
        "nothing is lost": result["lost"] == 0,
        "no answer goes to another request": result["mixed"] == 0,
        "some are refused": result["refused"] > 0,
    }
    return [promise for promise, is_kept in promises.items() if not is_kept]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--seconds", type=float, default=120.0, help="of overload")
    parser.add_argument("--load", type=float, default=2.0, help="times what the server can bear")
    parser.add_argument("--slots", type=int, default=4)
    parser.add_argument("--queue", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=32)
    given = parser.parse_args()
    with served(given.model, given.slots, given.queue) as (port, server):
        result = asyncio.run(measure(given, port, server))
    print(json.dumps(result))
    for promise in broken(result):
        print(f"not kept: {promise}", file=sys.stderr)
    return bool(broken(result))


if __name__ == "__main__":
    sys.exit(main())
