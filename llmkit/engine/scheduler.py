"""Which tokens go into the next step. Engine thread only; pure bookkeeping, the runner does what the `Batch` says.

Decodes go first, one token for each running stream; prompts share what is left of the step's token budget in order of arrival. While streams
are running the budget is smaller, because every prompt token in a step is a wait for all of them.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable

from llmkit.engine.batch import Batch, Chunk, Open, SlotOp, StepOutput, Truncate
from llmkit.engine.request import Request
from llmkit.engine.slots import PrefixCache, Slot
from llmkit.types import FinishReason

__all__ = ["Scheduler"]


class Scheduler:
    """Continuous batching over the slots of one context.

    ``max_batch_tokens`` bounds a step that holds prompts only, ``mixed_batch_tokens`` one in which streams decode as well.
    """

    def __init__(self, cache: PrefixCache, *, n_ctx: int, max_batch_tokens: int, mixed_batch_tokens: int, is_end: Callable[[int], bool]) -> None:
        self._cache = cache
        self._n_ctx = n_ctx
        self._max_batch_tokens = max_batch_tokens
        self._mixed_batch_tokens = min(mixed_batch_tokens, max_batch_tokens)
        self._is_end = is_end
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self._pending: list[SlotOp] = []
        self._scheduled: list[Request] = []

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, request: Request) -> None:
        self.waiting.append(request)

    def schedule(self) -> Batch:
        """The next step; changes nothing but admissions. Every running request that can go on is in it."""
        ops, self._pending = self._pending, []
        ops += self._admit()
        decoding = [r for r in self.running if not r.is_prefill]
        prefilling = [r for r in self.running if r.is_prefill]
        budget = (self._mixed_batch_tokens if decoding else self._max_batch_tokens) - len(decoding)
        planned = [(r, 1) for r in decoding]
        for request in prefilling:
            count = min(request.num_uncomputed_tokens, budget)
            if count > 0:
                planned.append((request, count))
                budget -= count
        planned.sort(key=lambda p: self._slot_index(p[0]))  # llama.cpp joins neighbouring streams only in ascending order
        self._scheduled = [r for r, _ in planned]
        return Batch(tuple(self._chunk(r, n) for r, n in planned), tuple(ops))

    def _admit(self) -> list[SlotOp]:
        ops: list[SlotOp] = []
        while self.waiting and self._cache.num_free:
            request = self.waiting.popleft()
            slot, cached, slot_ops = self._cache.acquire(request.tokens)
            ops += slot_ops
            ops.append(Open(slot.index, request.sampling, request.tokens))
            request.start(slot.index, cached)
            self.running.append(request)
        return ops

    @staticmethod
    def _slot_index(request: Request) -> int:
        assert request.slot is not None
        return request.slot

    def _slot(self, request: Request) -> Slot:
        return self._cache.slots[self._slot_index(request)]

    def _chunk(self, request: Request, count: int) -> Chunk:
        start = request.num_computed_tokens
        return Chunk(self._slot_index(request), start, request.tokens[start : start + count], sample=start + count == len(request.tokens))

    def update(self, batch: Batch, output: StepOutput) -> list[Request]:
        """Take in what the step gave. Returns the requests that have news, finished ones included."""
        now = time.perf_counter()
        if output.no_room or output.error:
            return self._fail(batch, output)
        news, faults = [], dict(output.faults)
        for request, chunk, token, resident in zip(self._scheduled, batch.chunks, output.tokens, output.resident, strict=True):
            slot = self._slot(request)
            slot.tokens[chunk.start :] = chunk.tokens
            del slot.tokens[resident:]  # fewer than asked after an interrupt
            request.num_computed_tokens = resident
            if chunk.slot in faults:
                news.append(request)
                request.error = faults[chunk.slot]
                self._finish(request, FinishReason.ERROR)
                continue
            if token is None:
                continue
            news.append(request)
            if self._is_end(token) and not request.sampling.ignore_eos:
                self._finish(request, FinishReason.STOP)
                continue
            request.append(token, now)
            if request.detokenizer.stopped:
                self._finish(request, FinishReason.STOP)
            elif request.num_output_tokens >= request.max_tokens or len(request.tokens) >= self._n_ctx:
                self._finish(request, FinishReason.LENGTH)
        return news

    def _fail(self, batch: Batch, output: StepOutput) -> list[Request]:
        """A step that the backend refused: its requests end with an error, their slots are emptied; the others go on."""
        failed = list(self._scheduled)
        if output.no_room and len(failed) > 1:
            failed = [max(failed, key=lambda r: r.started_at or 0.0)]  # the youngest makes room
        for request in failed:
            slot = self._slot(request)
            slot.tokens.clear()
            self._pending.append(Truncate(slot.index, 0))
            self._finish(request, FinishReason.ERROR)
        return failed

    def abort(self, request_ids: Iterable[str]) -> list[Request]:
        """End requests early; unknown ids are ignored. Returns the ended ones."""
        wanted = set(request_ids)
        ended = [r for r in (*self.running, *self.waiting) if r.request_id in wanted]
        for request in ended:
            self._finish(request, FinishReason.ABORT)
        return ended

    def _finish(self, request: Request, reason: FinishReason) -> None:
        request.finish(reason)
        if request.slot is None:
            self.waiting.remove(request)
        else:
            self.running.remove(request)
            self._cache.release(self._slot(request))
