"""Which tokens go into the next step. Engine thread only; pure bookkeeping, the runner carries out
the `Batch`.

Decodes go first: one token per running stream, plus drafts of the next ones. Prompts get what
remains of a step that must hold the inter-token latency. When a request that must go on has no
room, the youngest of the least priority returns to waiting.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

from llmkit.engine import victims
from llmkit.engine.backlog import Backlog
from llmkit.engine.batch import Batch, Chunk, Open, SlotOp, StepOutput
from llmkit.engine.budget import StepClock
from llmkit.engine.drafter import ModelDrafter
from llmkit.engine.encoding import Encoded, Encodings
from llmkit.engine.intake import Intake
from llmkit.engine.prefill import ALIGNMENT, PrefillPlanner
from llmkit.engine.request import Request, slot_of
from llmkit.engine.roster import Roster
from llmkit.engine.slots import PrefixCache, common_prefix
from llmkit.engine.speculation import Speculation
from llmkit.errors import InvalidRequestError
from llmkit.protocol import FinishReason

__all__ = ["Scheduler"]

MIN_FAREWELL_TOKENS = 128  # shorter prefixes are not worth a file at shutdown
# A request waits for another that computes this many tokens of its prompt, to copy them.
MIN_COALESCE_TOKENS = 32
# Requests with the same adapters are computed together, others one after another: how many such
# parts of each step a caller may have to itself.
MAX_OWN_ADAPTERS = 2

Adapters = tuple[tuple[str, float], ...]


class Scheduler:
    """Continuous batching over the slots of one context.

    ``capacity``: tokens that all slots together can hold (None: each slot has its own ``n_ctx``).
    ``deterministic``: every chunk's place and size depend on its request alone. ``max_running``:
    requests computed at once, where that is less than the slots. ``encodings``: of the images and
    sounds in prompts; a request whose next one is not there yet is no work.
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
        max_running: int | None = None,
        on_leave: Callable[[Request], None] = lambda _: None,
        encodings: Encodings | None = None,
    ) -> None:
        self.cache = cache
        self.encodings = encodings or Encodings(None, 0, lambda _: None)
        self.max_running = min(max_running or len(cache.slots), len(cache.slots))
        self._max_batch_tokens = max_batch_tokens
        self._clock = clock
        self._capacity = capacity
        self._prompts = PrefillPlanner(tile, deterministic)
        self._can_coalesce = can_coalesce
        self._can_draft = can_draft and not deterministic
        self._speculation = Speculation(clock, n_ctx, drafter)
        self._deterministic = deterministic
        self.waiting = Backlog(on_leave)
        self._roster = Roster(cache, self.waiting, deterministic=deterministic)
        self.running = self._roster.running
        self._users: dict[Adapters, set[str]] | None = None  # callers by adapters of what runs
        self._pending, self._saving = self._roster.pending, self._roster.saving
        self._scheduled: list[Request] = []
        self._intake = Intake(
            self._roster,
            n_ctx=n_ctx,
            is_end=is_end,
            clock=clock,
            speculation=self._speculation,
            context_shift=context_shift,
        )

    @property
    def has_work(self) -> bool:
        return bool(len(self.waiting)) or self.num_encoding < len(self.running)

    @property
    def num_encoding(self) -> int:
        """Running requests that wait for an image or a sound to be encoded."""
        return sum(map(self.encodings.blocks, self.running))

    @property
    def num_preemptions(self) -> int:
        return self._roster.num_preemptions

    @property
    def num_drafts(self) -> int:
        return self._speculation.num_drafts

    @property
    def num_drafted(self) -> int:
        return self._speculation.num_drafted

    @property
    def num_accepted(self) -> int:
        return self._speculation.num_accepted

    def add(self, request: Request) -> None:
        if request.media:
            request.num_foreseen = self.cache.longest(request.tokens, request.cache_salt)
        self.waiting.add(request)

    def take(self, encoded: Encoded) -> list[Request]:
        """Take in what became of an image or a sound. Returns the requests that its failure
        ended."""
        asked, failed = self.encodings.take(encoded, self.running, self.waiting)
        self._intake.charge_time(asked, encoded.seconds)  # also of one that was aborted
        for request in failed:
            request.error = f"the {encoded.item.kind} could not be encoded: {encoded.result}"
            request.is_refused = isinstance(encoded.result, InvalidRequestError)
            self._roster.finish(request, FinishReason.ERROR)
        return failed

    def schedule(self) -> Batch:
        """The next step. It includes every running stream that can continue."""
        ops = list(self._pending)
        self._pending.clear()
        ops += self._admit()
        ops += self._make_room()
        self.encodings.advance(self.running, self.waiting)
        able = [
            r
            for r in self.running
            if r not in self._saving and not r.is_held and not self.encodings.blocks(r)
        ]
        decoding = [r for r in able if not r.is_prefill]
        prefilling = [r for r in able if r.is_prefill]
        for request in prefilling:
            if request.lookup is not None:
                request.lookup.index(request.tokens, request.num_computed_tokens)
        most = self._max_batch_tokens
        room = most - len(decoding)
        if self._capacity is not None:
            most = min(most, self._capacity - self.cache.num_tokens - len(decoding))
            room = min(room, most)
        budget = self._clock.prefill_budget(len(decoding)) if decoding else room
        planned: list[tuple[Request, int, list[int]]] = [
            (r, n, []) for r, n in self._prompts.plan(prefilling, room, budget, most)
        ]
        room -= sum(count for _, count, _ in planned)
        # Drafts are for steps without prompts, which already use up the step's time.
        limit = 0 if planned or not self._can_draft else room // max(len(decoding), 1)
        drafts = self._speculation.guess(decoding, limit)
        planned += [(r, 1, drafts.get(slot_of(r), [])) for r in decoding]
        if not planned and able and not self._saving:
            # No room at all: schedule one token, or image, and let the runner report it.
            item = able[0].item
            planned = [(able[0], item.n_tokens if item is not None and item.whole else 1, [])]
        # llama.cpp joins neighbouring streams only in ascending order.
        planned.sort(key=lambda p: slot_of(p[0]))
        self._scheduled = [r for r, _, _ in planned]
        return Batch(tuple(self._chunk(*p) for p in planned), tuple(ops))

    def _chunk(self, request: Request, count: int, draft: list[int]) -> Chunk:
        start = request.num_computed_tokens
        end = start + count
        last = end == len(request.tokens)
        item = request.item
        targets = (
            request.tokens[start + 1 : min(end, request.num_prompt_tokens - 1) + 1]
            if request.scores_prompt
            else ()
        )
        return Chunk(
            slot_of(request),
            start,
            request.tokens[start:end] + draft,
            last and request.max_tokens > 0,
            len(draft),
            targets,
            request.offset,
            item,
            self.encodings.of(item),
        )

    def _admit(self) -> list[SlotOp]:
        ops: list[SlotOp] = []
        self._users = None
        while len(self.waiting):
            if self._has_slot or self._may_preempt():
                request = self.waiting.first(self._ready)
            elif (shares := victims.shares(self.running)) and max(shares.values()) > 1:
                request = self.waiting.first(partial(self._ready_without, shares, {}))
            else:
                break
            if request is None:
                break
            # Victims give way to this request, not to whichever is first afterwards.
            while not self._has_slot or not self._has_room(request):
                victim = self._roster.victim(above=request.priority) or victims.of_a_larger_share(
                    self.running, request, self.waiting.service, self._saving
                )
                if victim is None:
                    return ops
                ops += self._roster.preempt(victim)
            self.waiting.remove(request)
            self.cache.unpin(request.parked_key)
            ops += self._room_for(request)
            slot, cached, slot_ops = self.cache.acquire(
                request.tokens, request.cache_salt, reuse=not request.scores_prompt
            )
            ops += slot_ops
            if self._deterministic:
                slot.shareable = request.num_prompt_tokens - request.num_prompt_tokens % ALIGNMENT
                ops += self.cache.cut(slot, min(cached - cached % ALIGNMENT, slot.shareable))
                cached = len(slot.tokens)
            ops.append(
                Open(
                    slot.index,
                    request.serial,
                    request.sampling,
                    request.tokens,
                    request.constraint,
                    request.adapters,
                    request.sampler,
                )
            )
            self.waiting.charge(request, num_prompt=len(request.tokens) - cached)
            request.start(slot.index, cached)
            self.running.append(request)
            self._users = None
        return ops

    def _ready_without(
        self, shares: dict[str, int], due: dict[tuple[str, float], bool], request: Request
    ) -> bool:
        """Whether a request may take a slot of another caller; ``due`` is for each caller and
        weight, since a caller may have thousands that wait."""
        if request.caller in shares:
            return False
        key = request.caller, request.weight
        if key not in due:
            due[key] = any(
                shares[r.caller] > 1 and victims.is_due(request, r, self.waiting.service)
                for r in self.running
            )
        return due[key] and self._ready(request)

    @property
    def _has_slot(self) -> bool:
        return bool(self.cache.num_free) and len(self.running) < self.max_running

    def _ready(self, request: Request) -> bool:
        """False while a running request computes a good part of this one's prompt, which can be
        copied once it is done, and while its adapters would split the step once more."""
        if self._splits(request):
            return False
        if request.waits_for is not None:
            leader, length = request.waits_for
            if (
                leader.slot is not None
                and leader.finish_reason is None
                and not leader.is_shifted
                and leader.num_computed_tokens < length
            ):
                return False
            request.waits_for = None
        if not self._can_coalesce or request.scores_prompt:
            return True
        prompt = request.tokens
        for leader in self.running:
            if (
                leader.cache_salt == request.cache_salt
                and leader.num_uncomputed_tokens >= MIN_COALESCE_TOKENS
            ):
                shared = common_prefix(leader.tokens, prompt, len(prompt) - 1)
                gain = shared - leader.num_computed_tokens
                if (
                    gain >= MIN_COALESCE_TOKENS
                    and shared - self.cache.longest(prompt, request.cache_salt)
                    >= MIN_COALESCE_TOKENS
                ):
                    request.waits_for = (leader, shared)
                    return False
        return True

    def _splits(self, request: Request) -> bool:
        """Whether one more part of each step would be needed, by adapters that nobody else uses,
        for a caller that has as many as it may."""
        if self._users is None:
            self._users = {}
            for other in self.running:
                self._users.setdefault(other.adapters, set()).add(other.caller)
        if not self._users or request.adapters in self._users:
            return False
        own = sum(callers == {request.caller} for callers in self._users.values())
        return own >= MAX_OWN_ADAPTERS

    def _has_room(self, request: Request) -> bool:
        """Where all slots share one buffer: whether the prompt fits beside what runs. Future output
        is not reserved."""
        if self._capacity is None or not self.running:
            return True
        return sum(len(r.tokens) for r in self.running) + len(request.tokens) < self._capacity

    def _room_for(self, request: Request) -> list[SlotOp]:
        """Where all slots share one buffer: evict idle prefixes before a restored one comes in."""
        ops: list[SlotOp] = []
        while (
            self._capacity is not None
            and self._capacity - self.cache.num_tokens < len(request.tokens)
            and (idle := self.cache.oldest_idle()) is not None
        ):
            ops += self.cache.evict(idle)
        return ops

    def _may_preempt(self) -> bool:
        return max(r.priority for r in self.running) > self.waiting.most_urgent

    def _make_room(self) -> list[SlotOp]:
        """Where all slots share one buffer: evict idle prefixes, then preempt requests, until every
        stream has room for a token."""
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
            elif (
                room < max(decoding, 1)
                and len(self.running) > 1
                and (victim := self._roster.victim()) is not None
            ):
                ops += self._roster.preempt(victim)
            else:
                return ops

    def update(self, batch: Batch, output: StepOutput) -> list[Request]:
        """Take in a step's output. Returns the requests with news, finished ones included."""
        return self._intake.update(self._scheduled, batch, output)

    def displace(self, caller: str) -> list[Request]:
        """Refuse the caller's newest request that has not run yet. Returns it, if there is one."""
        request = self.waiting.newest(caller)
        if request is not None:
            self._roster.finish(request, FinishReason.ERROR)
        return [] if request is None else [request]

    def abort(self, request_ids: Iterable[str]) -> list[Request]:
        """End requests early; unknown ids are ignored. Returns the ended ones."""
        wanted = set(request_ids)
        ended = [r for r in (*self.running, *self.waiting) if r.request_id in wanted]
        for request in ended:
            self._roster.finish(request, FinishReason.ABORT)
        return ended

    def farewell(self) -> list[SlotOp]:
        """At shutdown: the operations that save idle prefixes to disk."""
        return [
            op
            for slot in self.cache.slots
            if len(slot.tokens) >= MIN_FAREWELL_TOKENS
            for op in self.cache.park(slot, save=True)
        ]
