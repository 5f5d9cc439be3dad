"""The sequences of a context: truncated, copied, shifted, parked and restored. Engine thread only;
knows neither requests nor sampling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llmkit.backend.library import C, short
from llmkit.backend.state import StateStore
from llmkit.engine.batch import Chunk, Drop, Fork, Park, Restore, Shift, SlotOp, Truncate

__all__ = ["Sequences"]


class Sequences:
    """One sequence per slot. ``memory`` is llama.cpp's; ``store`` keeps copies outside the context.

    ``deterministic``: chunks start at fixed positions. ``broken``: slots emptied in this step since
    a restored or copied prefix was lost.
    """

    def __init__(
        self, memory: Any, store: StateStore, *, can_truncate: bool, deterministic: bool
    ) -> None:
        self._memory = memory
        self._store = store
        self._can_truncate = can_truncate
        self._deterministic = deterministic
        self.broken: set[int] = set()
        self._fork_now = False
        self._seq_rm, self._seq_cp = short("llama_memory_seq_rm"), short("llama_memory_seq_cp")
        self._pos_max = short("llama_memory_seq_pos_max")

    def begin(self, ops: Sequence[SlotOp]) -> None:
        """Start a step with these operations."""
        self.broken.clear()
        # llama.cpp copies between streams at the next decode, but reads and writes states at once:
        # beside those, a fork copies a state as well.
        self._fork_now = any(isinstance(op, Park | Restore) for op in ops)

    def apply(self, op: SlotOp) -> None:
        """Carry out an operation on sequences; others are ignored."""
        match op:
            case Fork():
                self._fork(op)
            case Park() if op.slot in self.broken:  # there is nothing to copy
                self._store.lost.append(op.key)
            case Park():
                self._store.park(op.key, op.slot, op.tokens, op.salt, op.save)
            case Restore():
                self.clear(op.slot)
                if self._store.restore(op.key, op.slot):
                    self.cut(op.slot, op.length + op.offset)
                else:
                    self.clear(op.slot)
                    self.broken.add(op.slot)
            case Drop():
                self._store.drop(op.key)
            case Shift():
                self._seq_rm(self._memory, op.slot, op.keep, op.keep + op.discard)
                C.llama_memory_seq_add(self._memory, op.slot, op.keep + op.discard, -1, -op.discard)
            case Truncate():
                if not self.cut(op.slot, op.length + op.offset):
                    raise RuntimeError(
                        f"llama.cpp could not truncate sequence {op.slot} to {op.length} tokens"
                    )

    def _fork(self, op: Fork) -> None:
        """Between split streams only whole copies exist; the rest is cut off afterwards."""
        self.clear(op.target)
        if op.source in self.broken or (
            self._fork_now and not self._store.copy(op.source, op.target)
        ):
            self.broken.add(op.target)
            return
        if not self._fork_now:
            self._seq_cp(self._memory, op.source, op.target, -1, -1)
        self.cut(op.target, op.length + op.offset)

    def clear(self, slot: int) -> None:
        self._seq_rm(self._memory, slot, -1, -1)

    def cut(self, slot: int, position: int) -> bool:
        """Keep only what stands before ``position``; False where the model cannot."""
        return bool(self._seq_rm(self._memory, slot, position or -1, -1))

    def take_back(self, chunk: Chunk) -> int:
        """Drop the last token of a chunk and the drafts after it, to be computed again. Returns how
        many tokens stay."""
        if not self._can_truncate:  # all or nothing
            self.clear(chunk.slot)
            return 0
        keep = chunk.start + len(chunk.tokens) - chunk.draft - 1
        self.cut(chunk.slot, keep + chunk.offset)
        return keep

    def keep_whole(self, chunk: Chunk) -> int:
        """After an interrupt: keep what is whole. Returns how many tokens that is. The last one of
        a sampling chunk is dropped, since its logits are lost."""
        if not self._can_truncate:  # its state may be half updated, undetectably
            self.clear(chunk.slot)
            return 0
        # Restart the chunk: its position is fixed, or its scores were lost. An image begins again,
        # since several of its cells may stand at one position.
        if self._deterministic or chunk.targets or chunk.item is not None:
            start = chunk.start if chunk.item is None else chunk.item.start
            self.cut(chunk.slot, start + chunk.offset)
            return start
        length = int(self._pos_max(self._memory, chunk.slot)) + 1 - chunk.offset
        length = max(length, chunk.start)  # an image's cells may stand before its last position
        keep = min(length, chunk.start + len(chunk.tokens) - chunk.draft - chunk.sample)
        if keep < length:
            self.cut(chunk.slot, keep + chunk.offset)
        return keep
