"""Which files on disk a worker reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmkit.models.image_files import image_model, is_image_model
from llmkit.models.projectors import projector_of
from llmkit.models.registry import resolve
from llmkit.models.speech_files import speech_kind

__all__ = ["files_of"]


def files_of(task: dict[str, Any]) -> frozenset[Path]:
    """The files of a worker's task, links resolved: the model's first or only one, what draws with
    it, its draft model's and its projector.

    Raises what `llmkit.models.registry.resolve` raises for a draft model.
    """
    path, options = Path(task["path"]), task["options"]
    files = [path]
    if not speech_kind(path):
        if is_image_model(path):
            files += image_model(path).files
        elif (projector := projector_of(path, options.get("projector"))) is not None:
            files.append(projector)
        if options.get("draft") is not None:
            files.append(resolve(options["draft"]).path)
    return frozenset(file.resolve() for file in files)
