"""Unloading a model that another process has loaded, such as a notebook's kernel.

Tornado loop only. What `llmkit serve` has loaded itself is its `ModelManager`'s, see `ModelRoutes`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from functools import partial

from llmkit.errors import EngineGoneError
from llmkit.gateway.directory import EngineDirectory
from llmkit.gateway.exchange import Exchange
from llmkit.gateway.failures import ApiError
from llmkit.gateway.ids import new_id
from llmkit.gateway.ops.models import EndBody
from llmkit.gateway.ops.openapi import Route
from llmkit.protocol import Inquiry, Unload
from llmkit.protocol.client import EngineClient

__all__ = ["UnloadRoutes"]

logger = logging.getLogger(__name__)

LOOK_S = 0.25
DRAIN_S = 300.0
GOODBYE_S, GOODBYE_LOOK_S = 5.0, 0.02  # between the answer, when the memory is free, and the end


class UnloadRoutes:
    """`/admin/models/unload` over the engines of a directory.

    Its owner's handle then says that the model was unloaded, and its `load` loads it anew.
    """

    def __init__(self, directory: EngineDirectory) -> None:
        self._directory = directory
        self._tasks: set[asyncio.Task[None]] = set()

    def routes(self) -> list[Route]:
        return [
            Route("POST", "/admin/models/unload", self.unload, "Unload a model", "Admin", EndBody)
        ]

    async def unload(self, exchange: Exchange) -> None:
        body = await exchange.read(EndBody)
        self._directory.look_again()  # one that was loaded just now, after another of its name
        engine = self._directory.lookup(body.model)
        if not (body.drain or body.force) and _is_busy(engine):
            message = f"{body.model!r} is answering requests; wait for them (drain) or end them."
            raise ApiError(409, message, code="model_busy")
        # A client that leaves does not stop it.
        task = asyncio.ensure_future(_unload(engine, exchange.caller, wait=not body.force))
        self._tasks.add(task)
        task.add_done_callback(partial(self._unloaded, body.model))
        if body.wait:
            await asyncio.shield(task)
        phase = "unloaded" if body.wait else "draining"
        answer = {"id": body.model, "name": engine.description.name, "phase": phase}
        exchange.send_json(answer, 200 if body.wait else 202)

    def _unloaded(self, model: str, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None:  # nobody may have waited for it
            logger.error("could not unload the model %r: %s", model, error)


async def _unload(engine: EngineClient, caller: str, *, wait: bool) -> None:
    """Unload it, with ``wait`` once it has no requests; nothing to do if it ends by itself.

    Raises `ApiError` if there are always some: its kernel goes on taking requests meanwhile.
    """
    end = time.monotonic() + DRAIN_S
    while wait and _is_busy(engine) and not engine.state.is_gone:
        if time.monotonic() > end:
            message = (
                f"{engine.description.name!r} had requests for {DRAIN_S:.0f} s; end them (force)."
            )
            raise ApiError(409, message, code="model_busy")
        await asyncio.sleep(LOOK_S)
    try:
        await asyncio.wrap_future(engine.inquire(Inquiry(new_id("unload"), Unload(), caller)))
    except EngineGoneError:
        logger.info("the model %r has ended by itself", engine.description.name)
    end = time.monotonic() + GOODBYE_S
    while not engine.state.is_gone and time.monotonic() < end:  # until then it is still listed
        await asyncio.sleep(GOODBYE_LOOK_S)


def _is_busy(engine: EngineClient) -> bool:
    stats = engine.stats()
    return stats.num_running + stats.num_waiting > 0
