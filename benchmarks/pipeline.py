"""What a gateway's pipeline costs: milliseconds of CPU a request, and tokens/s of streams.

Two gateways in one process, in turns: one as `llmkit serve` puts it together (keys, limits,
deadlines, queue, guards, metrics, log), one with the routes alone. Requests are answered by an
engine that computes nothing, streams by a model in a worker. The client is a process of its own.
Medians of ``--reps`` rounds; CPU is that of the gateways' process.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from fake_runner import FakeRunner  # noqa: E402
from fakes import FakeClient  # noqa: E402
from tornado.netutil import bind_sockets  # noqa: E402

import llmkit  # noqa: E402
from llmkit.gateway.access.authenticator import Authenticator  # noqa: E402
from llmkit.gateway.access.identity import LOCAL  # noqa: E402
from llmkit.gateway.app import Gateway, make_app, make_server  # noqa: E402
from llmkit.gateway.composition import Composition  # noqa: E402
from llmkit.gateway.directory import EngineDirectory  # noqa: E402
from llmkit.gateway.ops.logs import log_to  # noqa: E402
from llmkit.settings.serving import read_settings  # noqa: E402

CLIENT = """
import http.client, json, sys, threading
port, tokens, clients, number = map(int, sys.argv[1:5])
body = json.dumps({"messages": [{"role": "user", "content": "hello"}], "ignore_eos": True,
                   "max_tokens": tokens, "stream": tokens > 1, "temperature": 0.5})
def run():
    connection = http.client.HTTPConnection("127.0.0.1", port)
    for _ in range(number):
        connection.request("POST", "/v1/chat/completions", body)
        reply = connection.getresponse()
        assert reply.read() and reply.status == 200
for line in sys.stdin:
    threads = [threading.Thread(target=run) for _ in range(clients)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    print("done", flush=True)
"""


class Open:
    """Lets everybody in."""

    async def identify(self, facts: Any) -> Any:
        return LOCAL


def sources(model: Any) -> Any:
    return SimpleNamespace(find=lambda: {0: lambda: model})


async def measured(ports: list[int], tokens: int, clients: int, number: int, reps: int) -> Any:
    """By port, the CPU seconds and the wall seconds of each round."""
    command = [sys.executable, "-c", CLIENT]
    given = [str(tokens), str(clients), str(number)]
    drivers = [
        await asyncio.create_subprocess_exec(
            *command, str(port), *given, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        for port in ports
    ]
    figures: list[list[tuple[float, float]]] = [[] for _ in ports]
    for rep in range(reps + 1):
        for driver, own in zip(drivers, figures, strict=True):
            assert driver.stdin is not None and driver.stdout is not None
            cpu, wall = time.process_time(), time.perf_counter()
            driver.stdin.write(b"go\n")
            assert await driver.stdout.readline() == b"done\n"
            if rep:  # the first is to warm up
                own.append((time.process_time() - cpu, time.perf_counter() - wall))
    for driver in drivers:
        driver.terminate()
        await driver.wait()
    return figures


async def run(model: Any, jobs: Sequence[tuple[int, int, int]], reps: int) -> None:
    """``jobs`` are tokens, clients and requests of each client."""
    directories = [EngineDirectory([sources(model)]) for _ in range(2)]
    settings = read_settings({"port": 0}, environment={})
    whole = Composition(settings, directories[0], shared=False)
    bare = Gateway(directories[1])
    authenticator: Authenticator = Open()
    ports = []
    servers = [make_server(whole.app()), make_server(make_app(bare, authenticator))]
    for server in servers:
        sockets = bind_sockets(0, "127.0.0.1")
        server.add_sockets(sockets)
        ports.append(sockets[0].getsockname()[1])
    for tokens, clients, number in jobs:
        rounds = await measured(ports, tokens, clients, number, reps)
        pairs = list(zip(*rounds, strict=True))
        ratio = statistics.median(plain[1] / whole[1] for whole, plain in pairs)
        requests = clients * number
        own, without = (1000 * statistics.median(r[0] for r in each) / requests for each in rounds)
        more = 1000 * statistics.median(a[0] - b[0] for a, b in pairs) / requests
        print(
            f"{clients} clients, {tokens} tokens: {own:.2f} ms of CPU a request against "
            f"{without:.2f} ({more:+.2f} in pairs); {ratio:.3f}x the tokens/s"
        )
    for server in servers:
        server.stop()
        await server.close_all_connections()
    await whole.close()
    for directory in directories:
        directory.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--reps", type=int, default=9, help="rounds of each measurement")
    parser.add_argument("--model", default="smollm2")
    given = parser.parse_args()
    log_to("json", "info")  # to standard error
    fake = FakeClient(runner=FakeRunner(n_slots=4))
    asyncio.run(run(fake, [(1, 1, 300)], given.reps))
    fake.close()
    with llmkit.load(given.model, isolated=True, n_slots=32, n_ctx=512) as llm:
        asyncio.run(run(llm.engine, [(64, 8, 1), (64, 32, 1)], given.reps))
    return 0


if __name__ == "__main__":
    sys.exit(main())
