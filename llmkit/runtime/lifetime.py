"""`Lifetime`: whether a model of this process can be used, and why not. Any thread."""

from __future__ import annotations

import os

from llmkit.errors import EngineGoneError, ModelUnloadedError
from llmkit.protocol import EngineState

__all__ = ["Lifetime"]

FORKED = (
    "this model was loaded in the parent process before a fork; load it again here, or reach it "
    "through its gateway."
)


class Lifetime:
    """From its load until it is ``closed``, or, without that, its thread has ended of a failure.

    A fork has a copy of everything but the thread, so it can only be told that.
    """

    def __init__(self) -> None:
        self._pid = os.getpid()
        self.closed = False

    @property
    def is_ours(self) -> bool:
        """Whether this process loaded it."""
        return self._pid == os.getpid()

    def state(self, name: str, failure: str | None) -> EngineState:
        """What callers of the model ``name`` may know."""
        return EngineState.gone_for(self._why(name, failure), blameless=self.closed)

    def check(self, name: str, failure: str | None) -> None:
        """Raises `ModelUnloadedError`, or `EngineGoneError` for a ``failure``."""
        if (why := self._why(name, failure)) is None:
            return
        raise EngineGoneError(why) if why is failure else ModelUnloadedError(why)

    def _why(self, name: str, failure: str | None) -> str | None:
        if not self.is_ours:
            return FORKED
        return str(ModelUnloadedError.of(name)) if self.closed else failure
