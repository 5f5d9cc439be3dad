"""A model in a child process: ``llmkit.load(..., isolated=True)``.

It crashes alone, has its own GIL, and exits when we do.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from llmkit.bridge import connection as files
from llmkit.bridge.child import Child
from llmkit.bridge.client import BridgeClient
from llmkit.errors import ModelLoadError
from llmkit.models.registry import ModelSpec
from llmkit.protocol import EngineState
from llmkit.settings.options import EngineOptions
from llmkit.workers import engine

__all__ = ["IsolatedEngine", "start"]

END_S = 15.0  # to end requests and write idle prefixes to disk


class IsolatedEngine(BridgeClient):
    """An `EngineClient` for the model of a child process; ``close()`` ends that process."""

    def __init__(self, connection: files.Connection, child: Child) -> None:
        self._child = child
        super().__init__(connection, weighs=True)  # this end has checked them already

    @property
    def state(self) -> EngineState:
        state = super().state
        if not state.is_gone and self._child.status is not None:
            return EngineState("gone", "the model's process has ended. Load it again.")
        return state

    def close(self) -> None:
        super().close()
        self._child.end(END_S)
        if self._pid == os.getpid():  # a child that was killed left its socket behind
            files.remove(self.connection)


def start(
    spec: ModelSpec,
    options: EngineOptions,
    *,
    name: str | None = None,
    force: bool = False,
    kernel_id: str | None = None,
    share: bool = True,
    on_progress: Callable[[float], None] = lambda _: None,
) -> IsolatedEngine:
    """Load a model in a child process.

    With ``share=False`` no other process finds the model. Raises what `llmkit.load` documents. A
    KeyboardInterrupt ends the load.
    """
    child = Child(
        engine.TARGET, engine.task(spec, options, name=name, force=force, kernel_id=kernel_id)
    )
    try:
        path = Path(child.ready(on_progress)["path"])
        found = files.read(path)
        if found is None:
            raise ModelLoadError(
                f"the connection file {path} of the model's process cannot be trusted: "
                "is the runtime folder yours alone?"
            )
        if not share:
            path.unlink(missing_ok=True)
            found = replace(found, path=Path())
        return IsolatedEngine(found, child)
    except BaseException:
        child.close_input()
        child.kill()
        raise
