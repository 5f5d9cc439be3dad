"""What goes down to the model in one step, and what comes up. Plain frozen data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from llmkit.types import SamplingParams

__all__ = ["Batch", "Chunk", "Close", "Drop", "Fork", "Open", "Park", "Restore", "Score", "Shift", "SlotOp", "StepOutput", "Truncate"]


@dataclass(frozen=True, slots=True)
class Truncate:
    """Keep only the first ``length`` tokens of ``slot``."""

    slot: int
    length: int


@dataclass(frozen=True, slots=True)
class Shift:
    """Forget ``discard`` tokens of ``slot`` after its first ``keep``; the later ones move up to their places."""

    slot: int
    keep: int
    discard: int


@dataclass(frozen=True, slots=True)
class Fork:
    """Make the first ``length`` tokens of ``source`` the whole content of ``target``."""

    source: int
    target: int
    length: int


@dataclass(frozen=True, slots=True)
class Park:
    """Keep a copy of what ``slot`` holds, outside the context, under ``key``. ``tokens`` are what it holds; ``save`` writes it to disk as well."""

    slot: int
    key: int
    tokens: Sequence[int]
    salt: str = ""
    save: bool = False


@dataclass(frozen=True, slots=True)
class Restore:
    """Make the first ``length`` tokens parked under ``key`` the whole content of ``slot``."""

    key: int
    slot: int
    length: int


@dataclass(frozen=True, slots=True)
class Drop:
    """Forget what is parked under ``key``."""

    key: int


@dataclass(frozen=True, slots=True)
class Open:
    """Request ``serial`` takes ``slot``: bind its sampler, made from ``sampling`` when the request is new. ``history`` are the tokens that penalties look
    back on; ``constraint`` is the runner's own form of ``sampling.grammar``, ``adapters`` names LoRA adapters and their scales, ``sampler`` is the runner's
    own, if it was made beforehand."""

    slot: int
    serial: int
    sampling: SamplingParams
    history: Sequence[int]
    constraint: object | None = None
    adapters: Sequence[tuple[str, float]] = ()
    sampler: object | None = None


@dataclass(frozen=True, slots=True)
class Close:
    """Request ``serial`` is over: free its sampler."""

    serial: int


SlotOp = Truncate | Shift | Fork | Park | Restore | Drop | Open | Close


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive tokens of one slot: ``tokens[i]`` goes to position ``start + i``.

    ``sample``: choose a token after the last one. The last ``draft`` tokens are guesses: each counts only if the token chosen before it is the same.
    ``targets``: the tokens that follow the first ``len(targets)`` tokens, to be scored (prompt logprobs).
    """

    slot: int
    start: int
    tokens: Sequence[int]
    sample: bool
    draft: int = 0
    targets: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class Batch:
    """One engine step: first the slot operations in order, then one decode of all chunks (ordered by slot, one a slot)."""

    chunks: tuple[Chunk, ...]
    ops: tuple[SlotOp, ...] = ()

    @property
    def num_tokens(self) -> int:
        return sum(len(c.tokens) for c in self.chunks)


class Score(NamedTuple):
    """Natural log-probabilities at one position: of the token there, and of the likeliest ones (token, logprob), best first."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What one step gave, parallel to ``batch.chunks``.

    ``tokens[i]`` are the chosen tokens: none where none was asked, more than one after an accepted draft. ``resident[i]`` is the number of tokens that the
    slot holds now; it is less than asked after a rejected draft, an interrupt (``interrupted``) or a failure. ``scores[i]`` belong to ``tokens[i]`` where
    asked, ``prompt_scores[i]`` to ``chunk.targets``; ``forced[i]`` are the tokens that a grammar leaves no choice but to come next.

    ``error`` is set when the decode failed for these chunks; ``faults`` holds (slot, why) of requests that alone went wrong, ``refused`` those of their slots
    whose request asked for what cannot be done, ``emptied`` those that hold nothing any more. ``lost`` are keys that could not be parked or restored,
    ``broken`` slots that are empty now because of that. ``late`` are slots whose grammar did not say in time what may come next: nothing was chosen, and the
    last token is to be computed again. ``backend_s`` is the time spent inside calls of the C library (decode and sampler chains), seconds.
    """

    tokens: Sequence[Sequence[int]]
    resident: Sequence[int]
    interrupted: bool = False
    no_room: bool = False
    error: str | None = None
    faults: Sequence[tuple[int, str]] = ()
    lost: Sequence[int] = ()
    broken: Sequence[int] = ()
    emptied: Sequence[int] = ()
    refused: Sequence[int] = ()
    late: Sequence[int] = ()
    scores: Sequence[Sequence[Score]] = ()
    prompt_scores: Sequence[Sequence[Score]] = ()
    forced: Sequence[Sequence[int]] = ()
    backend_s: float = field(default=0.0, compare=False)
