"""Simulates fleets of replicas behind gateways, with llmkit's own router and with others' ways.

    python benchmarks/fleet.py              # every scenario at 1,000 replicas; some minutes
    python benchmarks/fleet.py --quick      # the same in small; seconds
    python benchmarks/fleet.py --only plain-8 --policies cost,bounded
    python benchmarks/fleet.py --calibrate  # against real replicas of smollm2 on this machine

Discrete events, seeded: the same seed gives the same numbers, but for the time a choice takes.
The replicas share their time between prompts and streams as llmkit's engine does; people,
prompts and speeds are made up (`fleet_model.py`), so believe the order, not the numbers.
"""

from __future__ import annotations

import argparse
import heapq
import json
import math
import random
import sys
import time
from collections import defaultdict
from dataclasses import dataclass, field, replace
from typing import Any

from fleet_model import Job, People, Replica, Speed, Talk
from fleet_policies import POLICIES, Cost, Policy

ANNOUNCE_S, ANNOUNCE_BYTES = 1.0, 700
SLO_S = 1.0
DETECT_S = 0.1  # a dead process is noticed by its socket
GRACE_S, RESTART_S = 5.0, 10.0
INDEX_BYTES = 110  # of a block in the router's index, by tracemalloc


@dataclass(frozen=True, slots=True)
class Scenario:
    """``rate``: requests a second for each replica; ``late_s``: how old reports are."""

    name: str
    replicas: int = 1000
    gateways: int = 8
    rate: float = 1.25
    warm_s: float = 25.0
    measured_s: float = 30.0
    hot: float = 0.0
    noisy: bool = False
    keeps: float = 0.9  # of turns come to the gateway of the turn before, on a kept connection
    slow: float = 0.0  # share of replicas at half speed
    kills_per_min: float = 0.0  # share of replicas
    drains: float = 0.0  # share of replicas, one after another
    joins: float = 0.0  # share of replicas, all at once in the middle
    cut_off: bool = False  # the first gateway gets no reports
    late_s: float = 0.0


SCENARIOS = [
    Scenario("plain-1", gateways=1),
    Scenario("plain-8"),
    Scenario("plain-64", gateways=64),
    Scenario("scattered-8", keeps=0.0),
    Scenario("scattered-64", gateways=64, keeps=0.0),
    Scenario("hot-prefix", hot=0.3),
    Scenario("noisy-user", noisy=True),
    Scenario("two-speeds", slow=0.5, rate=0.9),
    Scenario("kills", kills_per_min=0.01),
    Scenario("drain", drains=0.1),
    Scenario("joiners", joins=0.1),
    Scenario("cut-off", cut_off=True),
    Scenario("late-reports", late_s=5.0),
]


@dataclass(slots=True)
class Tally:
    """What was counted, of requests that arrived in the measured time."""

    ttft: list[float] = field(default_factory=list)
    users: dict[int, list[bool]] = field(default_factory=lambda: defaultdict(list))
    gaps: list[float] = field(default_factory=list)
    prompt: int = 0
    cached: int = 0
    again: int = 0  # tokens computed again after a loss
    moves: int = 0
    arrived: int = 0
    ended: int = 0
    unplaced: int = 0
    wrong: int = 0  # answers that did not end with all of their tokens
    skew: list[float] = field(default_factory=list)
    choice_s: list[float] = field(default_factory=list)


