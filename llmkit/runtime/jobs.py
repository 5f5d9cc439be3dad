"""Embedding requests that wait for a batch, and whose sequence is next. Embedder thread only."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np

from llmkit.protocol import Embeddings

__all__ = ["Job", "JobQueue"]


@dataclass(slots=True)
class Job:
    """A request: its token sequences, and the vectors so far."""

    request_id: str
    caller: str
    sequences: list[np.ndarray]
    normalize: bool
    future: Future[Embeddings]
    vectors: np.ndarray
    weight: float = 1.0
    num_done: int = 0
    num_taken: int = 0

    @property
    def next_size(self) -> int:
        """Tokens of the next sequence; 0 when all have been taken."""
        return len(self.sequences[self.num_taken]) if self.num_taken < len(self.sequences) else 0

    def result(self) -> Embeddings:
        vectors = self.vectors
        if self.normalize:
            vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        return Embeddings(
            vectors.astype(np.float32).tobytes(), vectors.shape[1], tuple(map(len, self.sequences))
        )


class JobQueue:
    """The jobs of all callers. Callers take turns by their weight, and so do the jobs of each."""

    def __init__(self) -> None:
        self._callers: OrderedDict[str, deque[Job]] = OrderedDict()
        self._turns: dict[str, float] = {}  # what each caller has saved up of its next turn

    def __len__(self) -> int:
        return sum(map(len, self._callers.values()))

    def __iter__(self) -> Iterator[Job]:
        return (job for jobs in self._callers.values() for job in jobs)

    def add(self, job: Job) -> None:
        self._callers.setdefault(job.caller, deque()).append(job)

    def remove(self, job: Job) -> None:
        jobs = self._callers[job.caller]
        jobs.remove(job)
        if not jobs:
            del self._callers[job.caller]
            self._turns.pop(job.caller, None)

    def take(self, room: int, most: int) -> list[tuple[Job, int]]:
        """A batch of at most ``room`` tokens and ``most`` sequences, as (job, sequence index)."""
        batch: list[tuple[Job, int]] = []
        able = dict(self._callers)
        while able and len(batch) < most:
            heaviest = max(jobs[0].weight for jobs in able.values())
            for caller, jobs in list(able.items()):
                turns = self._turns.get(caller, 0.0) + jobs[0].weight / heaviest
                self._turns[caller] = turns % 1
                if turns < 1:
                    continue
                job = self._next(jobs, room)
                if job is None or len(batch) == most:
                    del able[caller]
                    continue
                batch.append((job, job.num_taken))
                room -= job.next_size
                job.num_taken += 1
        if self._callers:
            first = next(iter(self._callers))
            self._callers.move_to_end(first)  # another caller leads the next batch
        return batch

    @staticmethod
    def _next(jobs: deque[Job], room: int) -> Job | None:
        for _ in range(len(jobs)):
            job = jobs[0]
            jobs.rotate(-1)
            if 0 < job.next_size <= room:
                return job
        return None
