"""What comes of a decode's logits: sampled tokens, verified drafts and scores. Engine thread only;
knows requests only by their samplers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from llmkit.backend.library import short
from llmkit.backend.patience import Late, Patience
from llmkit.backend.sampler import Sampler, score
from llmkit.backend.sequences import Sequences
from llmkit.engine.batch import Chunk, Score, StepOutput
from llmkit.errors import InvalidRequestError

__all__ = ["Selector"]


class Selector:
    """Chooses tokens from the logits of ``context``, and drops rejected drafts from ``sequences``.

    ``faults``, by slot: why a request failed; shared with the runner.
    """

    def __init__(
        self, context: Any, n_vocab: int, sequences: Sequences, faults: dict[int, str]
    ) -> None:
        self._context = context
        self._n_vocab = n_vocab
        self._sequences = sequences
        self._faults = faults
        self._logits = short("llama_get_logits")

    def logits(self, n_outputs: int) -> np.ndarray:
        """A view of the last decode's logits: float32, shape (n_outputs, n_vocab)."""
        return np.ctypeslib.as_array(self._logits(self._context), (n_outputs, self._n_vocab))

    def select(
        self,
        chunks: Sequence[Chunk],
        rows: list[int],
        output: np.ndarray,
        samplers: Sequence[Sampler | None],
        patience: Patience,
        lost: Sequence[int],
        seconds: float,
    ) -> StepOutput:
        """Sample, verify drafts and score, after a complete decode of ``seconds``.

        ``rows``: each chunk's first batch row; ``output``: which rows have logits; ``samplers``:
        each chunk's; ``lost``: passed on.
        """
        n_outputs = int(output.sum())
        resident = [c.start + len(c.tokens) for c in chunks]
        if not n_outputs:
            return StepOutput(
                [()] * len(chunks),
                resident,
                faults=tuple(self._faults.items()),
                lost=lost,
                backend_s=seconds,
            )
        logits = self.logits(n_outputs)
        place = np.cumsum(output, dtype=np.int32) - 1  # of a batch row among the outputs
        tokens: list[tuple[int, ...]] = []
        scores: list[Sequence[Score]] = []
        prompt_scores: list[Sequence[Score]] = []
        forced: list[Sequence[int]] = []
        late: list[int] = []
        refused: list[int] = []
        for i, (chunk, row, sampler) in enumerate(zip(chunks, rows, samplers, strict=True)):
            num_top = sampler.prompt_logprobs if sampler is not None else 0
            prompt_scores.append(
                [
                    score(logits[place[row + j]], target, num_top)
                    for j, target in enumerate(chunk.targets)
                ]
            )
            if not chunk.sample or sampler is None:
                tokens.append(())
                scores.append(())
                forced.append(())
                continue
            chosen: list[int] = []
            chosen_scores: list[Score] = []
            try:
                chosen, chosen_scores = self._verify(sampler, chunk, row, logits, place, patience)
            except Late:  # nothing is chosen; the token is recomputed once its mask is ready
                late.append(chunk.slot)
            except Exception as error:  # a failed grammar ends only its own request
                self._faults[chunk.slot] = str(error)
                if isinstance(error, InvalidRequestError):
                    refused.append(chunk.slot)
            seconds += sampler.c_seconds
            sampler.c_seconds = 0.0
            if chunk.slot in late and not chosen:
                resident[i] = self._sequences.take_back(chunk)
            elif len(chosen) < 1 + chunk.draft:
                resident[i] = chunk.start + len(chunk.tokens) - (1 + chunk.draft - len(chosen))
                self._sequences.cut(chunk.slot, resident[i] + chunk.offset)
            tokens.append(tuple(chosen))
            scores.append(chosen_scores)
            forced.append(() if chunk.slot in self._faults else sampler.forced)
        return StepOutput(
            tokens,
            resident,
            faults=tuple(self._faults.items()),
            lost=lost,
            late=tuple(late),
            refused=tuple(refused),
            scores=scores,
            prompt_scores=prompt_scores,
            forced=forced,
            backend_s=seconds,
        )

    def _verify(
        self,
        sampler: Sampler,
        chunk: Chunk,
        row: int,
        logits: np.ndarray,
        place: np.ndarray,
        patience: Patience,
    ) -> tuple[list[int], list[Score]]:
        """Choose tokens as long as each is the drafted one. Each is a fresh choice from the model's
        own distribution, so that is what comes out, with or without drafts."""
        tokens: list[int] = []
        scores: list[Score] = []
        first = row + len(chunk.tokens) - 1 - chunk.draft
        for j in range(1 + chunk.draft):
            try:
                token, token_score = sampler.choose(
                    self._context, first + j, logits[place[first + j]], patience
                )
            except Late:
                if not tokens:
                    raise
                break  # what was chosen so far stands
            tokens.append(token)
            if token_score is not None:
                scores.append(token_score)
            if j < chunk.draft and token != chunk.tokens[len(chunk.tokens) - chunk.draft + j]:
                break
        return tokens, scores
