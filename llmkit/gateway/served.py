"""The models of a `ModelManager` behind the gateway: loaded when asked for, kept while in use.

Tornado loop only.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from llmkit.gateway.access.identity import ADMIN
from llmkit.gateway.exchange import Exchange
from llmkit.workers.models import ModelManager

__all__ = ["Served"]

# A model in one of these phases is waited for; one that crashed and restarts is not.
AWAITED = ("unloaded", "loading", "draining", "stopping", "failed")
MISSED_S, MAX_MISSED = (
    1.0,
    1000,
)  # how long, and of how many names, it is known that nothing is there


def _bare(model: str) -> str:
    """Without the tag that Ollama's clients add."""
    return model.removesuffix(":latest")


class Served:
    """What the gateway's parts need to know of a manager's models."""

    def __init__(self, manager: ModelManager) -> None:
        self.manager = manager
        self._missed: dict[str, float] = {}
        # A thread of its own: a slow disk must not hold up what else runs on threads.
        self._looking = ThreadPoolExecutor(1, "llmkit-models-dir")

    async def admit(self, exchange: Exchange, model: str) -> None:
        """An `Admission`: the model is loaded if need be, and stays while the request runs.

        A model that nobody knows is the directory's to refuse. Raises what `ModelManager.load`
        raises.
        """
        name = await self.name_of(model)
        if name is None:
            return
        exchange.cleanup.callback(self.manager.leave, name, self.manager.enter(name))
        if self.manager.phase(name) in AWAITED:
            await asyncio.wrap_future(self.manager.load(name))

    def keep(self, exchange: Exchange, model: str, seconds: float | None) -> bool:
        """A `Keeper`. Others use the model too, so only administrators decide; without keys,
        whoever is on this machine is one."""
        if ADMIN not in exchange.identity.scopes:
            exchange.ignore("keep_alive")
            return False
        self.manager.keep(self.names(model) or model, seconds)
        return True

    async def name_of(self, model: str) -> str | None:
        """The name of a model, or None; one that was never asked for is looked for on disk."""
        name = self.manager.known(model) or self.manager.known(_bare(model))
        if name is not None or not self._may_look(model):
            return name
        loop = asyncio.get_running_loop()
        name = await loop.run_in_executor(self._looking, self.manager.name_of, _bare(model))
        if name is None:
            self._missed[model] = time.monotonic()
        return name

    def _may_look(self, model: str) -> bool:
        """Whether it was not looked for just now: unknown names must not keep the disk busy."""
        now = time.monotonic()
        if len(self._missed) > MAX_MISSED:
            self._missed = {m: at for m, at in self._missed.items() if now - at < MISSED_S}
        return now - self._missed.get(model, -MISSED_S) >= MISSED_S

    def names(self, model: str) -> str | None:
        """For the directory: the name behind an alias."""
        if model == "default":
            return None
        return self.manager.known(model) or self.manager.known(_bare(model))

    def absent(self, model: str) -> str | None:
        """For the directory: why a model has no engine now."""
        name = self.manager.known(model)
        if name is None:
            return None
        status = self.manager.status(name)
        match status.phase:
            case "loading":
                share = f" ({status.loaded:.0%})" if status.loaded else ""
                return f"The model {name!r} is being loaded{share}; try again in a moment."
            case "unloaded":
                return f"The model {name!r} is not loaded; a request for it loads it."
            # Reasons of failures name paths and quote logs: they are for administrators. One that
            # is "ready" was seen by the directory before the manager.
            case "ready" | "restarting":
                return f"The engine process of {name!r} has ended and is being started again."
            case "failed":
                return f"The model {name!r} cannot be loaded. The server's log says why."
            case _:
                return status.reason or f"The model {name!r} is {status.phase}."

    def offered(self) -> Sequence[str]:
        """For the directory: all models, of which some may be loaded."""
        return self.manager.names()
