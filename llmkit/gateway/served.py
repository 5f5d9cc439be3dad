"""The models of a `ModelManager` behind the gateway: loaded when asked for, kept while in use.

Tornado loop only.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from llmkit.gateway.access.identity import ADMIN
from llmkit.gateway.exchange import Exchange
from llmkit.workers.models import ModelManager

__all__ = ["Served"]

# A model in one of these phases is waited for; one that crashed and restarts is not.
AWAITED = ("unloaded", "loading", "draining", "stopping", "failed")


class Served:
    """What the gateway's parts need to know of a manager's models."""

    def __init__(self, manager: ModelManager) -> None:
        self.manager = manager

    async def admit(self, exchange: Exchange, model: str) -> None:
        """An `Admission`: the model is loaded if need be, and stays while the request runs.

        A model that nobody knows is the directory's to refuse. Raises what `ModelManager.enter`
        and `ModelManager.load` raise.
        """
        name = await self.name_of(model)
        if name is None:
            return
        self.manager.enter(name)
        exchange.cleanup.callback(self.manager.leave, name)
        if self.manager.phase(name) in AWAITED:
            await asyncio.wrap_future(self.manager.load(name))

    def keep(self, exchange: Exchange, model: str, seconds: float | None) -> None:
        """A `Keeper`: others use the model too, so only an administrator decides, or whoever is
        on this machine where there are no keys."""
        name = self.manager.known(model)
        identity = exchange.identity
        if identity.kind != "local" and ADMIN not in identity.scopes:
            exchange.ignored.append("keep_alive")
        elif name is not None:
            self.manager.keep(name, seconds)

    async def name_of(self, model: str) -> str | None:
        """The name of a model, or None; one that was never asked for may be looked for on disk."""
        name = self.manager.known(model) or self.manager.known(model.removesuffix(":latest"))
        return name or await asyncio.to_thread(self.manager.name_of, model)

    def names(self, model: str) -> str | None:
        """For the directory: the name behind an alias."""
        return None if model == "default" else self.manager.known(model)

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
            case "ready":  # seen by the directory before the manager
                return f"The engine process of {name!r} has ended and is being started again."
            case _:
                return status.reason or f"The model {name!r} is {status.phase}."

    def offered(self) -> Sequence[str]:
        """For the directory: the models that a request could use."""
        return [status.name for status in self.manager.statuses() if status.phase != "failed"]
