"""Which tokens go into the next step. Engine thread only; pure bookkeeping, the runner does what the `Batch` says.

Decodes go first, one token for each running stream and what is guessed of the next ones; prompts get what is left of a step that is to hold the
inter-token latency. When there is no room for a request that must go on, the youngest one of the least priority waits and comes back later.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from functools import partial

from llmkit.engine import victims
from llmkit.engine.backlog import Backlog
from llmkit.engine.batch import Batch, Chunk, Close, Open, Park, Score, Shift, SlotOp, StepOutput, Truncate
from llmkit.engine.budget import StepClock
from llmkit.engine.drafter import ModelDrafter
from llmkit.engine.prefill import ALIGNMENT, PrefillPlanner
from llmkit.engine.request import Request, slot_of
from llmkit.engine.slots import PrefixCache, Slot, common_prefix
from llmkit.engine.speculation import Speculation
from llmkit.types import FinishReason

__all__ = ["Scheduler"]

MIN_FAREWELL_TOKENS = 128  # shorter prefixes are not worth a file at the end
# A request waits for another that computes this many tokens of its prompt, rather than compute them as well.
MIN_COALESCE_TOKENS = 32


class Scheduler:
    """Continuous batching over the slots of one context.

    ``capacity`` is the number of tokens that all slots together can hold (None: each slot has its own ``n_ctx``). ``deterministic`` makes every chunk's
    place and size depend on its request alone.
    """

    def __init__(
        self,
        cache: PrefixCache,
        *,
        n_ctx: int,
        max_batch_tokens: int,
        is_end: Callable[[int], bool],
        clock: StepClock,
        capacity: int | None = None,
        tile: int = 1,
        can_coalesce: bool = True,
        can_draft: bool = True,
        deterministic: bool = False,
        drafter: ModelDrafter | None = None,
        context_shift: bool = False,
        on_leave: Callable[[Request], None] = lambda _: None,
    ) -> None:
        self.cache = cache
        self._n_ctx = n_ctx
        self._max_batch_tokens = max_batch_tokens
        self._is_end = is_end
        self._clock = clock
        self._capacity = capacity
        self._prompts = PrefillPlanner(tile, deterministic)
        self._can_coalesce = can_coalesce
        self._can_draft = can_draft and not deterministic
        self._speculation = Speculation(clock, n_ctx, drafter)
        self._deterministic = deterministic
        self._context_shift = context_shift
        self.waiting = Backlog(on_leave)
        self.running: list[Request] = []
        self.num_preemptions = 0
        self._pending: list[SlotOp] = []
        self._scheduled: list[Request] = []
        self._saving: list[Request] = []

    @property
    def has_work(self) -> bool:
        return bool(len(self.waiting) or self.running)

    @property
    def num_drafted(self) -> int:
        return self._speculation.num_drafted

    @property
    def num_accepted(self) -> int:
        return self._speculation.num_accepted

    def add(self, request: Request) -> None:
        self.waiting.add(request)

    def schedule(self) -> Batch:
        """The next step. Every running stream that can go on is in it."""
        ops, self._pending = self._pending, []
        ops += self._admit()
        ops += self._make_room()
        able = [r for r in self.running if r not in self._saving and not r.is_held]
        decoding = [r for r in able if not r.is_prefill]
        prefilling = [r for r in able if r.is_prefill]
        for request in prefilling:
            if request.lookup is not None:
                request.lookup.index(request.tokens, request.num_computed_tokens)
        room = self._max_batch_tokens - len(decoding)
        if self._capacity is not None:
            room = min(room, self._capacity - self.cache.num_tokens - len(decoding))
        budget = self._clock.prefill_budget(len(decoding)) if decoding else room
        planned: list[tuple[Request, int, list[int]]] = [(r, n, []) for r, n in self._prompts.plan(prefilling, room, budget)]
        room -= sum(count for _, count, _ in planned)
        # Guesses are for steps without prompts: with them the step's time is spent already.
        most = 0 if planned or not self._can_draft else room // max(len(decoding), 1)
        guesses = self._speculation.guess(decoding, most)
        planned += [(r, 1, guesses.get(slot_of(r), [])) for r in decoding]
        if not planned and able and not self._saving:  # no room at all: schedule one token and let the runner report it
            planned = [(able[0], 1, [])]
        planned.sort(key=lambda p: slot_of(p[0]))  # llama.cpp joins neighbouring streams only in ascending order
        self._scheduled = [r for r, _, _ in planned]
        return Batch(tuple(self._chunk(*p) for p in planned), tuple(ops))

    def _slot(self, request: Request) -> Slot:
        return self.cache.slots[slot_of(request)]

    def _chunk(self, request: Request, count: int, draft: list[int]) -> Chunk:
        start = request.num_computed_tokens
        end = start + count
        last = end == len(request.tokens)
        targets = request.tokens[start + 1 : min(end, request.num_prompt_tokens - 1) + 1] if request.scores_prompt else ()
        return Chunk(slot_of(request), start, request.tokens[start:end] + draft, last and request.max_tokens > 0, len(draft), targets)

    def _admit(self) -> list[SlotOp]:
        ops: list[SlotOp] = []
        while len(self.waiting):
            if self.cache.num_free or self._may_preempt():
                request = self.waiting.first(self._ready)
            elif (shares := victims.shares(self.running)) and max(shares.values()) > 1:
                request = self.waiting.first(partial(self._ready_without, shares))
            else:
                break
            if request is None:
                break
            while not self.cache.num_free or not self._has_room(request):  # who leaves does so for this request, not for whoever comes first then
                victim = self._victim(above=request.priority) or victims.of_a_larger_share(self.running, request, self._saving)
                if victim is None:
                    return ops
                ops += self._preempt(victim)
            self.waiting.remove(request)
            self.cache.unpin(request.parked_key)
            ops += self._room_for(request)
            slot, cached, slot_ops = self.cache.acquire(request.tokens, request.cache_salt, reuse=not request.scores_prompt)
            ops += slot_ops
            if self._deterministic:
                slot.shareable = request.num_prompt_tokens - request.num_prompt_tokens % ALIGNMENT
                ops += self.cache.cut(slot, min(cached - cached % ALIGNMENT, slot.shareable))
                cached = len(slot.tokens)
            ops.append(Open(slot.index, request.serial, request.sampling, request.tokens, request.constraint, request.adapters, request.sampler))
            self.waiting.charge(request, num_prompt=len(request.tokens) - cached)
            request.start(slot.index, cached)
            self.running.append(request)
        return ops

    def _ready_without(self, shares: dict[str, int], request: Request) -> bool:
        return request.caller not in shares and self._ready(request)

    def _ready(self, request: Request) -> bool:
        """False while a running request computes a good part of this one's prompt: once that is done, it can be copied."""
        if request.waits_for is not None:
            leader, length = request.waits_for
            if leader.slot is not None and leader.finish_reason is None and not leader.is_shifted and leader.num_computed_tokens < length:
                return False
            request.waits_for = None
        if not self._can_coalesce or request.scores_prompt:
            return True
        prompt = request.tokens
        for leader in self.running:
            if leader.cache_salt == request.cache_salt and leader.num_uncomputed_tokens >= MIN_COALESCE_TOKENS:
                shared = common_prefix(leader.tokens, prompt, len(prompt) - 1)
                gain = shared - leader.num_computed_tokens
                if gain >= MIN_COALESCE_TOKENS and shared - self.cache.longest(prompt, request.cache_salt) >= MIN_COALESCE_TOKENS:
                    request.waits_for = (leader, shared)
                    return False
        return True

    def _has_room(self, request: Request) -> bool:
        """Where all slots share one buffer: the prompt fits beside what runs. What will be generated is not reserved."""
        if self._capacity is None or not self.running:
            return True
        return sum(len(r.tokens) for r in self.running) + len(request.tokens) < self._capacity

    def _room_for(self, request: Request) -> list[SlotOp]:
        """Where all slots share one buffer: idle prefixes give way before a restored one comes in."""
        ops: list[SlotOp] = []
        while self._capacity is not None and self._capacity - self.cache.num_tokens < len(request.tokens) and (idle := self.cache.oldest_idle()) is not None:
            ops += self.cache.evict(idle)
        return ops

    def _may_preempt(self) -> bool:
        return max(r.priority for r in self.running) > self.waiting.most_urgent

    def _victim(self, above: int | None = None) -> Request | None:
        return victims.youngest([r for r in self.running if r not in self._saving], above)

    def _preempt(self, request: Request) -> list[SlotOp]:
        """Back to waiting. What it has computed is parked outside the context if there is room (a copy of 35 MB takes 4 ms, its 1,500 tokens some
        seconds), else it will be computed again."""
        slot = self._slot(request)
        if self._deterministic:
            ops = self._cut_inexact(request, slot)
        elif request.is_shifted:  # llama.cpp moves the positions at once and the keys at the next decode: a copy from in between would be wrong
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

    def _make_room(self) -> list[SlotOp]:
        """Where all slots share one buffer: idle prefixes go first, then requests, until every stream has room for a token."""
        ops: list[SlotOp] = []
        if self._capacity is None:
            return ops
        while True:
            decoding = sum(not r.is_prefill for r in self.running)
            wanted = min(sum(r.num_uncomputed_tokens for r in self.running), self._max_batch_tokens)
            room = self._capacity - self.cache.num_tokens
            idle = self.cache.oldest_idle()
            if room < wanted and idle is not None:
                ops += self.cache.evict(idle)
            elif room < max(decoding, 1) and len(self.running) > 1 and (victim := self._victim()) is not None:
                ops += self._preempt(victim)
            else:
                return ops

    def update(self, batch: Batch, output: StepOutput) -> list[Request]:
        """Take in what the step gave. Returns the requests that have news, finished ones included."""
        now = time.perf_counter()
        for key in output.lost:
            self.cache.parked.pop(key, None)
        self._empty_broken(output.broken)
        news, self._saving = list(self._saving), []
        for request in news:
            if request.parked_key in output.lost:
                request.error = "its prefix could not be saved (a warning says why)"
            self._finish(request, FinishReason.ERROR if request.error else FinishReason.LENGTH)
        if output.no_room or output.error:
            return news + self._fail(output)
        faults = dict(output.faults)
        for slot_index in output.emptied:
            self.cache.slots[slot_index].tokens.clear()
        for i, (request, chunk) in enumerate(zip(self._scheduled, batch.chunks, strict=True)):
            slot, resident, tokens = self._slot(request), output.resident[i], output.tokens[i]
            if chunk.slot in output.broken:
                continue
            if chunk.slot not in output.emptied:
                slot.tokens[chunk.start :] = chunk.tokens
            del slot.tokens[resident:]  # fewer than asked after an interrupt or a rejected draft
            request.num_computed_tokens = resident
            if not request.is_shifted:
                request.num_cached_tokens = min(request.num_cached_tokens, resident)  # less where a parked prefix was lost
            request.is_late = chunk.slot in output.late
            if request.is_late:  # where nothing can be cut off, more than the last token is computed again
                self.waiting.charge(request, num_prompt=max(0, chunk.start + len(chunk.tokens) - 1 - resident))
            if request.constraint is not None:
                self._charge_time(request, request.constraint.take_seconds())
            if chunk.slot in faults:
                request.error, request.is_refused = faults[chunk.slot], chunk.slot in output.refused
                self._finish(request, FinishReason.ERROR)
                news.append(request)
                continue
            if chunk.targets and output.prompt_scores and output.prompt_scores[i]:
                request.add_prompt_scores(chunk.start, output.prompt_scores[i])
            elif chunk.targets:  # computed in part, without its scores: once more
                self._pending += self.cache.cut(slot, chunk.start)
                request.num_computed_tokens = len(slot.tokens)
            if chunk.draft and not output.interrupted and not request.is_late:
                self._speculation.learn(request, chunk.draft, len(tokens) - 1)
            request.forced = output.forced[i] if output.forced else ()
            if tokens or self._is_done_without_output(request):
                news.append(request)
                self._append(request, tokens, output.scores[i] if output.scores else (), now)
        return news

    def _charge_time(self, request: Request, seconds: float) -> None:
        """Time that others' steps had to share with this one's grammar, in tokens."""
        if seconds > 0:
            self.waiting.charge(request, num_output=round(seconds / self._clock.decode_s(1)))

    def _empty_broken(self, broken: Iterable[int]) -> None:
        """Slots whose restored or copied prefix was lost: their requests begin again."""
        for index in broken:
            self.cache.slots[index].tokens.clear()
            for request in self.running:
                if request.slot == index:
                    request.num_computed_tokens = request.num_cached_tokens = 0

    def _is_done_without_output(self, request: Request) -> bool:
        return request.max_tokens == 0 and request.num_uncomputed_tokens == 0

    def _append(self, request: Request, tokens: Iterable[int], scores: Iterable[Score], now: float) -> None:
        scored = iter(scores)
        for token in tokens:
            if self._is_end(token) and not request.sampling.ignore_eos:
                self._finish(request, FinishReason.STOP)
                return
            request.append(token, now, next(scored, None))
            self.waiting.charge(request, num_output=1)
            if request.detokenizer.stopped:
                self._finish(request, FinishReason.STOP)
                return
            if request.is_repeating:
                self._finish(request, FinishReason.REPETITION)
                return
            full = len(request.tokens) >= self._n_ctx
            if request.num_output_tokens >= request.max_tokens or (full and not self._context_shift):
                self._finish(request, FinishReason.LENGTH)
                return
            if full:
                self._shift(request)
        if self._is_done_without_output(request):
            if request.keep_on_disk:
                ops = self.cache.park(self._slot(request), save=True)
                request.parked_key = next((op.key for op in ops if isinstance(op, Park)), None)
                self._pending += ops
                self._saving.append(request)
            else:
                self._finish(request, FinishReason.LENGTH)

    def _shift(self, request: Request) -> None:
        """Make room in a full context: keep the beginning of the prompt, and the newer half of the rest."""
        keep = min(len(request.tokens) // 2, request.num_prompt_tokens)
        discard = (len(request.tokens) - keep) // 2
        slot = self._slot(request)
        self._pending.append(Shift(slot.index, keep, discard))
        del slot.tokens[keep : keep + discard]
        request.shift(keep, discard)
        slot.salt = request.cache_salt

    def _fail(self, output: StepOutput) -> list[Request]:
        """A step that the backend refused. Without room, idle prefixes and then the youngest request give way, and the step is tried again. After an error
        its requests end, and their slots are emptied; the others go on."""
        if output.no_room:
            idle = self.cache.oldest_idle()
            if idle is not None:
                self._pending += self.cache.evict(idle)
                return []
            victim = self._victim() if len(self.running) > 1 else None
            if victim is not None:
                slot = self._slot(victim)
                self._pending += self._preempt(victim)
                self._pending += self.cache.evict(slot)
                return []
        failed = [r for r in self._scheduled if r.slot is not None]
        for request in failed:
            slot = self._slot(request)
            slot.tokens.clear()
            self._pending.append(Truncate(slot.index, 0))
            self._finish(request, FinishReason.ERROR)
        return failed

    def displace(self, caller: str) -> list[Request]:
        """Refuse the newest request of a caller that has not run yet. Returns it, if there is one."""
        request = self.waiting.newest(caller)
        if request is not None:
            self._finish(request, FinishReason.ERROR)
        return [] if request is None else [request]

    def abort(self, request_ids: Iterable[str]) -> list[Request]:
        """End requests early; unknown ids are ignored. Returns the ended ones."""
        wanted = set(request_ids)
        ended = [r for r in (*self.running, *self.waiting) if r.request_id in wanted]
        for request in ended:
            self._finish(request, FinishReason.ABORT)
        return ended

    def _finish(self, request: Request, reason: FinishReason) -> None:
        request.finish(reason)
        self._pending.append(Close(request.serial))
        if request.slot is None:
            self.cache.unpin(request.parked_key)
            self.waiting.remove(request)
        else:
            slot = self._slot(request)
            if self._deterministic:
                self._pending += self._cut_inexact(request, slot)
            if request.is_shifted:
                self._pending += self.cache.cut(slot, 0)  # of no use to anybody
            self.running.remove(request)
            if request in self._saving:
                self._saving.remove(request)
            self.cache.release(slot)
        self.waiting.leave(request)

    def _cut_inexact(self, request: Request, slot: Slot) -> list[SlotOp]:
        """For others only what was computed in whole chunks is exactly what they would compute."""
        return self.cache.cut(slot, min(len(slot.tokens), request.num_prompt_tokens) // ALIGNMENT * ALIGNMENT)

    def farewell(self) -> list[SlotOp]:
        """At the end of the engine: what copies the idle prefixes to disk."""
        return [op for slot in self.cache.slots if len(slot.tokens) >= MIN_FAREWELL_TOKENS for op in self.cache.park(slot, save=True)]
