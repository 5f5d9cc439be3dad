"""The interface below the engine: what it needs of a model. Only its thread calls ``execute``."""

from __future__ import annotations

from typing import Protocol

from llmkit.engine.batch import Batch, StepOutput

__all__ = ["Constraint", "ModelRunner"]


class Constraint(Protocol):
    """What a request's text must match, as far as the engine cares."""

    @property
    def ready(self) -> bool:
        """Whether it knows what may come next without waiting."""
        ...

    def take_seconds(self) -> float:
        """Seconds of computing since the last call, to charge the caller."""
        ...


class ModelRunner(Protocol):
    """A model with ``n_slots`` sequences of at most ``n_ctx`` tokens each.

    ``capacity``: how many tokens all of them can hold together (None: each has its own room);
    ``host_tokens``: how many may be parked in RAM. ``tile``: multiples of it are efficient chunk
    sizes for prompts (1: any size). ``num_threads``: CPU threads that compute. ``saves``: idle
    prefixes are to be saved to disk at shutdown.
    """

    n_slots: int
    n_ctx: int
    max_batch_tokens: int
    can_truncate: bool
    can_fork: bool
    capacity: int | None
    host_tokens: int
    saves: bool
    num_threads: int
    tile: int

    def execute(self, batch: Batch) -> StepOutput:
        """Run one step. Errors of the step are in the output; an exception means that the runner is
        unusable."""
        ...

    def set_threads(self, count: int) -> None:
        """Compute with ``count`` threads from the next step on."""
        ...

    def saved(self) -> list[tuple[int, list[int], str]]:
        """Prefixes saved to disk earlier: key, tokens, salt."""
        ...

    def interrupt(self) -> None:
        """From any thread: cut the running decode short, or else the next one."""
        ...

    def clear_interrupt(self) -> None:
        """Withdraw a pending interrupt."""
        ...

    def close(self) -> None:
        """Free the memory. Only after the engine thread has ended."""
        ...
