"""Slots and the prefixes they keep: a finished request's tokens stay where they are until the room is needed. Engine thread only.

A slot is one llama.cpp sequence. Choosing one for a new request answers two questions: where does its longest cached prefix lie, and may that slot be
used up (truncated in place), or must the prefix be copied elsewhere because others still want it?
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from llmkit.engine.batch import Fork, SlotOp, Truncate

__all__ = ["PrefixCache", "Slot"]

# A copy between split streams moves the whole stream (about 5 ms for 35 MB); shorter prefixes are computed again as quickly.
MIN_FORK_TOKENS = 8


@dataclass(slots=True)
class Slot:
    """One sequence of the context and the tokens whose keys and values it holds."""

    index: int
    tokens: list[int] = field(default_factory=list)
    busy: bool = False
    last_used: int = 0


class PrefixCache:
    """The slots of one context, searchable by prefix.

    >>> cache = PrefixCache(2, can_truncate=True, can_fork=True)
    >>> slot, cached, ops = cache.acquire([1, 2, 3])
    >>> slot.index, cached, ops
    (0, 0, [])
    """

    def __init__(self, n_slots: int, *, can_truncate: bool, can_fork: bool) -> None:
        self.slots = [Slot(i) for i in range(n_slots)]
        self._can_truncate = can_truncate
        self._can_fork = can_fork
        self._clock = 0

    @property
    def num_free(self) -> int:
        return sum(not s.busy for s in self.slots)

    def acquire(self, tokens: Sequence[int]) -> tuple[Slot, int, list[SlotOp]]:
        """Take a free slot for a prompt. Returns it, how many leading tokens it holds already, and what the runner must do first.

        At least the last token is left to compute: its logits are needed. Must not be called when ``num_free`` is 0.
        """
        prompt = list(tokens)
        free = [s for s in self.slots if not s.busy]
        limit = len(prompt) - 1
        lengths = {s.index: common_prefix(s.tokens, prompt, limit) for s in self.slots if s.tokens}
        best = max((s for s in self.slots if s.tokens), key=lambda s: (lengths[s.index], not s.busy, s.last_used), default=None)
        shared = lengths[best.index] if best is not None else 0
        if best is not None and shared and not best.busy and self._may_use_up(best, shared, free):
            return self._take(best, shared, [])
        target = self._victim(free, keep=best)
        if best is not None and best is not target and shared >= MIN_FORK_TOKENS and self._can_fork and (self._can_truncate or shared == len(best.tokens)):
            target.tokens = best.tokens[:shared]
            if not best.busy:
                self._touch(best)
            return self._take(target, shared, [Fork(best.index, target.index, shared)])
        return self._take(target, lengths.get(target.index, 0), [])

    def _may_use_up(self, slot: Slot, shared: int, free: list[Slot]) -> bool:
        """In place: when the slot's content is continued, when most of it is of use, or when there is nothing else."""
        if shared == len(slot.tokens):
            return True
        if not self._can_truncate:
            return False
        return shared * 2 >= len(slot.tokens) or len(free) == 1

    def _victim(self, free: list[Slot], keep: Slot | None) -> Slot:
        """An empty slot, else the least recently used; low indices first, since llama.cpp computes neighbouring streams together."""
        others = [s for s in free if s is not keep] or free
        return min(others, key=lambda s: (bool(s.tokens), s.last_used, s.index))

    def _take(self, slot: Slot, keep: int, ops: list[SlotOp]) -> tuple[Slot, int, list[SlotOp]]:
        if keep < len(slot.tokens):
            if not self._can_truncate:
                keep = 0
            ops = [*ops, Truncate(slot.index, keep)]
            del slot.tokens[keep:]
        slot.busy = True
        self._touch(slot)
        return slot, keep, ops

    def release(self, slot: Slot) -> None:
        """The request ended; its tokens stay as a cached prefix."""
        slot.busy = False
        self._touch(slot)

    def _touch(self, slot: Slot) -> None:
        self._clock += 1
        slot.last_used = self._clock


def common_prefix(a: Sequence[int], b: Sequence[int], limit: int) -> int:
    """Length of the common beginning of two lists, at most ``limit``; compares slices, so it runs in C."""
    low, high = 0, min(len(a), len(b), limit)
    if a[:high] == b[:high]:
        return high
    while low < high - 1:  # invariant: the first `low` agree, the first `high` do not
        middle = (low + high) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle
    return low
