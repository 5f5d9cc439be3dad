"""Who waits, who runs and in which slot; how requests are preempted and finished. Engine thread
only.

Knows nothing of steps: the `Scheduler` decides what is computed, the `Intake` takes in the result.
Slot operations are left in ``pending`` for the next batch; a preemption returns its own, since the
scheduler preempts while it builds a batch.
"""

from __future__ import annotations

from llmkit.engine import victims
from llmkit.engine.backlog import Backlog
from llmkit.engine.batch import Close, Park, SlotOp
from llmkit.engine.prefill import ALIGNMENT
from llmkit.engine.request import Request, slot_of
from llmkit.engine.slots import PrefixCache, Slot
from llmkit.protocol import FinishReason

__all__ = ["Roster"]


class Roster:
    """The requests of one scheduler. ``saving``: running requests whose prefix is being saved."""

    def __init__(self, cache: PrefixCache, waiting: Backlog, *, deterministic: bool) -> None:
        self.cache = cache
        self.waiting = waiting
        self.running: list[Request] = []
        self.saving: list[Request] = []
        self.pending: list[SlotOp] = []
        self.num_preemptions = 0
        self._deterministic = deterministic

    def slot(self, request: Request) -> Slot:
        return self.cache.slots[slot_of(request)]

    def victim(self, above: int | None = None) -> Request | None:
        """The request to preempt, of a priority number above ``above``."""
        return victims.youngest([r for r in self.running if r not in self.saving], above)

    def preempt(self, request: Request) -> list[SlotOp]:
        """Back to waiting. What it computed is parked outside the context if there is room (a copy
        of 35 MB takes 4 ms, its 1,500 tokens some seconds), else it will be recomputed."""
        slot = self.slot(request)
        self._refund(request, ended=False)
        if self._deterministic:
            ops = self._cut_inexact(request, slot)
        elif request.is_shifted:
            # llama.cpp shifts positions at once and keys at the next decode: a copy made in
            # between would be wrong.
            ops = self.cache.cut(slot, 0)
        else:
            ops = self.cache.park(slot, pinned=True)
        request.parked_key = next((op.key for op in ops if isinstance(op, Park)), None)
        self.running.remove(request)
        self.cache.release(slot)
        request.preempt()
        self.waiting.put_back(request)
        self.num_preemptions += 1
        return ops

    def save(self, request: Request) -> bool:
        """Save the prefix of a computed request to disk; it ends when the next step is done. False:
        it is there already."""
        ops = self.cache.park(self.slot(request), save=True)
        if not ops:
            return False
        request.parked_key = next((op.key for op in ops if isinstance(op, Park)), None)
        self.pending += ops
        self.saving.append(request)
        return True

    def finish(self, request: Request, reason: FinishReason) -> None:
        """End a request that waits or runs."""
        request.finish(reason)
        self.pending.append(Close(request.serial))
        if request.slot is None:
            self.cache.unpin(request.parked_key)
            self.waiting.remove(request)
        else:
            slot = self.slot(request)
            self._refund(request, ended=True)
            if self._deterministic:
                self.pending += self._cut_inexact(request, slot)
            if request.is_shifted:
                self.pending += self.cache.cut(slot, 0)  # of no use to other requests
            self.running.remove(request)
            if request in self.saving:
                self.saving.remove(request)
            self.cache.release(slot)
        self.waiting.leave(request)

    def _refund(self, request: Request, *, ended: bool) -> None:
        """Its prompt was charged when it got its slot: take back what was not computed."""
        self.waiting.refund(request, max(0, request.num_uncomputed_tokens - 1), ended=ended)

    def _cut_inexact(self, request: Request, slot: Slot) -> list[SlotOp]:
        """Others would compute exactly the same only in whole chunks: cut off the rest."""
        return self.cache.cut(
            slot, min(len(slot.tokens), request.num_prompt_tokens) // ALIGNMENT * ALIGNMENT
        )
