"""How `fleet.py` routes: llmkit's own router, and what others do."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from bisect import bisect_left, insort
from hashlib import blake2b
from typing import Any, ClassVar

from fleet_model import Job

from llmkit.cluster.routing import Figures, Router, Ticket


class Policy:
    """One gateway's choice among replicas. ``route`` gives a name, or None if none is open."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.open: list[str] = []
        self.has: dict[str, int] = {}  # by the last report
        self.since: dict[str, int] = {}

    def add(self, name: str, home: str) -> None:
        self.open.append(name)
        self.has[name] = self.since[name] = 0

    def remove(self, name: str) -> None:
        self.close(name)
        self.has.pop(name, None)
        self.since.pop(name, None)

    def close(self, name: str) -> None:
        if name in self.open:
            self.open.remove(name)

    def report(self, name: str, figures: Figures) -> None:
        if name in self.has:
            self.has[name], self.since[name] = figures.has, 0

    def load(self, name: str) -> int:
        return max(0, self.has[name] + self.since[name])

    def route(self, job: Job) -> str | None:
        """Where it goes; a gateway without engines refuses it."""
        return None

    def started(self, job: Job) -> None:
        pass

    def ended(self, job: Job, name: str, whole: bool) -> None:
        if name in self.since:
            self.since[name] -= 1


class Choosing(Policy, ABC):
    """One that chooses among those that are open."""

    def route(self, job: Job) -> str | None:
        if not self.open:
            return None
        name = self.pick(job)
        self.since[name] += 1
        return name

    @abstractmethod
    def pick(self, job: Job) -> str:
        """One of ``open``."""


class LeastLoaded(Choosing):
    def pick(self, job: Job) -> str:
        loads = [self.load(name) for name in self.open]
        least = min(loads)
        return self.rng.choice([n for n, has in zip(self.open, loads, strict=True) if has == least])


class PowerOfTwo(Choosing):
    def pick(self, job: Job) -> str:
        return min(self.rng.choice(self.open), self.rng.choice(self.open), key=self.load)


class Ring(Choosing):
    """By the conversation."""

    POINTS: ClassVar[int] = 64

    def __init__(self, rng: random.Random) -> None:
        super().__init__(rng)
        self.ring: list[tuple[int, str]] = []

    def add(self, name: str, home: str) -> None:
        super().add(name, home)
        for i in range(self.POINTS):
            insort(self.ring, (_hash(f"{home}/{i}"), name))

    def close(self, name: str) -> None:
        if name in self.open:
            super().close(name)
            self.ring = [p for p in self.ring if p[1] != name]

    def key(self, job: Job) -> int:
        return _hash(f"talk {job.talk.key}")

    def walk(self, job: Job) -> Any:
        start = bisect_left(self.ring, (self.key(job), ""))
        for i in range(len(self.ring)):
            yield self.ring[(start + i) % len(self.ring)][1]

    def pick(self, job: Job) -> str:
        name: str = next(self.walk(job))
        return name


class Bounded(Ring):
    """By the conversation, to the first that has at most 1.25 times the mean load."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__(rng)
        self.sum, self.fresh = 0, 0

    def pick(self, job: Job) -> str:
        self.fresh -= 1
        if self.fresh < 0:  # a sum over all is not needed each time
            self.sum, self.fresh = sum(map(self.load, self.open)), 20
        self.sum += 1
        most = 1.25 * self.sum / len(self.open)
        first = None
        for name in self.walk(job):
            first = first or name
            if self.load(name) + 1 <= max(1.0, most):
                return name
        assert first is not None
        return first


class BoundedPrefix(Bounded):
    """The same by the first block of text."""

    def key(self, job: Job) -> int:
        return job.chain.marks[0]


class Cost(Policy):
    """llmkit's."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__(rng)
        self.router = Router(rng)

    def add(self, name: str, home: str) -> None:
        self.router.add(name, home)

    def remove(self, name: str) -> None:
        self.router.remove(name)

    def close(self, name: str) -> None:
        self.router.close(name)

    def report(self, name: str, figures: Figures) -> None:
        self.router.report(name, figures)

    def route(self, job: Job) -> str | None:
        ticket = self.router.route(job.chain, answered=job.done)
        job.ticket = ticket
        return None if ticket is None else ticket.replica

    def started(self, job: Job) -> None:
        assert isinstance(job.ticket, Ticket)
        self.router.started(job.ticket)

    def ended(self, job: Job, name: str, whole: bool) -> None:
        assert isinstance(job.ticket, Ticket)
        counts = (
            {
                "prompt_tokens": job.prompt,
                "cached_tokens": job.cached,
                "answer_tokens": job.answer,
            }
            if whole
            else {}
        )
        self.router.ended(job.ticket, **counts)


POLICIES: dict[str, type[Policy]] = {
    "cost": Cost,
    "least": LeastLoaded,
    "two": PowerOfTwo,
    "session": Ring,
    "bounded": Bounded,
    "bounded-prefix": BoundedPrefix,
}


def _hash(text: str) -> int:
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest())
