"""The models of `llmkit serve`, and the directory that finds their engines."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

from llmkit.errors import InvalidRequestError
from llmkit.gateway.directory import EngineDirectory
from llmkit.gateway.served import Served
from llmkit.gateway.sources import ConnectionFiles
from llmkit.settings.gateway import GatewayOptions
from llmkit.workers.budget import Budget
from llmkit.workers.models import ModelManager
from llmkit.workers.place import ModelStatus, ServedModel

__all__ = ["Finder", "Workers", "say"]

Finder = Callable[[str], ServedModel | None]


def say(text: str, to: Any = None) -> None:
    """On standard error, which may be gone."""
    with contextlib.suppress(OSError, ValueError):
        print(text, file=to or sys.stderr, flush=True)


class Workers:
    """A `ModelManager` behind a directory; ``on_change`` hears of every change, on its thread."""

    def __init__(
        self,
        options: GatewayOptions,
        models: Sequence[ServedModel],
        find: Finder | None = None,
        budget: Budget | None = None,
        *,
        start: bool = True,
    ) -> None:
        self.on_change: Callable[[ModelStatus], None] = lambda _: None
        self.directory = EngineDirectory(
            [ConnectionFiles(lambda origin: origin.pid in self.manager.pids())],
            default=lambda: self.manager.default,
            names=lambda model: self.served.names(model),
            absent=lambda model: self.served.absent(model),
            offered=lambda: self.served.offered(),
        )
        self.manager = ModelManager(
            models,
            budget=budget,
            idle_unload_s=options.idle_unload_s,
            drain_s=options.drain_s,
            find=find,
            is_busy=self._is_busy,
            on_change=self._changed,
            start=start,
        )
        self.served = Served(self.manager)
        if options.default_model is not None:
            if self.manager.name_of(options.default_model) is None:
                names = ", ".join(self.manager.names())
                raise InvalidRequestError(
                    f"default_model: there is no model {options.default_model!r:.80}; there are "
                    f"{names:.300}.",
                    "default_model",
                )
            self.manager.set_default(options.default_model)

    def _is_busy(self, name: str) -> bool:
        engine = self.directory.engine_of(name)
        if engine is None:
            return False
        stats = engine.stats()
        return bool(stats.num_running + stats.num_waiting)

    def _changed(self, status: ModelStatus) -> None:
        if status.phase == "ready":
            say(f"llmkit: the model {status.name!r} is ready", sys.stdout)
        elif status.phase == "failed":
            say(f"llmkit: the model {status.name!r} cannot be served: {status.reason}")
        elif status.phase == "unloaded" and status.loads:
            say(f"llmkit: the model {status.name!r} is unloaded")
        self.on_change(status)

    def close(self) -> None:
        """Unload all models."""
        self.manager.close()
