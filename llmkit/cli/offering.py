"""The models that `llmkit serve` offers, from its settings."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmkit.errors import InvalidRequestError, ModelNotFoundError
from llmkit.models.hub import is_hub_name, is_repository
from llmkit.models.library import Library, StoredModel, check_folder
from llmkit.protocol.client import EngineClient
from llmkit.settings.entries import ModelEntry
from llmkit.settings.serving import ServeSettings, ignored
from llmkit.system.resources import usable_cores
from llmkit.wanted import worker_task
from llmkit.workers.budget import Budget, need_of
from llmkit.workers.place import ServedModel

__all__ = ["budget", "echo", "finder", "offered"]

GB = 1e9
ECHO = "echo"


def offered(settings: ServeSettings) -> list[ServedModel]:
    """The models of the command line and of the settings file.

    A missing file or invalid options are found at once: raises what `llmkit.load` raises for them.
    """
    library = _library(settings)
    models = [_served(entry, library) for entry in settings.models]
    names = [name for model in models for name in (model.name, *model.aliases)]
    for name in names:
        if names.count(name) > 1:
            raise InvalidRequestError(
                f"two models are called {name!r:.80}; give them names by tables [models.NAME].",
                "model",
            )
    return models


def echo(settings: ServeSettings) -> EngineClient | None:
    """What answers without a model, if that is what is served: a model called ``echo``.

    Raises `InvalidRequestError` beside other models: any name is its name.
    """
    entry = next((entry for entry in settings.models if entry.model == ECHO), None)
    if entry is None:
        return None
    if len(settings.models) > 1:
        raise InvalidRequestError(
            f"{ECHO} answers without a model, whatever name is asked for: serve it alone.", "model"
        )
    from llmkit.runtime.echo import EchoEngine

    options = {k: v for k, v in entry.engine.items() if k in ("n_ctx", "n_slots", "max_waiting")}
    return EchoEngine(entry.name or ECHO, **options)


def idle_fleet(settings: ServeSettings) -> tuple[str, ...]:
    """Notes on settings of a fleet that no engine can join."""
    if any(entry.model == ECHO for entry in settings.models):
        names, why = ["fleet_listen", "fleet_key_file"], f"{ECHO} answers without engines."
    elif settings.gateway.fleet_listen is None:
        names, why = ["fleet_key_file"], "engines join where fleet_listen says."
    else:
        return ()
    return ignored(settings, names, why)


def finder(settings: ServeSettings) -> Callable[[str], ServedModel | None] | None:
    """Finds models of ``models_dir`` by name; None without such a folder.

    Raises `InvalidRequestError` if the folder cannot be read.
    """
    library = _library(settings)
    if library is None:
        return None

    def find(name: str) -> ServedModel | None:
        # Other spellings are not served: each would be a name of its own.
        stored = library.get(name)
        if stored is None or stored.fault or stored.source != "folder":
            return None
        entry = ModelEntry(
            name=None,
            model=stored.id,
            engine=settings.engine,
            lazy=True,
            idle_unload_s=settings.gateway.idle_unload_s,
            force=settings.gateway.force,
            replicas=settings.gateway.replicas,
        )
        return _served(entry, library, stored)

    return find


def budget(settings: ServeSettings) -> Budget:
    """How much memory all models may take."""
    ram, gpu = settings.gateway.memory_budget_gb, settings.gateway.gpu_budget_gb
    return Budget(
        None if ram is None else int(ram * GB),
        None if gpu is None else int(gpu * GB),
    )


def _library(settings: ServeSettings) -> Library | None:
    folder = settings.gateway.models_dir
    if folder is None:
        return None
    check_folder(Path(folder).expanduser())
    return Library(Path(folder).expanduser(), keep_s=1.0)


def _served(
    entry: ModelEntry, library: Library | None, found: StoredModel | None = None
) -> ServedModel:
    # A file on the Hub may have to be downloaded, which must not hold up the others.
    of_hub = is_hub_name(entry.model) or (
        is_repository(entry.model) and not Path(entry.model).exists()
    )
    name = entry.name if found is None else found.id
    is_spelled = of_hub and name is None
    if is_spelled and not _is_here(entry.model, library):
        from llmkit.models.repositories import called  # what is here already needs none of it

        name = called(entry.model)

    def task() -> dict[str, Any]:
        source: Any = entry.model
        if library is not None:
            try:
                source = library.resolve(entry.model)
            except ModelNotFoundError:
                if found is not None:  # and is gone: nothing else may take its place
                    raise
        options = dict(entry.engine)
        if entry.replicas > 1 and not entry.tuned:
            # Together they use the cores once.
            options.setdefault("threads", max(1, usable_cores() // entry.replicas))
        made = worker_task(source, name=name, tuned=entry.tuned, force=entry.force, **options)
        return {**made, "name": name or made["file"]}

    waits = name is not None and (entry.lazy or of_hub)
    return ServedModel(
        name=name if waits and name is not None else task()["name"],
        task=task,
        need=lambda task: need_of(task).times(entry.replicas),
        # Callers may say what the command line said.
        aliases=(*entry.aliases, entry.model) if is_spelled else entry.aliases,
        lazy=entry.lazy,
        pinned=entry.pinned,
        force=entry.force,
        keep_s=entry.idle_unload_s,
        replicas=entry.replicas,
        is_there=lambda: found is None or all(map(os.path.isfile, found.files)),
    )


def _is_here(model: str, library: Library | None) -> bool:
    """Whether a name of the Hub means what is in the models dir, or a path after all."""
    if is_repository(model) and Path(model).parent.is_dir():
        return True
    try:
        return library is not None and bool(library.find(model))
    except ModelNotFoundError:
        return False
