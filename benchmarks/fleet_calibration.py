"""Real replicas against simulated ones: the same arrivals, and the median time to a first token."""

from __future__ import annotations

import random
import statistics
import threading
import time

from fleet import Simulation
from fleet_model import Job, Replica, Speed, Talk, Text
from fleet_policies import Cost
from replicas import engines

from llmkit.bridge.client import BridgeClient
from llmkit.cluster.pool import ReplicaPool
from llmkit.protocol import GenerationRequest, SamplingParams

__all__ = ["calibrate"]

SLOTS, REQUESTS, ANSWER, TARGET_S = 4, 60, 24, 0.2  # the engine's own target_itl_ms
RUNS = 3


def calibrate(count: int, seed: int) -> int:
    """Compare on this machine; 0 if the simulated median is within a fifth of the real one."""
    ratios = []
    with engines(count, "smollm2", SLOTS) as clients:
        warm_up(clients)
        for run in range(RUNS):
            rng = random.Random(f"{seed} {run}")
            arrivals = arrivals_of(rng, count, speed_of(clients))
            real = real_ttft(clients, arrivals, rng.random())
            speed = speed_of(clients)  # under this load
            simulated = simulated_ttft(count, arrivals, speed)
            ratios.append(simulated / real)
            print(f"TTFT p50: real {real:.3f} s, simulated {simulated:.3f} s", flush=True)
    ratio = statistics.median(ratios)
    print(f"simulated / real: {ratio:.2f} ({'within' if 0.8 <= ratio <= 1.2 else 'not'} 20 %)")
    return 0 if 0.8 <= ratio <= 1.2 else 1


def arrivals_of(rng: random.Random, count: int, speed: Speed) -> list[tuple[float, int]]:
    """When requests arrive, and with how many tokens of prompt; no two share a beginning. They keep
    the replicas busy for about half of the time."""
    each_s = 160 * speed.prompt_token_s + ANSWER * speed.step(2) / 2
    at, arrivals = 0.0, []
    for _ in range(REQUESTS):
        at += rng.expovariate(0.5 * count / each_s)
        arrivals.append((at, rng.randint(60, 260)))
    return arrivals


def warm_up(clients: list[BridgeClient]) -> None:
    for i, client in enumerate(clients):
        streams = [client.submit(request(f"warm {i} {n}", 200)) for n in range(SLOTS)]
        for stream in streams:
            stream.result()


def request(name: str, tokens: int) -> GenerationRequest:
    params = SamplingParams(max_tokens=ANSWER, temperature=0, ignore_eos=True)
    rng = random.Random(name)
    return GenerationRequest(name, params, tuple(rng.randint(1000, 20000) for _ in range(tokens)))


def real_ttft(clients: list[BridgeClient], arrivals: list[tuple[float, int]], mark: float) -> float:
    pool = ReplicaPool("smollm2", {str(i): c for i, c in enumerate(clients)})
    times: list[float] = []

    def ask(number: int, tokens: int) -> None:
        began = time.monotonic()
        stream = pool.submit(request(f"{mark} {number}", tokens))
        first = threading.Event()
        stream.listen(first.set)
        first.wait()
        times.append(time.monotonic() - began)
        stream.result()

    threads, began = [], time.monotonic()
    for number, (at, tokens) in enumerate(arrivals):
        time.sleep(max(0.0, began + at - time.monotonic()))
        threads.append(threading.Thread(target=ask, args=(number, tokens)))
        threads[-1].start()
    for thread in threads:
        thread.join()
    return statistics.median(times)


def speed_of(clients: list[BridgeClient]) -> Speed:
    """What the engines' own clocks say, after real work."""
    time.sleep(1)
    stats = [client.stats() for client in clients]
    token_s = statistics.fmean(s.prompt_token_s for s in stats)
    step_s = statistics.fmean(s.decode_step_s for s in stats)
    return Speed(token_s, step_s * 0.9, step_s * 0.1, TARGET_S)


def simulated_ttft(count: int, arrivals: list[tuple[float, int]], speed: Speed) -> float:
    simulation = object.__new__(Calibrated)
    simulation.prepare(count, arrivals, speed)
    simulation.run()
    return statistics.median(job.first_at - job.arrived for job in simulation.jobs)


class Calibrated(Simulation):
    """The simulation with given arrivals and speeds, and nothing else."""

    jobs: list[Job]

    def prepare(self, count: int, arrivals: list[tuple[float, int]], speed: Speed) -> None:
        from fleet import Scenario, Tally

        self.scenario = Scenario("calibration", count, 1, warm_s=0, measured_s=arrivals[-1][0])
        self.rng, self.now, self.running = random.Random(1), 0.0, 0
        self.gateways, self.tally = [Cost(random.Random(1))], Tally()
        self.replicas, self._events, self._number = {}, [], 0
        self._end = arrivals[-1][0]
        for i in range(count):
            replica = Replica(f"r{i}", f"r{i}", speed, SLOTS, SLOTS)
            self.replicas[replica.name] = replica
            self.gateways[0].add(replica.name, replica.home)
            self.gateways[0].report(replica.name, replica.figures())
        self.at(0.25, self._announce)
        self.jobs = []
        for number, (at, tokens) in enumerate(arrivals):
            text = Text(0, [], [])
            text.more(tokens, self.rng)
            talk = Talk(number, number, -1 - number, 0, text, 1)
            job = Job(talk, text.chain(), tokens, ANSWER, at, 0)
            self.jobs.append(job)
            self.at(at, self._arrive, job)

    def _arrive(self, job: Job) -> None:
        self.running += 1
        self._place(job)

    def _finish(self, job: Job, name: str) -> None:
        self.running -= 1
        self.gateways[0].ended(job, name, True)
