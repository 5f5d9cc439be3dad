"""What a pool costs: N replicas through it against the same engines driven directly.

    python benchmarks/replicas.py                 # two engines of smollm2, one thread each
    python benchmarks/replicas.py --replicas 4 --rounds 9

Both arms use the same engines over the same bridge, in turn: `direct` has a client for each and
spreads requests evenly, `pool` a `ReplicaPool` over these clients. Shown are tokens a second, their
ratio in each round, and the CPU that this process spends on a token, also with one engine alone.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

from llmkit.bridge.client import BridgeClient
from llmkit.bridge.connection import find_connections
from llmkit.cluster.pool import ReplicaPool
from llmkit.protocol import GenerationRequest, SamplingParams
from llmkit.protocol.stream import Stream

Submit = Callable[[int, GenerationRequest], Stream]


@contextlib.contextmanager
def engines(count: int, model: str, slots: int):  # type: ignore[no-untyped-def]
    """Bridge clients of so many engine processes, which end with the block."""
    command = [sys.executable, "-m", "llmkit", "engine", model, "--threads", "1"]
    command += ["--n-slots", str(slots), "--n-ctx", "1024"]
    processes = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
        for _ in range(count)
    ]
    clients: list[BridgeClient] = []
    try:
        pids, end = {p.pid for p in processes}, time.monotonic() + 120
        while len(clients) < count:
            assert time.monotonic() < end, "the engines do not come"
            found = [c for c in find_connections() if c.origin.pid in pids]
            if len(found) == count:
                clients = [BridgeClient(c) for c in found]
            time.sleep(0.1)
        yield clients
    finally:
        for client in clients:
            client.close()
        for process in processes:
            assert process.stdin is not None
            process.stdin.close()
            process.wait(30)


def load(submit: Submit, streams: int, tokens: int, mark: str) -> tuple[float, float]:
    """Tokens a second of so many requests at once, and CPU microseconds of this process a token."""
    params = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)
    began, cpu = time.perf_counter(), time.process_time()
    running = [
        submit(
            i,
            GenerationRequest(f"{mark}-{i}", params, prompt=f"{mark} {i}: it was a long day, and"),
        )
        for i in range(streams)
    ]
    made = sum(stream.result().usage.completion_tokens for stream in running)
    seconds = time.perf_counter() - began
    return made / seconds, (time.process_time() - cpu) / made * 1e6


def directly(clients: Sequence[BridgeClient]) -> Submit:
    return lambda i, request: clients[i % len(clients)].submit(request)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--streams", type=int, default=8, help="for all engines together")
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--model", default="smollm2")
    args = parser.parse_args()
    with engines(args.replicas, args.model, max(4, args.streams)) as clients:
        pool = ReplicaPool(args.model, {str(i): c for i, c in enumerate(clients)})
        arms: dict[str, tuple[Submit, int]] = {
            "one engine": (directly(clients[:1]), args.streams // args.replicas),
            "direct": (directly(clients), args.streams),
            "pool": (lambda _, request: pool.submit(request), args.streams),
        }
        rates: dict[str, list[float]] = {name: [] for name in arms}
        cpus: dict[str, list[float]] = {name: [] for name in arms}
        for name, (submit, streams) in arms.items():
            load(submit, streams, 16, f"warm {name}")
        for turn in range(args.rounds):
            order = list(arms.items())
            for name, (submit, streams) in order if turn % 2 else order[::-1]:
                rate, cpu = load(submit, streams, args.tokens, f"{turn} {name}")
                rates[name].append(rate)
                cpus[name].append(cpu)
    for name in arms:
        print(
            f"{name:12} {statistics.median(rates[name]):8.1f} tok/s"
            f" {statistics.median(cpus[name]):7.1f} us of CPU here a token"
        )
    ratios = [p / d for p, d in zip(rates["pool"], rates["direct"], strict=True)]
    more = statistics.median(cpus["pool"]) - statistics.median(cpus["one engine"])
    print(
        f"pool / direct: {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
        f"; CPU against one engine: {more:+.1f} us a token"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
