"""What the last steps did, for people to see. Written by the engine thread, read by any."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from typing import Any

from llmkit.engine.batch import Batch
from llmkit.engine.request import Request
from llmkit.engine.slots import PrefixCache, common_prefix

__all__ = ["Journal", "slots_of"]

MAX_STEPS = 2000


class Journal:
    """The newest steps: when each began and how long it took (seconds), and for each slot in it the request, how many tokens were computed, how many of them
    were guesses, and whether that was a prompt."""

    def __init__(self) -> None:
        self._steps: deque[tuple[float, float, tuple[tuple[int, str, int, int, bool], ...]]] = deque(maxlen=MAX_STEPS)

    def add(self, began: float, batch: Batch, ids: dict[int | None, str]) -> None:
        chunks = tuple((c.slot, ids.get(c.slot, ""), len(c.tokens), c.draft, len(c.tokens) > 1 + c.draft or not c.sample) for c in batch.chunks)
        self._steps.append((began, time.perf_counter() - began, chunks))

    def as_list(self) -> list[dict[str, Any]]:
        """JSON-ready, oldest first; times since the first of them."""
        steps = list(self._steps)
        zero = steps[0][0] if steps else 0.0
        names = ("slot", "request", "tokens", "draft", "is_prompt")
        return [{"at": began - zero, "seconds": seconds, "chunks": [dict(zip(names, c, strict=True)) for c in chunks]} for began, seconds, chunks in steps]


def slots_of(cache: PrefixCache, running: Sequence[Request]) -> list[dict[str, Any]]:
    """What each slot holds, JSON-ready: its tokens, the request that uses it, and how many of its first tokens another slot before it holds as well."""
    users = {r.slot: r.request_id for r in list(running)}
    held = [(slot.index, slot.busy, slot.salt, list(slot.tokens)) for slot in cache.slots]
    found = []
    for i, (index, busy, salt, tokens) in enumerate(held):
        shared = max((common_prefix(tokens, other, len(tokens)) for _, _, s, other in held[:i] if s == salt), default=0)
        found.append({"slot": index, "tokens": len(tokens), "request": users.get(index) if busy else None, "shared": shared})
    return found
