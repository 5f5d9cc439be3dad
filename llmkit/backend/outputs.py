"""Combines the outputs of parts of a step into the output of the step. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace
from typing import Any

from llmkit.engine.batch import Chunk, StepOutput

__all__ = ["merged", "with_gaps"]


def with_gaps(chunks: Sequence[Chunk], output: StepOutput, missing: AbstractSet[int]) -> StepOutput:
    """The output with places for the chunks left out: their slots are empty now."""
    kept = [None if c.slot in missing else c for c in chunks]

    def spread(values: Sequence[Any], gap: Any) -> list[Any]:
        left = iter(values)
        return [gap if c is None else next(left) for c in kept] if values else []

    return replace(
        output,
        tokens=spread(output.tokens, ()) or [()] * len(kept),
        resident=spread(output.resident, 0) or [0] * len(kept),
        scores=spread(output.scores, ()),
        prompt_scores=spread(output.prompt_scores, ()),
        forced=spread(output.forced, ()),
    )


def merged(
    outputs: Sequence[tuple[StepOutput, int]],
    lost: Sequence[int],
    faults: Sequence[tuple[int, str]],
) -> StepOutput:
    """One output from several: for each chunk, the output that contains it and its place there.
    ``faults`` are those of the whole step."""

    def each(name: str, gap: Any) -> list[Any]:
        return [
            values[place] if (values := getattr(output, name)) else gap for output, place in outputs
        ]

    whole = list({id(output): output for output, _ in outputs}.values())
    return StepOutput(
        each("tokens", ()),
        each("resident", 0),
        interrupted=any(o.interrupted for o in whole),
        faults=faults,
        lost=lost,
        late=tuple(slot for o in whole for slot in o.late),
        refused=tuple(slot for o in whole for slot in o.refused),
        scores=each("scores", ()),
        prompt_scores=each("prompt_scores", ()),
        forced=each("forced", ()),
        backend_s=sum(o.backend_s for o in whole),
    )