class Simulation:
    """One scenario with one policy. All arrivals are the same for every policy of a seed."""

    def __init__(self, scenario: Scenario, policy: str, seed: int = 1) -> None:
        self.scenario, self.rng = scenario, random.Random(f"{seed} world")
        users = max(20, 2 * scenario.replicas)
        self.people = People(
            random.Random(f"{seed} people"),
            scenario.hot,
            scenario.noisy,
            scenario.keeps,
            users,
            users,
        )
        self.gateways: list[Policy] = [
            POLICIES[policy](random.Random(f"{seed} gateway {i}")) for i in range(scenario.gateways)
        ]
        self.tally, self.now, self.running = Tally(), 0.0, 0
        self.replicas: dict[str, Replica] = {}
        self._events: list[tuple[float, int, Any, tuple[Any, ...]]] = []
        self._number = self._joined = 0
        for _ in range(scenario.replicas):
            self._join()
        self._end = scenario.warm_s + scenario.measured_s
        self._schedule()

    def run(self) -> Tally:
        while self._events:
            self.now, _, what, args = heapq.heappop(self._events)
            what(*args)
        return self.tally

    def at(self, time_s: float, what: Any, *args: Any) -> None:
        self._number += 1
        heapq.heappush(self._events, (time_s, self._number, what, args))

    def _schedule(self) -> None:
        s, rng = self.scenario, self.rng
        # As many talk at once as give the rate, from the start: a turn takes about ten seconds.
        self.talkers = int(s.rate * s.replicas * 12)
        for _ in range(self.talkers):
            self.at(rng.uniform(0, 12), self._turn, self.people.talk())
        self.at(ANNOUNCE_S, self._announce)
        kills = s.kills_per_min * s.replicas / 60
        when = s.warm_s
        while kills and (when := when + rng.expovariate(kills)) < self._end:
            self.at(when, self._kill)
        for i in range(int(s.drains * s.replicas)):
            self.at(s.warm_s + i * s.measured_s * 0.8 / (s.drains * s.replicas), self._drain)
        for _ in range(int(s.joins * s.replicas)):
            self.at(s.warm_s + s.measured_s / 3, self._join)

    @property
    def _is_measured(self) -> bool:
        return self.now >= self.scenario.warm_s

    def _join(self, home: str = "") -> None:
        self._joined += 1
        home = home or f"host {self._joined}"
        speed = Speed()
        if self._joined <= self.scenario.slow * self.scenario.replicas:
            speed = speed.slower(2.0)
        replica = Replica(f"{home} #{self._joined}", home, speed)
        replica.at = self.now
        self.replicas[replica.name] = replica
        for gateway in self.gateways:
            gateway.add(replica.name, home)
            gateway.report(replica.name, replica.figures())

    def _announce(self) -> None:
        figures = [(name, r.figures()) for name, r in self.replicas.items() if r.state == "ready"]
        self.at(self.now + self.scenario.late_s, self._hear, figures)
        if self._is_measured and figures:
            loads = [f.has for _, f in figures]
            self.tally.skew.append(max(loads) / max(1e-9, sum(loads) / len(loads)))
        if self.now < self._end or self.running:
            self.at(self.now + ANNOUNCE_S, self._announce)

    def _hear(self, figures: list[Any]) -> None:
        for gateway in self.gateways[1 if self.scenario.cut_off else 0 :]:
            for name, each in figures:
                gateway.report(name, each)

    def _turn(self, talk: Talk) -> None:
        if self.now >= self._end:
            return
        job = self.people.job(talk, self.now, len(self.gateways))
        self.running += 1
        self.tally.arrived += 1
        self._place(job)

    def _place(self, job: Job) -> None:
        gateway = self.gateways[job.gateway]
        began = time.perf_counter()
        name = gateway.route(job)
        if self._is_measured:
            self.tally.choice_s.append(time.perf_counter() - began)
        if name is None:
            self.tally.unplaced += 1
            self.at(self.now + 0.5, self._place, job)
            return
        replica = self.replicas.get(name)
        if replica is None or replica.state != "ready":  # refused; it is tried elsewhere
            gateway.ended(job, name, False)
            gateway.close(name)
            self._place(job)
            return
        replica.advance(self.now)
        replica.begin(job)
        self._expect(replica)

    def _expect(self, replica: Replica) -> None:
        replica.version += 1
        at = replica.next_at()
        if at < math.inf:
            self.at(at, self._happen, replica, replica.version)

    def _happen(self, replica: Replica, version: int) -> None:
        if version != replica.version or replica.state == "gone":
            return
        started, ended = replica.happen(self.now)
        for job in started:
            if job.first_at < 0:
                job.first_at = self.now
            if job.lost_at >= 0:
                job.gap, job.lost_at = max(job.gap, self.now - job.lost_at), -1.0
                self.tally.again += job.prompt + job.done - job.cached
            self.gateways[job.gateway].started(job)
        for job in ended:
            self._finish(job, replica.name)
        self._expect(replica)

    def _finish(self, job: Job, name: str) -> None:
        tally = self.tally
        self.running -= 1
        tally.ended += 1
        tally.wrong += job.done != job.answer
        self.gateways[job.gateway].ended(job, name, True)
        if self.scenario.warm_s <= job.arrived < self._end:
            ttft = job.first_at - job.arrived
            tally.ttft.append(ttft)
            tally.users[job.talk.user].append(ttft <= SLO_S)
            tally.prompt += job.prompt
            tally.cached += job.cached
            tally.moves += job.moves
            if job.moves:
                tally.gaps.append(job.gap)
        pause = self.people.answered(job)
        if pause is not None:
            self.at(self.now + pause, self._turn, job.talk)
        else:
            self.at(self.now + self.rng.uniform(0, 4), self._turn, self.people.talk())

    def _ready(self) -> Replica | None:
        ready = [r for r in self.replicas.values() if r.state == "ready"]
        return self.rng.choice(ready) if ready else None

    def _kill(self) -> None:
        replica = self._ready()
        if replica is not None:
            self._lose(replica, DETECT_S)

    def _drain(self) -> None:
        replica = self._ready()
        if replica is None:
            return
        replica.state = "draining"
        for gateway in self.gateways:
            gateway.close(replica.name)
        self.at(self.now + GRACE_S, self._lose, replica, 0.0)

    def _lose(self, replica: Replica, notice_s: float) -> None:
        for job in replica.end(self.now):
            job.moves += 1
            job.lost_at = self.now if job.done else -1.0
            self.gateways[job.gateway].ended(job, replica.name, False)
            self.at(self.now + notice_s, self._place, job)
        self.at(self.now + notice_s, self._forget, replica)
        self.at(self.now + RESTART_S, self._join, replica.home)

    def _forget(self, replica: Replica) -> None:
        for gateway in self.gateways:
            gateway.remove(replica.name)
        del self.replicas[replica.name]


