"""The order of waiting requests: priority, then fairness, then arrival. Engine thread only.

Each caller has a counter of the service it got (prompt tokens computed, plus generated tokens at
twice the price), divided by its weight. The caller with the lowest counter goes first, so one with
a hundred requests gets no more than one with a few, and one of twice the weight twice as much. A
caller that returns is raised to the lowest counter among active callers: idling earns no credit. A
lead over the others halves every 30 seconds, so that nobody pays in the afternoon for the morning;
when no caller is active, all counters reset. Based on the virtual token counter of Sheng et al.,
"Fairness in Serving Large Language Models", 2024.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator

from llmkit.engine.request import Request

__all__ = ["Backlog"]

OUTPUT_PRICE = 2
MAX_CALLERS = 10_000
HALF_LIFE_S = 30.0
FADE_EVERY_S = 1.0


class Backlog:
    """The waiting requests. ``on_leave`` is called with each request that stops waiting for the
    first time; ``clock`` returns seconds."""

    def __init__(
        self,
        on_leave: Callable[[Request], None] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._on_leave = on_leave
        self._clock = clock
        self._faded_at = clock()
        self._queues: dict[tuple[int, str], deque[Request]] = {}
        self._service: dict[str, float] = {}
        self._active: dict[str, int] = {}  # each caller's requests, waiting or running
        self._size = 0
        self.num_with_media = 0

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[Request]:
        return (r for q in self._queues.values() for r in q)

    def add(self, request: Request) -> None:
        """Queue a new request."""
        caller = request.caller
        if not self._active:
            self._service.clear()
        self._fade()
        if not self._active.get(caller):
            least = min((self._service[c] for c in self._active), default=0.0)
            self._service[caller] = max(self._service.get(caller, 0.0), least)
        self._active[caller] = self._active.get(caller, 0) + 1
        self._queue(request).append(request)
        self._count(request, 1)

    def put_back(self, request: Request) -> None:
        """Queue a preempted request again, ahead of its caller's others."""
        self._queue(request).appendleft(request)
        self._count(request, 1)

    def _count(self, request: Request, change: int) -> None:
        self._size += change
        self.num_with_media += change if request.media else 0

    def _queue(self, request: Request) -> deque[Request]:
        return self._queues.setdefault((request.priority, request.caller), deque())

    def _fade(self) -> None:
        """Move all counters towards the lowest among active callers."""
        now = self._clock()
        if now - self._faded_at < FADE_EVERY_S or not self._active:
            return
        share = 0.5 ** ((now - self._faded_at) / HALF_LIFE_S)
        self._faded_at = now
        least = min(self._service[c] for c in self._active)
        faded = {c: least + (s - least) * share for c, s in self._service.items() if s > least}
        # An idle caller that is level with the active ones need not be remembered.
        self._service = {c: s for c, s in faded.items() if s - least >= 1 or c in self._active} | {
            c: least for c in self._active if c not in faded
        }

    def charge(self, request: Request, num_prompt: int = 0, num_output: int = 0) -> None:
        """Charge the caller for this much service, in tokens."""
        tokens = num_prompt + OUTPUT_PRICE * num_output
        self._service[request.caller] = (
            self._service.get(request.caller, 0.0) + tokens / request.weight
        )

    def refund(self, request: Request, num_prompt: int, *, ended: bool) -> None:
        """Take back a charge for prompt tokens that were not computed.

        For a request that has ``ended`` it brings nobody below the least served of the other active
        callers: those that came in the meantime were raised to a counter that had the charge in it.
        One that was preempted is charged again when its turn comes.
        """
        if not num_prompt:
            return
        mine = self._service.get(request.caller, 0.0)
        others = [self._service[c] for c in self._active if c != request.caller] if ended else []
        floor = min(mine, min(others)) if others else 0.0
        self._service[request.caller] = max(mine - num_prompt / request.weight, floor)

    def service(self, caller: str) -> float:
        """The service a caller got for each unit of weight, in prompt tokens; decays over time."""
        return self._service.get(caller, 0.0)

    def leave(self, request: Request) -> None:
        """Note that a request has ended."""
        caller = request.caller
        self._active[caller] -= 1
        if not self._active[caller]:
            del self._active[caller]
            if len(self._service) > MAX_CALLERS:
                self._service = {c: s for c, s in self._service.items() if c in self._active}

    @property
    def most_urgent(self) -> int:
        """The lowest priority number among waiting requests."""
        return min(priority for priority, _ in self._queues)

    def first(self, ready: Callable[[Request], bool]) -> Request | None:
        """The next request for which ``ready`` is true; it stays in the backlog."""
        self._fade()
        for key in sorted(
            self._queues,
            key=lambda k: (k[0], self._service.get(k[1], 0.0), self._queues[k][0].arrived_at),
        ):
            for request in self._queues[key]:
                if ready(request):
                    return request
        return None

    def newest(self, caller: str) -> Request | None:
        """The caller's request that would run last, among those that have never run."""
        mine = (
            r
            for (_, whose), queued in self._queues.items()
            if whose == caller
            for r in queued
            if r.is_queued
        )
        return max(mine, key=lambda r: (r.priority, r.arrived_at), default=None)

    def remove(self, request: Request) -> None:
        if request.is_queued:
            request.is_queued = False
            self._on_leave(request)
        key = (request.priority, request.caller)
        self._queues[key].remove(request)
        if not self._queues[key]:
            del self._queues[key]
        self._count(request, -1)

    def clear(self) -> None:
        self._queues.clear()
        self._size = self.num_with_media = 0
