"""The models of `llmkit serve`, and the directory that finds their engines.

The models begin to load before most of the gateway is imported, so imports here are few.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from llmkit.errors import InvalidRequestError
from llmkit.settings.gateway import GatewayOptions
from llmkit.workers.budget import Budget
from llmkit.workers.models import ModelManager
from llmkit.workers.place import ModelStatus, ServedModel

if TYPE_CHECKING:
    from llmkit.gateway.directory import EngineDirectory
    from llmkit.gateway.served import Served

__all__ = ["Finder", "Workers", "say"]

Finder = Callable[[str], ServedModel | None]


def say(text: str, to: Any = None) -> None:
    """On standard error, which may be gone."""
    with contextlib.suppress(OSError, ValueError):
        print(text, file=to or sys.stderr, flush=True)


class Workers:
    """A `ModelManager` behind a directory. Raises `InvalidRequestError` for an unknown default.

    With ``start`` False nothing is loaded before ``manager.start()``.
    """

    def __init__(
        self,
        options: GatewayOptions,
        models: Sequence[ServedModel],
        find: Finder | None = None,
        budget: Budget | None = None,
        *,
        start: bool = True,
    ) -> None:
        self._lock = threading.Lock()
        self._on_change: Callable[[ModelStatus], None] | None = None
        self._early: list[ModelStatus] = []  # changes before anybody listened
        self._aliases = {model.name: model.aliases for model in models}
        self._finds = find is not None
        self.manager = ModelManager(
            models,
            budget=budget,
            idle_unload_s=options.idle_unload_s,
            drain_s=options.drain_s,
            find=find,
            is_busy=self._is_busy,
            on_change=self._changed,
            start=False,
        )
        self.manager.set_default(self.default_of(options))
        if start:
            self.manager.start()

    def aliases_of(self, name: str) -> Sequence[str]:
        """What else a model is called by the settings."""
        return self._aliases.get(name, ())

    def default_of(self, options: GatewayOptions) -> str | None:
        """The name of the default model, looked for on disk too; None is the first of the start.

        Raises `InvalidRequestError` if there is none of that name.
        """
        if options.default_model is None:
            return None
        name = self.manager.name_of(options.default_model)
        if name is None:
            names = ", ".join(self.manager.names())
            raise InvalidRequestError(
                f"default_model: there is no model {options.default_model!r:.80}; "
                + (f"there are {names:.300}." if names else "none is offered."),
                "default_model",
            )
        return name

    @cached_property
    def directory(self) -> EngineDirectory:
        """Tornado loop only."""
        from llmkit.gateway.directory import EngineDirectory
        from llmkit.gateway.pools import Pooled
        from llmkit.gateway.sources import WorkerFiles

        files = WorkerFiles(self.manager.pids)
        return EngineDirectory(
            [Pooled([files], pools=files.is_replica)],
            default=lambda: self.manager.default,
            names=lambda model: self.served.names(model),
            absent=lambda model: self.served.absent(model),
            offered=lambda: self.served.offered(),
            finds=self._finds,
        )

    @cached_property
    def served(self) -> Served:
        """Tornado loop only."""
        from llmkit.gateway.served import Served

        return Served(self.manager)

    def listen(self, on_change: Callable[[ModelStatus], None]) -> None:
        """Say what has happened to the models, and what will, and call ``on_change`` each time.

        That is on the manager's thread, and for what was before on this one.
        """
        with self._lock:
            for status in self._early:
                self._tell(status, on_change)
            self._early.clear()
            self._on_change = on_change

    def _is_busy(self, name: str) -> bool:
        if "directory" not in self.__dict__:  # nobody can have asked an engine anything yet
            return False
        engine = self.directory.engine_of(name)
        if engine is None:
            return False
        stats = engine.stats()
        return bool(stats.num_running + stats.num_waiting)

    def _changed(self, status: ModelStatus) -> None:
        with self._lock:
            if self._on_change is None:
                self._early.append(status)
            else:
                self._tell(status, self._on_change)

    @staticmethod
    def _tell(status: ModelStatus, on_change: Callable[[ModelStatus], None]) -> None:
        if status.phase == "ready":
            say(f"llmkit: the model {status.name!r} is ready", sys.stdout)
        elif status.phase == "failed":
            say(f"llmkit: the model {status.name!r} cannot be served: {status.reason}")
        elif status.phase == "unloaded" and status.loads:
            say(f"llmkit: the model {status.name!r} is unloaded")
        on_change(status)

    def close(self) -> None:
        """Unload all models."""
        self.manager.close()
