"""/v1/models/list, load, reload and unload: one model at a time, as the default. Tornado loop only.

The files are those of the models dir, and no path leads out of it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

from pydantic import AliasChoices, Field

from llmkit.errors import InvalidRequestError, ModelNotFoundError
from llmkit.gateway.access.identity import ADMIN
from llmkit.gateway.access.permission import may_use
from llmkit.gateway.bodies import Strict
from llmkit.gateway.compat.generating import has_model, model_info
from llmkit.gateway.directory import EngineDirectory
from llmkit.gateway.exchange import Exchange
from llmkit.gateway.failures import ApiError
from llmkit.gateway.openai.routes import OpenAIRoutes
from llmkit.gateway.ops.openapi import Route
from llmkit.gateway.served import Served

__all__ = ["LifecycleRoutes"]

MAX_LISTED = 10_000
TAG = "Compatible"


class LoadModelBody(Strict):
    """The model to load: a .gguf file in the models dir, or a name."""

    uses_model: ClassVar[bool] = False

    model: str = Field(validation_alias=AliasChoices("model_path", "model"))
    gpu_layers: int | None = None
    context_size: int | None = None


class EndModelBody(Strict):
    """The model to unload or to load again; without it, the default one."""

    uses_model: ClassVar[bool] = False

    model: str = Field("default", validation_alias=AliasChoices("model", "model_path"))


class LifecycleRoutes:
    """Routes over a server's models.

    ``num_waiting`` counts requests in the queue: while there are any, nothing changes.
    """

    def __init__(
        self,
        served: Served,
        directory: EngineDirectory,
        num_waiting: Callable[[], int],
        models_dir: str | None,
    ) -> None:
        self._served, self._manager = served, served.manager
        self._directory, self._num_waiting = directory, num_waiting
        self._openai = OpenAIRoutes(directory, "")  # for a model that is called "list"
        self._folder = None if models_dir is None else Path(models_dir).expanduser()
        self._switching = asyncio.Lock()

    def routes(self) -> list[Route]:
        load, reload, unload = self.load, self.reload, self.unload
        return [
            Route("GET", "/v1/models/list", self.list, "The files in the models dir", TAG),
            Route(
                "POST",
                "/v1/models/load",
                load,
                "Load a file of the models dir as the default model",
                TAG,
                LoadModelBody,
                also=("/models/load",),
                scope=ADMIN,
            ),
            Route(
                "POST",
                "/v1/models/reload",
                reload,
                "Load the default model again",
                TAG,
                EndModelBody,
                scope=ADMIN,
            ),
            Route(
                "POST",
                "/v1/models/unload",
                unload,
                "Unload the default model",
                TAG,
                EndModelBody,
                also=("/models/unload",),
                scope=ADMIN,
            ),
        ]

    async def list(self, exchange: Exchange) -> None:
        if has_model(self._directory, "list"):
            exchange.args = ("list",)
            await self._openai.get_model(exchange)
            return
        files = [] if self._folder is None else await asyncio.to_thread(_files, self._folder)
        exchange.send_json({"models": [f for f in files if may_use(_name(f))]})

    async def load(self, exchange: Exchange) -> None:
        body = await exchange.read(LoadModelBody)
        name = await self._name_of(body.model)
        async with self._switching:
            self._check_idle("load a model")
            await asyncio.wrap_future(self._manager.load(name))
            self._check_fits(name, body)
            self._manager.set_default(name)
        self._send(exchange, name, "loaded")

    async def reload(self, exchange: Exchange) -> None:
        name = await self._known(exchange)
        async with self._switching:
            self._check_idle("load a model again")
            await asyncio.wrap_future(self._manager.unload(name, again=True))
        self._send(exchange, name, "reloaded")

    async def unload(self, exchange: Exchange) -> None:
        name = await self._known(exchange)
        async with self._switching:
            self._check_idle("unload a model")
            await asyncio.wrap_future(self._manager.unload(name))
        exchange.send_json(
            {"success": True, "message": f"Model unloaded: {name}", "model_info": None}
        )

    async def _known(self, exchange: Exchange) -> str:
        """The model that a body names; an empty one names the default."""
        body = await exchange.read(EndModelBody) if exchange.body.strip() else EndModelBody()
        return await self._served.name_of(body.model) or self._manager.status(body.model).name

    async def _name_of(self, model: str) -> str:
        """The model of a file or of a name.

        Raises `InvalidRequestError` for a file elsewhere, and `ModelNotFoundError`.
        """
        if not model.lower().endswith(".gguf"):
            name = await self._served.name_of(model)
            if name is None and "/" in model:
                raise InvalidRequestError(
                    "model_path: only .gguf files can be loaded.", "model_path"
                )
            return name or self._manager.status(model).name
        if self._folder is None:
            raise InvalidRequestError(
                "model_path: this server has no models_dir to load files from.", "model_path"
            )
        inside = await asyncio.to_thread(_inside, self._folder, model)
        for each in (inside, _name(inside)):
            name = await self._served.name_of(each)
            if name is not None:
                return name
        raise ModelNotFoundError(f"There is no model {model!r:.200} in the models dir.")

    def _check_idle(self, what: str) -> None:
        if self._num_waiting() > 0:
            raise ApiError(409, f"Cannot {what} while requests are queued.", code="model_busy")

    def _check_fits(self, name: str, body: LoadModelBody) -> None:
        """Refuse settings that differ from those of the server, which a request cannot change."""
        model = self._directory.lookup(name).description
        if body.context_size not in (None, model.n_ctx):
            raise InvalidRequestError(
                f"context_size: {name!r} has {model.n_ctx}; set n_ctx in its table of the "
                "configuration.",
                "context_size",
            )
        wants_gpu = None if body.gpu_layers is None else body.gpu_layers != 0
        if wants_gpu not in (None, model.device == "gpu"):
            raise InvalidRequestError(
                f"gpu_layers: {name!r} is on the {model.device.upper()}; set n_gpu_layers in its "
                "table of the configuration.",
                "gpu_layers",
            )

    def _send(self, exchange: Exchange, name: str, done: str) -> None:
        info = model_info(self._directory.lookup(name).description, exchange)
        exchange.send_json(
            {"success": True, "message": f"Model {done}: {name}", "model_info": info}
        )


def _name(file: str) -> str:
    """What the models dir calls a file."""
    return file[: -len(".gguf")] if file.lower().endswith(".gguf") else file


def _files(folder: Path) -> list[str]:
    """The .gguf files in a folder, by their paths in it. On a thread."""
    try:
        found = [f for f in folder.rglob("*") if f.suffix.lower() == ".gguf" and f.is_file()]
    except OSError:
        return []
    return sorted(f.relative_to(folder).as_posix() for f in found[:MAX_LISTED])


def _inside(folder: Path, model: str) -> str:
    """The path of a file in a folder, given that or an absolute one. On a thread.

    Raises `InvalidRequestError` if it leads out of the folder, and `ModelNotFoundError`.
    """
    if "\0" in model:
        raise InvalidRequestError("model_path is no path.", "model_path")
    root = folder.resolve()
    try:
        file = (root / model).resolve(strict=True)
    except (OSError, RuntimeError):
        raise ModelNotFoundError(f"There is no model {model!r:.200} in the models dir.") from None
    if not file.is_relative_to(root):
        raise InvalidRequestError("model_path must be in the models dir.", "model_path")
    return file.relative_to(root).as_posix()