def jain(values: list[float]) -> float:
    """1 when all have the same, 1/n when one has all.

    >>> jain([1, 1, 1, 1]), jain([1, 0, 0, 0])
    (1.0, 0.25)
    """
    squares = sum(v * v for v in values)
    return sum(values) ** 2 / (len(values) * squares) if squares else 1.0


def quantile(values: list[float], share: float) -> float:
    """NaN without values."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else math.nan


def figures_of(simulation: Simulation) -> dict[str, Any]:
    """The results of a run; times in seconds."""
    s, t = simulation.scenario, simulation.tally
    served = [sum(oks) / len(oks) for oks in t.users.values() if len(oks) >= 2]
    routers = [g.router for g in simulation.gateways if isinstance(g, Cost)]
    return {
        "requests": len(t.ttft),
        "ttft_p50": quantile(t.ttft, 0.5),
        "ttft_p95": quantile(t.ttft, 0.95),
        "ttft_p99": quantile(t.ttft, 0.99),
        "hit_rate": t.cached / max(1, t.prompt),
        "goodput": sum(x <= SLO_S for x in t.ttft) / max(1, len(t.ttft)),
        "load_max_mean": sum(t.skew) / max(1, len(t.skew)),
        "jain": jain(served),
        "moves": t.moves,
        "largest_gap": max(t.gaps, default=0.0),
        "tokens_again": t.again,
        "choice_us": 1e6 * quantile(t.choice_s, 0.5),
        "choice_p99_us": 1e6 * quantile(t.choice_s, 0.99),
        "index_mb": max((r.num_held for r in routers), default=0) * INDEX_BYTES / 1e6,
        "announced_mb_s": s.replicas / ANNOUNCE_S * ANNOUNCE_BYTES * s.gateways / 1e6,
        "lost": t.arrived - t.ended,
        "wrong": t.wrong,
        "unplaced": t.unplaced,
    }


def quick(scenario: Scenario) -> Scenario:
    """The same in small."""
    return replace(
        scenario,
        replicas=20,
        gateways=min(scenario.gateways, 4),
        warm_s=20.0,
        measured_s=15.0,
        kills_per_min=min(1.0, scenario.kills_per_min * 40),
    )


SHOWN = (
    ("ttft_p50", "{:7.2f}"), ("ttft_p95", "{:7.2f}"), ("ttft_p99", "{:7.2f}"),
    ("hit_rate", "{:5.2f}"), ("goodput", "{:6.3f}"), ("load_max_mean", "{:6.2f}"),
    ("jain", "{:6.3f}"), ("moves", "{:6d}"), ("largest_gap", "{:6.2f}"),
    ("tokens_again", "{:9d}"), ("choice_us", "{:6.0f}"), ("index_mb", "{:6.1f}"),
)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="20 replicas, seconds")
    parser.add_argument("--only", default="", help="scenarios, by comma")
    parser.add_argument("--policies", default="", help="of " + ",".join(POLICIES))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", default="", help="write all figures to this file")
    parser.add_argument("--calibrate", action="store_true", help="against real replicas")
    parser.add_argument("--replicas", type=int, default=2, help="real ones, for --calibrate")
    args = parser.parse_args()
    if args.calibrate:
        from fleet_calibration import calibrate

        return calibrate(args.replicas, args.seed)
    wanted = [s for s in SCENARIOS if not args.only or s.name in args.only.split(",")]
    names = args.policies.split(",") if args.policies else list(POLICIES)
    results: dict[str, dict[str, Any]] = {}
    print("scenario      policy         " + " ".join(name[:9] for name, _ in SHOWN), flush=True)
    for scenario in wanted:
        scenario = quick(scenario) if args.quick else scenario
        for name in names:
            simulation = Simulation(scenario, name, args.seed)
            simulation.run()
            found = results.setdefault(scenario.name, {})[name] = figures_of(simulation)
            shown = " ".join(form.format(found[key]) for key, form in SHOWN)
            print(f"{scenario.name:13} {name:14} {shown}", flush=True)
    if args.json:
        with open(args.json, "w") as file:
            json.dump(results, file, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
