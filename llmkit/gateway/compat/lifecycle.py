"""/v1/models/list, load, reload and unload: one model at a time, as the default. Tornado loop only.

The files are those of the models dir, and no path leads out of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections import deque
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import ClassVar

from pydantic import AliasChoices, Field

from llmkit.errors import InvalidRequestError, ModelNotFoundError
from llmkit.gateway.access.identity import ADMIN
from llmkit.gateway.access.permission import may_use
from llmkit.gateway.aside import Aside
from llmkit.gateway.bodies import Strict
from llmkit.gateway.compat.generating import has_model, model_info
from llmkit.gateway.directory import EngineDirectory
from llmkit.gateway.exchange import Exchange
from llmkit.gateway.failures import ApiError
from llmkit.gateway.openai.routes import OpenAIRoutes
from llmkit.gateway.ops.openapi import Route
from llmkit.gateway.served import Served

__all__ = ["LifecycleRoutes"]

MAX_LISTED, MAX_SEEN = 10_000, 100_000  # files; entries of folders
LISTED_S = 2.0
TAG = "Compatible"
Files = list[str]  # inside the class, `list` is its method


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
        self._aside = Aside(2, "llmkit-models-dir")  # a slow disk holds up nothing else
        self._looking: asyncio.Task[list[str]] | None = None
        self._looked_at = 0.0

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
        exchange.send_json({"models": [f for f in await self._files() if may_use(_name(f))]})

    async def _files(self) -> Files:
        """The files in the models dir: looked for every few seconds at most, whoever asks."""
        folder = self._folder
        if folder is None:
            return []
        if self._looking is None or (
            self._looking.done() and time.monotonic() - self._looked_at >= LISTED_S
        ):
            self._looking = asyncio.create_task(self._look(folder))
        return await asyncio.shield(self._looking)

    async def _look(self, folder: Path) -> Files:
        try:
            return await self._aside.run("", lambda _: _files(folder))
        finally:
            self._looked_at = time.monotonic()

    async def load(self, exchange: Exchange) -> None:
        body = await exchange.read(LoadModelBody)
        name = await self._name_of(exchange, body.model)
        await self._check_planned(exchange, name, body)
        async with self._switching:
            self._check_idle("load a model")
            await asyncio.wrap_future(self._manager.load(name))
            self._check_loaded(name, body)
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

    async def _name_of(self, exchange: Exchange, model: str) -> str:
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
        folder = self._folder
        inside = await self._aside.run(exchange.caller, lambda _: _inside(folder, model))
        for each in (inside, _name(inside)):
            name = await self._served.name_of(each)
            if name is not None:
                return name
        raise ModelNotFoundError(f"There is no model {model!r:.200} in the models dir.")

    def _check_idle(self, what: str) -> None:
        if self._num_waiting() > 0:
            raise ApiError(409, f"Cannot {what} while requests are queued.", code="model_busy")

    async def _check_planned(self, exchange: Exchange, name: str, body: LoadModelBody) -> None:
        """Refuse what differs from the server's settings, before anything is loaded for it."""
        if body.context_size is None and not body.gpu_layers:
            return
        if self._manager.phase(name) == "ready":
            self._check_loaded(name, body)
            return
        need = await self._aside.run(exchange.caller, lambda _: self._manager.need_of(name))
        _check_settings(name, body, need.n_ctx, None if need.gpu_bytes else False)

    def _check_loaded(self, name: str, body: LoadModelBody) -> None:
        """The same of a model that is there."""
        model = self._directory.lookup(name).description
        _check_settings(name, body, model.n_ctx, model.device == "gpu")

    def _send(self, exchange: Exchange, name: str, done: str) -> None:
        info = model_info(self._directory.lookup(name).description, exchange)
        exchange.send_json(
            {"success": True, "message": f"Model {done}: {name}", "model_info": info}
        )


def _check_settings(name: str, body: LoadModelBody, n_ctx: int, on_gpu: bool | None) -> None:
    """Refuse what a request cannot change. A context of 0 and None are not known."""
    if n_ctx and body.context_size not in (None, n_ctx):
        raise InvalidRequestError(
            f"context_size: {name!r} has {n_ctx}; set n_ctx in its table of the configuration.",
            "context_size",
        )
    wants_gpu = None if body.gpu_layers is None else body.gpu_layers != 0
    if None not in (wants_gpu, on_gpu) and wants_gpu != on_gpu:
        raise InvalidRequestError(
            f"gpu_layers: {name!r} is on the {'GPU' if on_gpu else 'CPU'}; set n_gpu_layers in "
            "its table of the configuration.",
            "gpu_layers",
        )


def _name(file: str) -> str:
    """What the models dir calls a file."""
    return file[: -len(".gguf")] if file.lower().endswith(".gguf") else file


def _files(folder: Path) -> list[str]:
    """The .gguf files in a folder, by their paths in it; looks at so many entries. On a thread."""
    found: list[str] = []
    waiting, num_left = deque([str(folder)]), MAX_SEEN
    while waiting and num_left > 0 and len(found) < MAX_LISTED:
        with contextlib.suppress(OSError), os.scandir(waiting.popleft()) as entries:
            for entry in islice(entries, num_left):
                num_left -= 1
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(entry.path)
                elif entry.name.lower().endswith(".gguf") and os.path.isfile(entry.path):
                    found.append(Path(entry.path).relative_to(folder).as_posix())
    return sorted(found)[:MAX_LISTED]


def _inside(folder: Path, model: str) -> str:
    """The path of a file in a folder, given that or an absolute one. On a thread.

    Raises `InvalidRequestError` if it leads out of the folder, whatever is there, and
    `ModelNotFoundError`.
    """
    if "\0" in model:
        raise InvalidRequestError("model_path is no path.", "model_path")
    root = folder.resolve()
    try:
        file = (root / model).resolve()
    except (OSError, RuntimeError, ValueError):  # a ring of links, or what no name can be
        file = Path()
    if not file.is_relative_to(root):
        raise InvalidRequestError("model_path must be in the models dir.", "model_path")
    if not os.path.isfile(file):
        raise ModelNotFoundError(f"There is no model {model!r:.200} in the models dir.")
    return file.relative_to(root).as_posix()
