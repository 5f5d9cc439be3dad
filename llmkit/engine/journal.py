"""What the last steps did, for display. Written by the engine thread, read by any thread."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence

from llmkit.engine.batch import Batch
from llmkit.engine.request import Request
from llmkit.engine.slots import PrefixCache, common_prefix
from llmkit.protocol import RunningRequest, SlotContent, Step, StepChunk

__all__ = ["Journal", "requests_of", "slots_of"]

MAX_STEPS = 2000


class Journal:
    """The latest steps: when each began and how long it took (seconds); for each of its slots the
    request, how many tokens were computed, how many of them were drafted, and whether they were
    part of a prompt."""

    def __init__(self) -> None:
        self._steps: deque[tuple[float, float, tuple[tuple[int, str, int, int, bool], ...]]] = (
            deque(maxlen=MAX_STEPS)
        )

    def add(
        self,
        began: float,
        seconds: float,
        batch: Batch,
        resident: Sequence[int],
        ids: dict[int | None, str],
    ) -> None:
        """Record a step; ``resident`` is what each of its slots now holds, less than requested
        after an interrupt."""
        chunks = tuple(
            (
                c.slot,
                ids.get(c.slot, ""),
                max(0, min(len(c.tokens), length - c.start)),
                c.draft,
                len(c.tokens) > 1 + c.draft or not c.sample,
            )
            for c, length in zip(batch.chunks, resident, strict=True)
        )
        self._steps.append((began, seconds, chunks))

    def steps(self) -> tuple[Step, ...]:
        """The recorded steps, oldest first."""
        steps, zero = list(self._steps), time.perf_counter()
        return tuple(
            Step(began - zero, seconds, tuple(StepChunk(*chunk) for chunk in chunks))
            for began, seconds, chunks in steps
        )


def requests_of(
    running: Sequence[Request], is_encoding: Callable[[Request], bool]
) -> tuple[RunningRequest, ...]:
    """The running requests."""
    now = time.perf_counter()
    return tuple(
        RunningRequest(
            request=r.request_id,
            caller=r.caller,
            slot=r.slot,
            prompt_tokens=r.num_prompt_tokens,
            cached_tokens=r.num_cached_tokens,
            output_tokens=r.num_output_tokens,
            seconds=now - r.arrived_at,
            is_encoding=is_encoding(r),
        )
        for r in list(running)
    )


def slots_of(cache: PrefixCache, running: Sequence[Request]) -> tuple[SlotContent, ...]:
    """What each slot holds."""
    users = {r.slot: r.request_id for r in list(running)}
    contents = [(slot.index, slot.busy, slot.salt, list(slot.tokens)) for slot in cache.slots]
    rows = []
    for i, (index, busy, salt, tokens) in enumerate(contents):
        shared = max(
            (
                common_prefix(tokens, other, len(tokens))
                for _, _, s, other in contents[:i]
                if s == salt
            ),
            default=0,
        )
        rows.append(SlotContent(index, len(tokens), shared, users.get(index) if busy else None))
    return tuple(rows)
