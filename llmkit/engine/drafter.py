"""Drafts by a second, smaller model with the same vocabulary. Engine thread only.

It has its own runner with the same slots, and follows the tokens of the streams that request
drafts: what it has not seen it computes first, what was rejected it cuts off. All streams that
request a draft in a step share its batches. It drafts greedily, and stops where it is unsure.
"""

from __future__ import annotations

import contextlib
import math
import time
from contextlib import AbstractContextManager

from llmkit.engine.batch import Batch, Chunk, Open, SlotOp, StepOutput, Truncate
from llmkit.engine.runner import ModelRunner
from llmkit.engine.slots import common_prefix
from llmkit.protocol import SamplingParams
from llmkit.system.reporting import report

__all__ = ["ModelDrafter"]

MIN_LOGPROB = math.log(0.4)  # of a drafted token
SMOOTHING = 0.2
CATCH_UP_TOKENS = 64  # prompt tokens per step
FIRST_STEP_S = 0.005  # until measured


class ModelDrafter:
    """Drafts through ``runner``, whose model must be able to truncate its sequences."""

    def __init__(
        self, runner: ModelRunner, turns: AbstractContextManager[None] | None = None
    ) -> None:
        self._runner = runner
        self._turns = turns or contextlib.nullcontext()
        self._tokens: list[list[int]] = [[] for _ in range(runner.n_slots)]
        self._broken = False
        self.step_s = FIRST_STEP_S  # cost of one more drafted token in all requesting streams
        self.seconds = 0.0  # computing time in total
        greedy = SamplingParams(temperature=0, logprobs=0)
        runner.execute(
            Batch((), tuple(Open(slot, slot + 1, greedy, ()) for slot in range(runner.n_slots)))
        )

    def propose(self, wanted: list[tuple[int, list[int], int]]) -> dict[int, list[int]]:
        """``wanted``: (slot, its tokens, maximum draft). Returns drafts by slot; none for a slot
        still catching up."""
        if self._broken:
            return {}
        with self._turns:
            return self._propose(wanted)

    def missing(self, slot: int, tokens: list[int]) -> int:
        """How many tokens it must compute before it can draft for the slot."""
        return len(tokens) - common_prefix(self._tokens[slot], tokens, len(tokens))

    def interrupt(self) -> None:
        """From any thread: cut its computation short."""
        self._runner.interrupt()

    def _propose(self, wanted: list[tuple[int, list[int], int]]) -> dict[int, list[int]]:
        began = time.perf_counter()
        self._runner.clear_interrupt()
        limits = {slot: limit for slot, _, limit in wanted}
        guesses = self._sure(self._catch_up(wanted))
        drafts = {slot: [token] for slot, token in guesses.items()}
        while guesses := {
            slot: token for slot, token in guesses.items() if len(drafts[slot]) < limits[slot]
        }:
            start = time.perf_counter()
            chunks = [
                Chunk(slot, len(self._tokens[slot]), [token], True)
                for slot, token in sorted(guesses.items())
            ]
            guesses = self._sure(self._run(chunks, []))
            self.step_s += SMOOTHING * (time.perf_counter() - start - self.step_s)
            for slot, token in guesses.items():
                drafts[slot].append(token)
        self.seconds += time.perf_counter() - began
        return drafts

    def _catch_up(self, wanted: list[tuple[int, list[int], int]]) -> dict[int, tuple[int, float]]:
        """Compute tokens of the streams that this model has not seen; few at a time, since the
        streams wait."""
        chunks: list[Chunk] = []
        ops: list[SlotOp] = []
        room = max(CATCH_UP_TOKENS, len(wanted))
        for slot, tokens, _ in sorted(wanted):
            seen = self._tokens[slot]
            shared = common_prefix(seen, tokens, len(tokens) - 1)
            if shared < len(seen):
                ops.append(Truncate(slot, shared))
                del seen[shared:]
            part = tokens[shared : shared + max(room, 0)]
            if part:
                room -= len(part)
                chunks.append(Chunk(slot, shared, part, shared + len(part) == len(tokens)))
        return self._run(chunks, ops)

    def _run(self, chunks: list[Chunk], ops: list[SlotOp]) -> dict[int, tuple[int, float]]:
        """The likeliest token after each sampling chunk, and its log-probability."""
        output: StepOutput = self._runner.execute(Batch(tuple(chunks), tuple(ops)))
        if output.error or output.no_room or output.faults:
            # A failing draft model is disabled; streams continue without drafts.
            self._broken = True
            reason = output.error or output.faults or "no room"
            report(f"the draft model failed and is now disabled: {reason}")
            return {}
        likeliest = {}
        for i, chunk in enumerate(chunks):
            seen = self._tokens[chunk.slot]
            seen.extend(chunk.tokens)
            del seen[output.resident[i] :]  # fewer after an interrupt
            if output.tokens[i]:
                likeliest[chunk.slot] = (
                    output.tokens[i][0],
                    output.scores[i][0].logprob if output.scores else 0.0,
                )
        return likeliest

    @staticmethod
    def _sure(likeliest: dict[int, tuple[int, float]]) -> dict[int, int]:
        return {
            slot: token for slot, (token, logprob) in likeliest.items() if logprob >= MIN_LOGPROB
        }
