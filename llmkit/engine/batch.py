"""What goes down to the model in one step, and what comes up. Plain frozen data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from llmkit.types import SamplingParams

__all__ = ["Batch", "Chunk", "Fork", "Open", "SlotOp", "StepOutput", "Truncate"]


@dataclass(frozen=True, slots=True)
class Truncate:
    """Keep only the first ``length`` tokens of ``slot``."""

    slot: int
    length: int


@dataclass(frozen=True, slots=True)
class Fork:
    """Make the first ``length`` tokens of ``source`` the whole content of ``target``."""

    source: int
    target: int
    length: int


@dataclass(frozen=True, slots=True)
class Open:
    """A request begins in ``slot``: set up its sampler. ``history`` are the prompt tokens that penalties look back on."""

    slot: int
    sampling: SamplingParams
    history: Sequence[int]


SlotOp = Truncate | Fork | Open


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive tokens of one slot: ``tokens[i]`` goes to position ``start + i``. ``sample``: choose a token after the last one."""

    slot: int
    start: int
    tokens: Sequence[int]
    sample: bool


@dataclass(frozen=True, slots=True)
class Batch:
    """One engine step: first the slot operations in order, then one decode of all chunks (ordered by slot, one a slot)."""

    chunks: tuple[Chunk, ...]
    ops: tuple[SlotOp, ...] = ()

    @property
    def num_tokens(self) -> int:
        return sum(len(c.tokens) for c in self.chunks)


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What one step gave, parallel to ``batch.chunks``.

    ``tokens[i]`` is the sampled token (None where none was asked). ``resident[i]`` is the number of tokens that the slot holds now; it is
    less than asked after an interrupt (``interrupted``) or a failure. ``error`` is set when the decode failed for these chunks; ``faults`` holds
    (slot, why) of requests that alone went wrong.
    ``backend_s`` is the time spent inside calls of the C library (decode and sampler chains), seconds.
    """

    tokens: Sequence[int | None]
    resident: Sequence[int]
    interrupted: bool = False
    no_room: bool = False
    error: str | None = None
    faults: Sequence[tuple[int, str]] = ()
    backend_s: float = field(default=0.0, compare=False)
