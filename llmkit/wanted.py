"""What a call or a command wants loaded: the file of a name, and its options."""

from __future__ import annotations

import difflib
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmkit.errors import InvalidRequestError
from llmkit.notebook.progress import shown_download
from llmkit.settings.options import EngineOptions

if TYPE_CHECKING:
    from llmkit.models.registry import ModelSpec

__all__ = ["engine_options", "resolved", "with_tuning", "worker_task"]


def resolved(model: str | Path | ModelSpec) -> ModelSpec:
    """The file of a name; shows a download. Raises `Interrupted` when it is stopped."""
    from llmkit.models.registry import resolve

    with shown_download(str(model)) as on_event:
        return resolve(model, on_event=on_event)


def engine_options(**options: Any) -> EngineOptions:
    """The options of a load. Raises `TypeError` for an unknown one, and `InvalidRequestError`."""
    unknown = set(options) - {f.name for f in fields(EngineOptions)}
    if unknown:
        near = difflib.get_close_matches(min(unknown), [f.name for f in fields(EngineOptions)], n=1)
        raise TypeError(
            f"load() got an unexpected option {min(unknown)!r}"
            + (f"; did you mean {near[0]!r}?" if near else "")
        )
    return EngineOptions(**options)


def with_tuning(spec: ModelSpec, options: dict[str, Any]) -> tuple[ModelSpec, dict[str, Any]]:
    """The file and options that `llmkit.tune` found; explicit options take precedence."""
    from llmkit.bench import tuner

    found = tuner.tuned(spec)
    if found is None:
        message = (
            f"{spec.name!r} has not been tuned on this machine; "
            f"run llmkit.tune({spec.name!r}) once."
        )
        raise InvalidRequestError(message, "tuned")
    best = dict(found[1])
    if options.get("context_shift") or options.get("deterministic"):
        best.pop("kv_unified", None)
    if options.get("quantize") is None:  # else of the model's own file
        spec = replace(spec, path=found[0])
    return spec, {**best, **options}


def worker_task(
    model: str | Path, *, name: str | None, tuned: bool, force: bool, **options: Any
) -> dict[str, Any]:
    """The task of a worker process, for `llmkit serve`.

    Raises what `load` raises for a missing model and for invalid options.
    """
    from llmkit.workers import engine

    spec = resolved(model)
    if tuned:
        spec, options = with_tuning(spec, options)
    return engine.task(spec, engine_options(**options), name=name, force=force)
