"""The seam below the engine: the handful of things it asks of a model. Only the engine thread calls ``execute``."""

from __future__ import annotations

from typing import Protocol

from llmkit.engine.batch import Batch, StepOutput

__all__ = ["Constraint", "ModelRunner"]


class Constraint(Protocol):
    """What a request's text must look like, as far as the engine cares."""

    @property
    def ready(self) -> bool:
        """Whether it can say at once what may come next."""
        ...

    def take_seconds(self) -> float:
        """Seconds of computing since the last call, for the caller's bill."""
        ...


class ModelRunner(Protocol):
    """A model with ``n_slots`` sequences of at most ``n_ctx`` tokens each.

    ``capacity`` is how many tokens all of them can hold together (None: each has its own room), ``host_tokens`` how many may be parked outside the context.
    ``tile``: chunks of a prompt are computed well in multiples of it (1: any size). ``num_threads`` compute on the CPU. ``saves``: what is idle at the end is
    to be parked on disk.
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
        """Run one step. Errors of the step come back in the output; an exception means that the runner is unusable."""
        ...

    def set_threads(self, count: int) -> None:
        """Compute with so many threads from the next step on."""
        ...

    def saved(self) -> list[tuple[int, list[int], str]]:
        """What is parked on disk from earlier: key, tokens, salt."""
        ...

    def interrupt(self) -> None:
        """From any thread: end the decode that is running, or else the next one, early."""
        ...

    def clear_interrupt(self) -> None:
        """Forget an interrupt that was asked for."""
        ...

    def close(self) -> None:
        """Free the memory. Only after the engine thread has ended."""
        ...
