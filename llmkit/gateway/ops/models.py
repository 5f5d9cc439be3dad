"""Routes for administrators: the server's models, and loading, unloading and switching them.

Tornado loop only.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import asdict
from functools import partial
from typing import Any, ClassVar

from llmkit.errors import ModelBusyError
from llmkit.gateway.bodies import Strict
from llmkit.gateway.exchange import Exchange
from llmkit.gateway.failures import ApiError
from llmkit.gateway.ops.openapi import Route
from llmkit.gateway.served import Served
from llmkit.workers.place import ModelStatus

__all__ = ["ModelRoutes"]

logger = logging.getLogger(__name__)


class ModelBody(Strict):
    """The model to act on."""

    uses_model: ClassVar[bool] = False

    model: str
    wait: bool = True


class EndBody(ModelBody):
    """``drain`` waits for its requests; ``force`` ends them; with neither, 409 if there are any."""

    drain: bool = True
    force: bool = False


class ModelRoutes:
    """`/admin/models` over a server's models."""

    def __init__(self, served: Served) -> None:
        self._served, self._manager = served, served.manager
        self._switching = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()

    def routes(self) -> list[Route]:
        return [
            Route("GET", "/admin/models", self.list, "The server's models", "Admin"),
            Route("POST", "/admin/models/load", self.load, "Load a model", "Admin", ModelBody),
            Route("POST", "/admin/models/unload", self.unload, "Unload a model", "Admin", EndBody),
            Route("POST", "/admin/models/reload", self.reload, "Reload a model", "Admin", EndBody),
            Route(
                "POST",
                "/admin/models/switch",
                self.switch,
                "Load a model in place of the default one",
                "Admin",
                EndBody,
            ),
            Route(
                "POST",
                "/admin/models/default",
                self.default,
                'Choose the model behind the name "default"',
                "Admin",
                ModelBody,
            ),
            Route("GET", "/admin/models/{id+}", self.show, "One of the models", "Admin"),
        ]

    async def list(self, exchange: Exchange) -> None:
        models = [_object(status) for status in self._manager.statuses()]
        exchange.send_json({"default": self._manager.default, "models": models})

    async def show(self, exchange: Exchange) -> None:
        self._send(exchange, await self._known(exchange.args[0]))

    async def load(self, exchange: Exchange) -> None:
        body = await exchange.read(ModelBody)
        name = await self._known(body.model)
        future = self._manager.load(name)
        if body.wait:
            await asyncio.wrap_future(future)
        self._send(exchange, name, 200 if body.wait else 202)

    async def unload(self, exchange: Exchange) -> None:
        body = await exchange.read(EndBody)
        name = await self._known(body.model)
        await self._end(name, body)
        self._send(exchange, name, 200 if body.wait else 202)

    async def reload(self, exchange: Exchange) -> None:
        body = await exchange.read(EndBody)
        name = await self._known(body.model)
        await self._end(name, body, again=True)
        self._send(exchange, name, 200 if body.wait else 202)

    async def switch(self, exchange: Exchange) -> None:
        """Put this model in the place of the default one, which is unloaded.

        If there is room for both, the old one serves until the new one is ready. If the new one
        cannot be loaded, the old one stays, or is loaded again.
        """
        body = await exchange.read(EndBody)
        name = await self._known(body.model)
        self._check_end(self._manager.default, name, body)
        # A client that leaves must not leave it half done.
        task = asyncio.ensure_future(self._switch(name, body))
        self._tasks.add(task)
        task.add_done_callback(partial(self._switched, name))
        if body.wait:
            await asyncio.shield(task)
        self._send(exchange, name, 200 if body.wait else 202)

    def _switched(self, name: str, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None:  # nobody may have waited for it
            logger.error("could not switch to the model %r: %s", name, error)

    def _check_end(self, before: str | None, name: str, body: EndBody) -> None:
        """Raise `ApiError` if requests are in the way of a switch."""
        if before in (None, name) or body.drain or body.force or not self._manager.in_use(before):
            return
        message = f"{before!r} is answering requests; wait for them (drain) or end them (force)."
        raise ApiError(409, message, code="model_busy")

    async def _switch(self, name: str, body: EndBody) -> None:
        async with self._switching:
            before = self._manager.default
            if before is None or before == name:
                self._manager.set_default(name)
                await asyncio.wrap_future(self._manager.load(name))
                return
            old = body.model_copy(update={"wait": True})
            self._check_end(before, name, body)
            if await asyncio.to_thread(self._manager.fits, name):
                await asyncio.wrap_future(self._manager.load(name))
                self._manager.set_default(name)
                await self._end(before, old)
                return
            self._manager.set_default(name)  # who asks for the default from now on waits for it
            try:
                await self._end(before, old)
                await asyncio.wrap_future(self._manager.load(name))
            except BaseException:
                self._manager.set_default(before)
                self._manager.load(before)
                raise

    async def default(self, exchange: Exchange) -> None:
        body = await exchange.read(ModelBody)
        name = await self._known(body.model)
        self._manager.set_default(name)
        self._send(exchange, name)

    async def _known(self, model: str) -> str:
        """The model's name. Raises `ModelNotFoundError`."""
        return await self._served.name_of(model) or self._manager.status(model).name

    async def _end(self, name: str, body: EndBody, *, again: bool = False) -> None:
        try:
            future = self._manager.unload(name, drain=body.drain, force=body.force, again=again)
        except ModelBusyError as error:
            raise ApiError(409, str(error), code="model_busy") from None
        if body.wait:
            await asyncio.wrap_future(future)

    def _send(self, exchange: Exchange, model: str, status: int = 200) -> None:
        exchange.send_json(_object(self._manager.status(model)), status)


def _object(status: ModelStatus) -> dict[str, Any]:
    return {"id": status.name, **asdict(status)}
