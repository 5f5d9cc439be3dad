"""Takes in what a step gave: new tokens and scores, what the slots now hold, and who is done.
Engine thread only; knows nothing of how a batch is planned.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence

from llmkit.engine.batch import Batch, Score, Shift, StepOutput, Truncate
from llmkit.engine.budget import StepClock
from llmkit.engine.request import Request
from llmkit.engine.roster import Roster
from llmkit.engine.speculation import Speculation
from llmkit.protocol import FinishReason

__all__ = ["Intake"]


class Intake:
    """Updates the requests and slots of ``roster``; the other arguments are the `Scheduler`'s."""

    def __init__(
        self,
        roster: Roster,
        *,
        n_ctx: int,
        is_end: Callable[[int], bool],
        clock: StepClock,
        speculation: Speculation,
        context_shift: bool,
    ) -> None:
        self._roster = roster
        self._cache, self._waiting = roster.cache, roster.waiting
        self._pending = roster.pending
        self._slot, self._finish = roster.slot, roster.finish
        self._n_ctx = n_ctx
        self._is_end = is_end
        self._clock = clock
        self._speculation = speculation
        self._context_shift = context_shift

    def update(
        self, scheduled: Sequence[Request], batch: Batch, output: StepOutput
    ) -> list[Request]:
        """Take in a step of the ``scheduled`` requests. Returns those with news, finished ones
        included."""
        now = time.perf_counter()
        for key in output.lost:
            self._cache.parked.pop(key, None)
        self._empty_broken(output.broken)
        news = self._finish_saved(output.lost)
        if output.no_room or output.error:
            return news + self._fail(scheduled, output)
        faults = dict(output.faults)
        for slot_index in output.emptied:
            self._cache.slots[slot_index].tokens.clear()
        for i, (request, chunk) in enumerate(zip(scheduled, batch.chunks, strict=True)):
            slot, resident, tokens = self._slot(request), output.resident[i], output.tokens[i]
            if chunk.slot in output.broken:
                continue
            if chunk.slot not in output.emptied:
                slot.tokens[chunk.start :] = chunk.tokens
            del slot.tokens[resident:]  # fewer after an interrupt or a rejected draft
            request.num_computed_tokens = resident
            if not request.is_shifted:  # fewer where a parked prefix was lost
                request.num_cached_tokens = min(request.num_cached_tokens, resident)
            request.is_late = chunk.slot in output.late
            if request.is_late:
                # Where nothing can be truncated, more than the last token is recomputed.
                self._waiting.charge(
                    request, num_prompt=max(0, chunk.start + len(chunk.tokens) - 1 - resident)
                )
            if request.constraint is not None:
                self.charge_time(request, request.constraint.take_seconds())
            if chunk.slot in faults:
                request.error, request.is_refused = faults[chunk.slot], chunk.slot in output.refused
                self._finish(request, FinishReason.ERROR)
                news.append(request)
                continue
            if chunk.targets and output.prompt_scores and output.prompt_scores[i]:
                request.add_prompt_scores(chunk.start, output.prompt_scores[i])
            elif chunk.targets:  # partly computed, without its scores: compute it again
                self._pending += self._cache.cut(slot, chunk.start)
                request.num_computed_tokens = len(slot.tokens)
            if chunk.draft and not output.interrupted and not request.is_late:
                self._speculation.learn(request, chunk.draft, len(tokens) - 1)
            request.forced = output.forced[i] if output.forced else ()
            if tokens or self._is_done_without_output(request):
                news.append(request)
                self._append(request, tokens, output.scores[i] if output.scores else (), now)
        return news

    def _finish_saved(self, lost: Sequence[int]) -> list[Request]:
        """Finish the requests whose prefix this step saved."""
        saved = list(self._roster.saving)
        self._roster.saving.clear()
        for request in saved:
            if request.parked_key in lost:
                request.error = "its prefix could not be saved (a warning says why)"
            self._finish(request, FinishReason.ERROR if request.error else FinishReason.LENGTH)
        return saved

    def charge_time(self, request: Request, seconds: float) -> None:
        """Charge, in tokens, for time that this request's grammar took from others' steps, or one
        of its images from the encoder."""
        if seconds > 0:
            self._waiting.charge(request, num_output=round(seconds / self._clock.decode_s(1)))

    def _empty_broken(self, broken: Iterable[int]) -> None:
        """Slots whose restored or copied prefix was lost: their requests start over."""
        for index in broken:
            self._cache.slots[index].tokens.clear()
            for request in self._roster.running:
                if request.slot == index:
                    request.num_computed_tokens = request.num_cached_tokens = 0

    def _is_done_without_output(self, request: Request) -> bool:
        return request.max_tokens == 0 and request.num_uncomputed_tokens == 0

    def _append(
        self, request: Request, tokens: Iterable[int], scores: Iterable[Score], now: float
    ) -> None:
        scored = iter(scores)
        for token in tokens:
            if self._is_end(token) and not request.sampling.ignore_eos:
                self._finish(request, FinishReason.STOP)
                return
            request.append(token, now, next(scored, None))
            self._waiting.charge(request, num_output=1)
            if request.detokenizer.stopped:
                self._finish(request, FinishReason.STOP)
                return
            if request.is_repeating:
                self._finish(request, FinishReason.REPETITION)
                return
            full = len(request.tokens) >= self._n_ctx
            shifts = self._context_shift and not request.media  # an image's positions stay
            if request.num_output_tokens >= request.max_tokens or (full and not shifts):
                self._finish(request, FinishReason.LENGTH)
                return
            if full:
                self._shift(request)
        if self._is_done_without_output(request) and not (
            request.keep_on_disk and self._roster.save(request)
        ):
            self._finish(request, request.ended_as or FinishReason.LENGTH)

    def _shift(self, request: Request) -> None:
        """Make room in a full context: keep the start of the prompt and the newer half of the
        rest."""
        keep = min(len(request.tokens) // 2, request.num_prompt_tokens)
        discard = (len(request.tokens) - keep) // 2
        slot = self._slot(request)
        self._pending.append(Shift(slot.index, keep, discard))
        del slot.tokens[keep : keep + discard]
        request.shift(keep, discard)
        slot.salt = request.cache_salt

    def _fail(self, scheduled: Sequence[Request], output: StepOutput) -> list[Request]:
        """The backend refused the step. Without room, an idle prefix or else the youngest request
        gives way, and the step is retried. After an error its requests end and their slots are
        emptied; the others continue."""
        if output.no_room:
            idle = self._cache.oldest_idle()
            if idle is not None:
                self._pending += self._cache.evict(idle)
                return []
            victim = self._roster.victim() if len(self._roster.running) > 1 else None
            if victim is not None:
                slot = self._slot(victim)
                self._pending += self._roster.preempt(victim)
                self._pending += self._cache.evict(slot)
                return []
        failed = [r for r in scheduled if r.slot is not None]
        for request in failed:
            slot = self._slot(request)
            slot.tokens.clear()
            self._pending.append(Truncate(slot.index, 0))
            self._finish(request, FinishReason.ERROR)
        return failed
