"""The models that `llmkit serve` offers, from its settings."""

from __future__ import annotations

from typing import Any

from llmkit.loading import worker_task
from llmkit.models.hub import is_hub_name
from llmkit.settings.serving import ServeSettings
from llmkit.workers.budget import need_of
from llmkit.workers.place import ServedModel

__all__ = ["offered"]


def offered(settings: ServeSettings) -> list[ServedModel]:
    """The models named on the command line.

    A missing file or invalid options are found at once: raises what `llmkit.load` raises for them.
    """
    options = settings.gateway
    if options.model is None:
        return []
    return [
        _served(
            options.model,
            options.name,
            settings.engine,
            tuned=options.tuned,
            force=options.force,
        )
    ]


def _served(
    model: str, name: str | None, engine: dict[str, Any], *, tuned: bool, force: bool, **more: Any
) -> ServedModel:
    def task() -> dict[str, Any]:
        made = worker_task(model, name=name, tuned=tuned, force=force, **engine)
        return {**made, "name": name or made["file"]}

    known = name if is_hub_name(model) and name is not None else task()["name"]
    return ServedModel(known, task, need_of, force=force, **more)
