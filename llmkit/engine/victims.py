"""Which request is preempted when there is no room. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence

from llmkit.engine.request import Request

__all__ = ["is_due", "of_a_larger_share", "shares", "youngest"]


def shares(running: Sequence[Request]) -> Counter[str]:
    """How many slots each caller has."""
    return Counter(request.caller for request in running)


def youngest(running: Sequence[Request], above: int | None = None) -> Request | None:
    """The youngest request of the least priority (the highest number, above ``above``)."""
    candidates = [r for r in running if above is None or r.priority > above]
    return max(candidates, key=lambda r: (r.priority, r.arrived_at), default=None)


def is_due(request: Request, other: Request, service: Callable[[str], float]) -> bool:
    """Whether a caller without a slot may take one of the other request's caller.

    Not from a heavier one that has had less service for its weight: the lighter one's turn comes.
    """
    return request.weight >= other.weight or service(request.caller) < service(other.caller)


def of_a_larger_share(
    running: Sequence[Request],
    request: Request,
    service: Callable[[str], float],
    spared: Collection[Request] = (),
) -> Request | None:
    """The request to preempt for a caller without a slot: the youngest of the caller with the most
    slots for its weight, if that has several and is not more urgent. ``service``: see `Backlog`."""
    slots = shares(running)
    if request.caller in slots:
        return None
    candidates = [
        r
        for r in running
        if r not in spared
        and slots[r.caller] > 1
        and r.priority >= request.priority
        and is_due(request, r, service)
    ]
    return max(
        candidates,
        key=lambda r: (slots[r.caller] / r.weight, r.priority, r.arrived_at),
        default=None,
    )
