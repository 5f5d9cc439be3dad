"""What one step sends to the model, and what it returns. Plain frozen data.

``offset`` is how many more positions the tokens before a place take than their number: 0 for text,
usually less than 0 after an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from llmkit.engine.media import Item
from llmkit.protocol import SamplingParams

__all__ = [
    "Batch",
    "Chunk",
    "Close",
    "Drop",
    "Fork",
    "Open",
    "Park",
    "Restore",
    "Score",
    "Shift",
    "SlotOp",
    "StepOutput",
    "Truncate",
]


@dataclass(frozen=True, slots=True)
class Truncate:
    """Keep only the first ``length`` tokens of ``slot``."""

    slot: int
    length: int
    offset: int = 0


@dataclass(frozen=True, slots=True)
class Shift:
    """Remove ``discard`` tokens of ``slot`` after its first ``keep``; the later ones move up."""

    slot: int
    keep: int
    discard: int


@dataclass(frozen=True, slots=True)
class Fork:
    """Replace the content of ``target`` with the first ``length`` tokens of ``source``."""

    source: int
    target: int
    length: int
    offset: int = 0


@dataclass(frozen=True, slots=True)
class Park:
    """Copy the content of ``slot``, which is ``tokens``, out of the context under ``key``. ``save``
    puts the copy on disk instead of in RAM."""

    slot: int
    key: int
    tokens: Sequence[int]
    salt: str = ""
    save: bool = False


@dataclass(frozen=True, slots=True)
class Restore:
    """Replace the content of ``slot`` with the first ``length`` tokens parked under ``key``."""

    key: int
    slot: int
    length: int
    offset: int = 0


@dataclass(frozen=True, slots=True)
class Drop:
    """Forget the copy parked under ``key``."""

    key: int


@dataclass(frozen=True, slots=True)
class Open:
    """Request ``serial`` takes ``slot``: bind its sampler, made from ``sampling`` when the request
    is new.

    ``history``: the tokens that penalties look back on. ``constraint``: the runner's own form of
    ``sampling.grammar``. ``adapters``: names of LoRA adapters and their scales. ``sampler``: the
    runner's own, if made beforehand.
    """

    slot: int
    serial: int
    sampling: SamplingParams
    history: Sequence[int]
    constraint: object | None = None
    adapters: Sequence[tuple[str, float]] = ()
    sampler: object | None = None


@dataclass(frozen=True, slots=True)
class Close:
    """Request ``serial`` has ended: free its sampler."""

    serial: int


SlotOp = Truncate | Shift | Fork | Park | Restore | Drop | Open | Close


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive tokens of one slot: ``tokens[i]`` goes to position ``start + i + offset``.

    ``sample``: choose a token after the last one. The last ``draft`` tokens are guesses; each is
    valid only if the model chooses the same token there. ``targets``: the tokens that follow each
    of the first ``len(targets)`` tokens, to be scored (prompt logprobs). With an ``item`` they are
    cells of it, whose first position is ``item.start + offset``, and ``encoded`` is what its
    encoder made of it.
    """

    slot: int
    start: int
    tokens: Sequence[int]
    sample: bool
    draft: int = 0
    targets: Sequence[int] = ()
    offset: int = 0
    item: Item | None = None
    encoded: object | None = None


@dataclass(frozen=True, slots=True)
class Batch:
    """One engine step: the slot operations in order, then one decode of all chunks (ordered by
    slot, one per slot)."""

    chunks: tuple[Chunk, ...]
    ops: tuple[SlotOp, ...] = ()

    @property
    def num_tokens(self) -> int:
        return sum(len(c.tokens) for c in self.chunks)


class Score(NamedTuple):
    """Natural log-probabilities at one position: of the token there, and of the likeliest ones as
    (token, logprob), best first."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class StepOutput:
    """The result of one step, parallel to ``batch.chunks``.

    ``tokens[i]``: the chosen tokens; none where none was requested, several after an accepted
    draft. ``resident[i]``: how many tokens the slot now holds, fewer than requested after a
    rejected draft, an interrupt (``interrupted``) or a failure. ``scores[i]`` belong to
    ``tokens[i]`` where requested, ``prompt_scores[i]`` to ``chunk.targets``. ``forced[i]``: the
    tokens that a grammar leaves as the only continuation.

    ``error``: the decode failed for these chunks. ``faults``: (slot, reason) of requests that
    failed on their own; ``refused``: those of their slots whose request was invalid; ``emptied``:
    those that now hold nothing. ``lost``: keys that could not be parked or restored; ``broken``:
    slots emptied because of that. ``late``: slots whose grammar was not ready in time; nothing was
    chosen, and the last token must be computed again. ``backend_s``: seconds spent in the C library
    (decode and sampler chains).
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
