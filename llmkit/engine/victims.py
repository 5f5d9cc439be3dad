"""Which request is preempted when there is no room. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence

from llmkit.engine.request import Request

__all__ = ["of_a_larger_share", "shares", "youngest"]


def shares(running: Sequence[Request]) -> Counter[str]:
    """How many slots each caller has."""
    return Counter(request.caller for request in running)


def youngest(running: Sequence[Request], above: int | None = None) -> Request | None:
    """The youngest request of the least priority (the highest number, above ``above``)."""
    candidates = [r for r in running if above is None or r.priority > above]
    return max(candidates, key=lambda r: (r.priority, r.arrived_at), default=None)


def of_a_larger_share(
    running: Sequence[Request], request: Request, spared: Collection[Request] = ()
) -> Request | None:
    """The request to preempt for a caller without a slot: the youngest of the caller with the most
    slots, if that has several and is not more urgent."""
    slots = shares(running)
    if request.caller in slots:
        return None
    candidates = [
        r
        for r in running
        if r not in spared and slots[r.caller] > 1 and r.priority >= request.priority
    ]
    return max(candidates, key=lambda r: (slots[r.caller], r.priority, r.arrived_at), default=None)
