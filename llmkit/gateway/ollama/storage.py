"""Ollama's routes that download and delete models, for administrators. Tornado loop only."""

from __future__ import annotations

from typing import Any, ClassVar

from llmkit.errors import InvalidRequestError, ModelBusyError
from llmkit.gateway.access.identity import ADMIN
from llmkit.gateway.bodies import Strict
from llmkit.gateway.directory import EngineDirectory
from llmkit.gateway.exchange import Exchange
from llmkit.gateway.failures import ApiError
from llmkit.gateway.ollama.objects import NDJSON
from llmkit.gateway.ops.openapi import Route
from llmkit.gateway.storage import Storage
from llmkit.models.download import Downloaded, DownloadEvent

__all__ = ["OllamaStorageRoutes"]


class NameBody(Strict):
    """A model by its name; ``name`` is the older word."""

    uses_model: ClassVar[bool] = False

    model: str | None = None
    name: str | None = None

    @property
    def wanted(self) -> str:
        """Raises `InvalidRequestError`."""
        name = self.model or self.name
        if not name:
            raise InvalidRequestError("model is missing.", "model")
        return name


class PullBody(NameBody):
    """POST /api/pull"""

    stream: bool = True
    insecure: bool = False
    username: str | None = None  # ignored, as by Ollama; its own client sends them empty
    password: str | None = None


class OllamaStorageRoutes:
    """`/api/pull` and `/api/delete` over a `Storage`."""

    def __init__(self, storage: Storage, directory: EngineDirectory) -> None:
        self._storage, self._directory = storage, directory

    def routes(self) -> list[Route]:
        delete = self.delete
        return [
            Route(
                "POST", "/api/pull", self.pull, "Download a model", "Ollama", PullBody, scope=ADMIN
            ),
            Route(
                "DELETE", "/api/delete", delete, "Delete a model", "Ollama", NameBody, scope=ADMIN
            ),
        ]

    async def pull(self, exchange: Exchange) -> None:
        body = await exchange.read(PullBody)
        for name in ("username", "password"):
            if getattr(body, name):
                exchange.ignore(name)
        updates = self._storage.pull(body.wanted)
        try:
            update = await anext(updates)
            if body.stream:
                await exchange.start_events(NDJSON)
            while not isinstance(update, Downloaded):
                if body.stream:
                    await exchange.send_line(_line(update))
                update = await anext(updates)
            if not body.stream:
                exchange.send_json({"status": "success"})
                return
            await exchange.send_line({"status": "success"})
            exchange.end_events("")
        finally:
            await updates.aclose()  # type: ignore[attr-defined]

    async def delete(self, exchange: Exchange) -> None:
        body = await exchange.read(NameBody)
        try:
            await self._storage.remove(body.wanted, self._directory.files())
        except ModelBusyError as error:
            raise ApiError(409, str(error), code="model_busy") from None
        exchange.send_bytes(b"")


def _line(event: DownloadEvent) -> dict[str, Any]:
    match event.phase:
        case "downloading":
            digest = f"sha256:{event.digest}"
            sizes = {"total": event.total, "completed": event.done}
            return {"status": f"pulling {event.digest[:12]}", "digest": digest, **sizes}
        case "verifying":
            return {"status": "verifying sha256 digest"}
        case "waiting":
            return {"status": "another process is downloading it"}
        case "done":
            return {"status": "writing manifest"}
        case _:
            return {"status": "pulling manifest"}
