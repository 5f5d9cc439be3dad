"""Slots and the prefixes they keep: a finished request's tokens stay until their room is needed.
Engine thread only.

A slot is one llama.cpp sequence. Choosing one for a request answers two questions: where is its
longest cached prefix, and may that slot be reused in place (truncated), or must the prefix be
copied because others still need it? A prefix that loses its slot may be parked: a copy outside the
context, in RAM or on disk, from which it can be restored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from llmkit.engine.batch import Drop, Fork, Park, Restore, SlotOp, Truncate
from llmkit.engine.media import item_start, offset

__all__ = ["Parked", "PrefixCache", "Slot"]

# A copy between split streams moves the whole stream (about 5 ms for 35 MB); recomputing a shorter
# prefix is as fast.
MIN_FORK_TOKENS = 8
# Shorter prefixes are not worth parking.
MIN_PARK_TOKENS = 64


@dataclass(slots=True)
class Slot:
    """One sequence of the context and the tokens whose keys and values it holds, for requests with
    one ``salt``."""

    index: int
    tokens: list[int] = field(default_factory=list)
    salt: str = ""
    busy: bool = False
    last_used: int = 0
    shareable: int | None = None  # how many leading tokens others may use; None: all


@dataclass(slots=True)
class Parked:
    """A prefix outside the context. ``pinned``: a preempted request will return for it."""

    key: int
    tokens: list[int]
    salt: str
    last_used: int
    pinned: bool = False
    on_disk: bool = False


class PrefixCache:
    """The slots of one context, searchable by prefix.

    >>> cache = PrefixCache(2, can_truncate=True, can_fork=True)
    >>> slot, cached, ops = cache.acquire([1, 2, 3])
    >>> slot.index, cached, ops
    (0, 0, [])

    ``host_tokens`` is how many tokens may be parked in RAM (0: none).
    """

    def __init__(
        self, n_slots: int, *, can_truncate: bool, can_fork: bool, host_tokens: int = 0
    ) -> None:
        self.slots = [Slot(i) for i in range(n_slots)]
        self.parked: dict[int, Parked] = {}
        self._can_truncate = can_truncate
        self._can_fork = can_fork
        self._host_tokens = host_tokens
        self._clock = 0
        self._next_key = 0

    @property
    def num_free(self) -> int:
        return sum(not s.busy for s in self.slots)

    @property
    def num_tokens(self) -> int:
        """Tokens in the context."""
        return sum(len(s.tokens) for s in self.slots)

    @property
    def num_parked_tokens(self) -> int:
        """Tokens parked in RAM."""
        return sum(len(p.tokens) for p in self.parked.values() if not p.on_disk)

    def add_saved(self, key: int, tokens: Sequence[int], salt: str) -> None:
        """Add a prefix that is already on disk."""
        self._next_key = max(self._next_key, key)
        self.parked[key] = Parked(key, list(tokens), salt, 0, on_disk=True)

    def longest(self, tokens: Sequence[int], salt: str = "") -> int:
        """How many leading tokens are cached anywhere."""
        prompt = list(tokens)
        entries: list[Slot | Parked] = [*self.slots, *self.parked.values()]
        return max((self._shared(e, prompt, salt) for e in entries), default=0)

    def _shared(self, entry: Slot | Parked, prompt: list[int], salt: str) -> int:
        if entry.salt != salt or not entry.tokens:
            return 0
        limit = len(prompt) - 1
        if isinstance(entry, Slot) and entry.shareable is not None:
            limit = min(limit, entry.shareable)
        shared = item_start(prompt, common_prefix(entry.tokens, prompt, limit))
        return (
            shared
            if self._can_truncate or shared == len(entry.tokens) or isinstance(entry, Slot)
            else 0
        )

    def acquire(
        self, tokens: Sequence[int], salt: str = "", *, reuse: bool = True
    ) -> tuple[Slot, int, list[SlotOp]]:
        """Take a free slot for a prompt. Returns it, how many leading tokens it already holds, and
        what the runner must do first.

        At least the last token is left to compute: its logits are needed. ``reuse=False`` starts
        from nothing. ``num_free`` must not be 0.
        """
        prompt = list(tokens)
        free = [s for s in self.slots if not s.busy]
        lengths = {s.index: self._shared(s, prompt, salt) for s in self.slots} if reuse else {}
        best = max(
            (s for s in self.slots if lengths.get(s.index)),
            key=lambda s: (lengths[s.index], not s.busy, s.last_used),
            default=None,
        )
        shared = lengths[best.index] if best is not None else 0
        parked = (
            max(self.parked.values(), key=lambda p: self._shared(p, prompt, salt), default=None)
            if reuse
            else None
        )
        outside = self._shared(parked, prompt, salt) if parked is not None else 0
        if (
            best is not None
            and shared >= outside
            and not best.busy
            and self._may_use_up(best, shared, free)
        ):
            return self._take(best, shared, salt, [])
        target = self._victim(free, keep=best)
        if parked is not None and outside > shared and outside >= MIN_FORK_TOKENS:
            ops = self.park(target, unless=parked)
            target.tokens = parked.tokens[:outside]
            self._clock += 1
            parked.last_used = self._clock
            restore = Restore(parked.key, target.index, outside, offset(prompt, outside))
            return self._take(target, outside, salt, [*ops, restore])
        if (
            best is not None
            and best is not target
            and shared >= MIN_FORK_TOKENS
            and self._can_fork
            and (self._can_truncate or shared == len(best.tokens))
        ):
            ops = self.park(target)
            target.tokens = best.tokens[:shared]
            if not best.busy:
                self._touch(best)
            fork = Fork(best.index, target.index, shared, offset(prompt, shared))
            return self._take(target, shared, salt, [*ops, fork])
        keep = lengths.get(target.index, 0)
        return self._take(
            target, keep, salt, self.park(target) if keep < len(target.tokens) else []
        )

    def _may_use_up(self, slot: Slot, shared: int, free: list[Slot]) -> bool:
        """Whether to reuse in place: the slot's content is continued, most of it is useful, or no
        other slot is free."""
        if shared == len(slot.tokens):
            return True
        if not self._can_truncate:
            return False
        return shared * 2 >= len(slot.tokens) or len(free) == 1

    def _victim(self, free: list[Slot], keep: Slot | None) -> Slot:
        """An empty slot, else the least recently used; low indices first, since llama.cpp batches
        neighbouring streams."""
        others = [s for s in free if s is not keep] or free
        return min(others, key=lambda s: (bool(s.tokens), s.last_used, s.index))

    def _take(
        self, slot: Slot, keep: int, salt: str, ops: list[SlotOp]
    ) -> tuple[Slot, int, list[SlotOp]]:
        if keep < len(slot.tokens):
            ops = [*ops, *self.cut(slot, keep)]
            keep = len(slot.tokens)
        slot.busy, slot.salt, slot.shareable = True, salt, None
        self._touch(slot)
        return slot, keep, ops

    def release(self, slot: Slot) -> None:
        """Free the slot of a request that ended; its tokens stay as a cached prefix."""
        slot.busy = False
        self._touch(slot)

    def cut(self, slot: Slot, length: int) -> list[SlotOp]:
        """Keep a slot's first ``length`` tokens, fewer if that is within an image, or none where
        the model cannot truncate."""
        if length >= len(slot.tokens):
            return []
        length = item_start(slot.tokens, length) if self._can_truncate else 0
        del slot.tokens[length:]
        return [Truncate(slot.index, length, offset(slot.tokens, length))]

    def evict(self, slot: Slot) -> list[SlotOp]:
        """Empty an idle slot, parking its tokens if worthwhile."""
        ops = self.park(slot)
        slot.tokens.clear()
        return [*ops, Truncate(slot.index, 0)]

    def oldest_idle(self) -> Slot | None:
        """The least recently used idle slot that holds tokens."""
        return min(
            (s for s in self.slots if not s.busy and s.tokens),
            key=lambda s: s.last_used,
            default=None,
        )

    def park(
        self, slot: Slot, *, pinned: bool = False, unless: Parked | None = None, save: bool = False
    ) -> list[SlotOp]:
        """Copy a slot's tokens out of the context, dropping the least recently used copies for
        room; nothing where they are too few, too many, or cached elsewhere.

        ``unless`` must not be dropped for it. ``pinned`` copies stay until used. ``save`` copies to
        disk, whatever the size.
        """
        size = len(slot.tokens)
        if not save and (
            size < MIN_PARK_TOKENS or size > self._host_tokens or self._is_elsewhere(slot)
        ):
            return []
        if save and any(
            p.on_disk and p.salt == slot.salt and p.tokens == slot.tokens
            for p in self.parked.values()
        ):
            return []
        ops: list[SlotOp] = []
        room = size if save else self._host_tokens - self.num_parked_tokens
        for entry in sorted(self.parked.values(), key=lambda p: p.last_used):
            if room >= size:
                break
            if not entry.pinned and not entry.on_disk and entry is not unless:
                room += len(entry.tokens)
                ops += self.drop(entry)
        if room < size:
            return ops
        self._clock += 1
        entry = Parked(
            self.new_key(), list(slot.tokens), slot.salt, self._clock, pinned, on_disk=save
        )
        self.parked[entry.key] = entry
        return [*ops, Park(slot.index, entry.key, entry.tokens, slot.salt, save)]

    def _is_elsewhere(self, slot: Slot) -> bool:
        size = len(slot.tokens)
        others: list[Slot | Parked] = [s for s in self.slots if s is not slot]
        return any(
            e.salt == slot.salt and len(e.tokens) >= size and e.tokens[:size] == slot.tokens
            for e in (*others, *self.parked.values())
        )

    def drop(self, entry: Parked) -> list[SlotOp]:
        """Forget a parked prefix."""
        del self.parked[entry.key]
        return [Drop(entry.key)]

    def unpin(self, key: int | None) -> None:
        """The preempted request is back, or has ended: its parked prefix may be dropped."""
        entry = self.parked.get(key) if key is not None else None
        if entry is not None:
            entry.pinned = False

    def new_key(self) -> int:
        self._next_key += 1
        return self._next_key

    def _touch(self, slot: Slot) -> None:
        self._clock += 1
        slot.last_used = self._clock


def common_prefix(a: list[int], b: list[int], limit: int) -> int:
    """Length of the common prefix of two lists, at most ``limit``; slice comparison runs in C."""
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
