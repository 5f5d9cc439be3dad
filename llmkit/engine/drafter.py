"""Guesses by a second, smaller model of the same vocabulary. Engine thread only.

It has a runner of its own with the same slots, and follows the tokens of the streams that ask: what it has not seen yet it computes first, what was rejected
is cut off. All streams that ask in a step are guessed for together. It guesses its own favourites, and stops where it is not sure.
"""

from __future__ import annotations

import contextlib
import math
import time
from contextlib import AbstractContextManager

from llmkit.engine.batch import Batch, Chunk, Open, SlotOp, StepOutput, Truncate
from llmkit.engine.runner import ModelRunner
from llmkit.engine.slots import common_prefix
from llmkit.reporting import report
from llmkit.types import SamplingParams

__all__ = ["ModelDrafter"]

MIN_LOGPROB = math.log(0.4)  # of a guess
SMOOTHING = 0.2
CATCH_UP_TOKENS = 64  # of prompts, in one step
FIRST_STEP_S = 0.005  # until it is measured


class ModelDrafter:
    """Proposes through ``runner``, whose model must be able to cut its sequences back."""

    def __init__(self, runner: ModelRunner, turns: AbstractContextManager[None] | None = None) -> None:
        self._runner = runner
        self._turns = turns or contextlib.nullcontext()
        self._held: list[list[int]] = [[] for _ in range(runner.n_slots)]
        self._broken = False
        self.step_s = FIRST_STEP_S  # what one more guess costs, for all streams that ask
        self.seconds = 0.0  # spent computing, in all
        greedy = SamplingParams(temperature=0, logprobs=0)
        runner.execute(Batch((), tuple(Open(slot, slot + 1, greedy, ()) for slot in range(runner.n_slots))))

    def propose(self, wanted: list[tuple[int, list[int], int]]) -> dict[int, list[int]]:
        """``wanted`` has slots, the tokens there and how many may be guessed. Returns guesses by slot; none for one that it has yet to catch up with."""
        if self._broken:
            return {}
        with self._turns:
            return self._propose(wanted)

    def missing(self, slot: int, tokens: list[int]) -> int:
        """How many tokens it would have to compute before it can guess."""
        return len(tokens) - common_prefix(self._held[slot], tokens, len(tokens))

    def interrupt(self) -> None:
        """From any thread: end what it computes."""
        self._runner.interrupt()

    def _propose(self, wanted: list[tuple[int, list[int], int]]) -> dict[int, list[int]]:
        began = time.perf_counter()
        self._runner.clear_interrupt()
        most = {slot: limit for slot, _, limit in wanted}
        guesses = self._sure(self._catch_up(wanted))
        found = {slot: [token] for slot, token in guesses.items()}
        while guesses := {slot: token for slot, token in guesses.items() if len(found[slot]) < most[slot]}:
            start = time.perf_counter()
            chunks = [Chunk(slot, len(self._held[slot]), [token], True) for slot, token in sorted(guesses.items())]
            guesses = self._sure(self._run(chunks, []))
            self.step_s += SMOOTHING * (time.perf_counter() - start - self.step_s)
            for slot, token in guesses.items():
                found[slot].append(token)
        self.seconds += time.perf_counter() - began
        return found

    def _catch_up(self, wanted: list[tuple[int, list[int], int]]) -> dict[int, tuple[int, float]]:
        """Compute what the streams have that this model has not seen: little at a time, since the streams wait for it."""
        chunks: list[Chunk] = []
        ops: list[SlotOp] = []
        room = max(CATCH_UP_TOKENS, len(wanted))
        for slot, tokens, _ in sorted(wanted):
            held = self._held[slot]
            shared = common_prefix(held, tokens, len(tokens) - 1)
            if shared < len(held):
                ops.append(Truncate(slot, shared))
                del held[shared:]
            part = tokens[shared : shared + max(room, 0)]
            if part:
                room -= len(part)
                chunks.append(Chunk(slot, shared, part, shared + len(part) == len(tokens)))
        return self._run(chunks, ops)

    def _run(self, chunks: list[Chunk], ops: list[SlotOp]) -> dict[int, tuple[int, float]]:
        """The favourite after each chunk that asks for one, and its log-probability."""
        output: StepOutput = self._runner.execute(Batch(tuple(chunks), tuple(ops)))
        if output.error or output.no_room or output.faults:
            self._broken = True  # a failing draft model is disabled; streams continue without drafts
            report(f"the draft model failed and is not asked any more: {output.error or output.faults or 'no room'}")
            return {}
        found = {}
        for i, chunk in enumerate(chunks):
            held = self._held[chunk.slot]
            held.extend(chunk.tokens)
            del held[output.resident[i] :]  # fewer after an interrupt
            if output.tokens[i]:
                found[chunk.slot] = (output.tokens[i][0], output.scores[i][0].logprob if output.scores else 0.0)
        return found

    @staticmethod
    def _sure(found: dict[int, tuple[int, float]]) -> dict[int, int]:
        return {slot: token for slot, (token, logprob) in found.items() if logprob >= MIN_LOGPROB}
