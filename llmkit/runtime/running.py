"""The engines that run in this process, and the turns they take on the CPU. Any thread.

They are closed when the process exits. A forked child starts with none.
"""

from __future__ import annotations

import atexit
import os
import threading
import weakref
from typing import TYPE_CHECKING, TypeAlias

from llmkit.runtime.cpu_turns import CpuTurns

if TYPE_CHECKING:
    from llmkit.runtime.embedder import LocalEmbedder
    from llmkit.runtime.local import LocalEngine
    from llmkit.runtime.serial import SerialEngine

    Engine: TypeAlias = LocalEngine | LocalEmbedder | SerialEngine

__all__ = ["Running", "running"]


class Running:
    """``turns`` is shared by models on the CPU: together they would be slower than in sequence."""

    def __init__(self) -> None:
        self._engines: weakref.WeakSet[Engine] = weakref.WeakSet()
        self.turns = CpuTurns()
        self.opening = threading.RLock()  # two loads at once would plan with the same free memory

    def add(self, engine: Engine) -> None:
        self._engines.add(engine)

    def discard(self, engine: Engine) -> None:
        self._engines.discard(engine)

    def close_all(self) -> None:
        for engine in list(self._engines):
            engine.close()

    def begin_again(self) -> None:
        """In a forked child: the thread that had the turn, or a lock, does not exist here."""
        self.__init__()  # type: ignore[misc]


running = Running()
atexit.register(running.close_all)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=running.begin_again)
