"""Consistency of the scheduler's bookkeeping; for tests, between steps."""

from __future__ import annotations

from llmkit.engine.scheduler import Scheduler

__all__ = ["check"]


def check(scheduler: Scheduler) -> None:
    """Raises AssertionError where the books disagree."""
    running, slots = scheduler.running, scheduler.cache.slots
    assert {r.slot for r in running} == {s.index for s in slots if s.busy} and len(
        {r.slot for r in running}
    ) == len(running)
    for request in running:
        assert request.slot is not None
        tokens = slots[request.slot].tokens
        assert (
            len(tokens) == request.num_computed_tokens <= len(request.tokens)
            and request.tokens[: len(tokens)] == tokens
        )
    assert all(r.slot is None and r.finish_reason is None for r in scheduler.waiting) and len(
        list(scheduler.waiting)
    ) == len(scheduler.waiting)
