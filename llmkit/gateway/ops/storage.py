"""Routes for administrators: the models on disk, downloaded and removed. Tornado loop only."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, ClassVar

from llmkit.errors import ModelBusyError
from llmkit.gateway.bodies import Strict
from llmkit.gateway.directory import EngineDirectory
from llmkit.gateway.exchange import Exchange
from llmkit.gateway.failures import ApiError
from llmkit.gateway.ops.openapi import Route
from llmkit.gateway.storage import Storage
from llmkit.models.download import Downloaded

__all__ = ["StorageRoutes"]


class DownloadBody(Strict):
    """A model of the Hub: ``org/repo:file.gguf``, ``org/repo:Q4_K_M`` or ``org/repo``."""

    uses_model: ClassVar[bool] = False

    model: str
    stream: bool = True


class StorageRoutes:
    """`/admin/storage` over a `Storage`; engines of the ``directory`` keep their files."""

    def __init__(self, storage: Storage, directory: EngineDirectory) -> None:
        self._storage, self._directory = storage, directory

    def routes(self) -> list[Route]:
        return [
            Route("GET", "/admin/storage", self.list, "The models on disk", "Admin"),
            Route(
                "POST", "/admin/storage/pull", self.pull, "Download a model", "Admin", DownloadBody
            ),
            Route("DELETE", "/admin/storage/{id+}", self.remove, "Delete a model", "Admin"),
        ]

    async def list(self, exchange: Exchange) -> None:
        models = [model.as_dict() for model in await self._storage.models()]
        exchange.send_json({"models": models})

    async def pull(self, exchange: Exchange) -> None:
        """Progress as events, then what was downloaded, and its id in the list; without ``stream``
        only that."""
        body = await exchange.read(DownloadBody)
        updates = self._storage.pull(body.model)
        try:
            update = await anext(updates)  # an error before the first byte keeps its status
            if body.stream:
                await exchange.start_events()
            while not isinstance(update, Downloaded):
                if body.stream:
                    await exchange.send_event(asdict(update))
                update = await anext(updates)
            done: dict[str, Any] = {"phase": "done", "model": update.name}
            done["id"] = await self._storage.id_of(update)
            if not body.stream:
                exchange.send_json(done)
                return
            await exchange.send_event(done)
            exchange.end_events()
        finally:
            await updates.aclose()  # type: ignore[attr-defined]

    async def remove(self, exchange: Exchange) -> None:
        try:
            removed = await self._storage.remove(exchange.args[0], self._directory.files())
        except ModelBusyError as error:
            raise ApiError(409, str(error), code="model_busy") from None
        exchange.send_json({"deleted": True, "size_bytes": removed.size_bytes})
