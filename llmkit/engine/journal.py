"""What the last steps did, for people to see. Written by the engine thread, read by any."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from typing import Any

from llmkit.engine.batch import Batch
from llmkit.engine.request import Request
from llmkit.engine.slots import PrefixCache, common_prefix

__all__ = ["Journal", "requests_of", "slots_of"]

MAX_STEPS = 2000


class Journal:
    """The newest steps: when each began and how long it took (seconds), and for each slot in it the request, how many tokens were computed, how many of them
    were guesses, and whether that was a prompt."""

    def __init__(self) -> None:
        self._steps: deque[tuple[float, float, tuple[tuple[int, str, int, int, bool], ...]]] = deque(maxlen=MAX_STEPS)

    def add(self, began: float, seconds: float, batch: Batch, resident: Sequence[int], ids: dict[int | None, str]) -> None:
        """A step; ``resident`` is what each slot of it holds now, less than asked after an interrupt."""
        chunks = tuple(
            (c.slot, ids.get(c.slot, ""), max(0, min(len(c.tokens), held - c.start)), c.draft, len(c.tokens) > 1 + c.draft or not c.sample)
            for c, held in zip(batch.chunks, resident, strict=True)
        )
        self._steps.append((began, seconds, chunks))

    def as_list(self) -> list[dict[str, Any]]:
        """JSON-ready, oldest first; times in seconds, 0 is now."""
        steps, zero = list(self._steps), time.perf_counter()
        names = ("slot", "request", "tokens", "draft", "is_prompt")
        return [{"at": began - zero, "seconds": seconds, "chunks": [dict(zip(names, c, strict=True)) for c in chunks]} for began, seconds, chunks in steps]


def requests_of(running: Sequence[Request]) -> list[dict[str, Any]]:
    """What runs, JSON-ready: tokens of the prompt (and how many of them were cached), tokens made so far, and seconds since it came."""
    now = time.perf_counter()
    return [
        {
            "request": r.request_id,
            "caller": r.caller,
            "slot": r.slot,
            "prompt_tokens": r.num_prompt_tokens,
            "cached_tokens": r.num_cached_tokens,
            "output_tokens": r.num_output_tokens,
            "seconds": now - r.arrived_at,
        }
        for r in list(running)
    ]


def slots_of(cache: PrefixCache, running: Sequence[Request]) -> list[dict[str, Any]]:
    """What each slot holds, JSON-ready: its tokens, the request that uses it, and how many of its first tokens another slot before it holds as well."""
    users = {r.slot: r.request_id for r in list(running)}
    held = [(slot.index, slot.busy, slot.salt, list(slot.tokens)) for slot in cache.slots]
    found = []
    for i, (index, busy, salt, tokens) in enumerate(held):
        shared = max((common_prefix(tokens, other, len(tokens)) for _, _, s, other in held[:i] if s == salt), default=0)
        found.append({"slot": index, "tokens": len(tokens), "request": users.get(index) if busy else None, "shared": shared})
    return found
