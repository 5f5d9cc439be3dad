"""The worker process: a model, served over the bridge until its owner ends it.

The owner needs no llama.cpp.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from llmkit.bridge.child import Owner
from llmkit.errors import EngineGoneError
from llmkit.models.registry import ModelSpec
from llmkit.settings.options import EngineOptions

__all__ = ["TARGET", "WARM_UP", "run", "task"]

TARGET = "llmkit.workers.engine:run"
LOOK_S = 0.5


def task(
    spec: ModelSpec,
    options: EngineOptions,
    *,
    name: str | None,
    force: bool = False,
    kernel_id: str | None = None,
) -> dict[str, Any]:
    """The task for `run`: load this model, and serve it."""
    return {
        "file": spec.name,
        "path": str(spec.path),
        "options": options.as_dict(),
        "name": name,
        "force": force,
        "kernel_id": kernel_id,
    }


# What every load needs, the first of it first: imported while the task is on its way.
WARM_UP = (
    "llmkit.runtime.opening",
    "llmkit.backend.model",
    "llmkit.backend.llama",
    "llmkit.bridge.server",
    "llmkit.runtime.local",
    "llmkit.backend.grammar",
    "jinja2.sandbox",
    "jupyter_core.paths",
    "psutil",
    "llmkit.runtime.media",
    "numpy.ctypeslib",
)


def run(owner: Owner) -> None:
    """Load, report the connection file, and serve until told to end. Raises what a load raises."""
    from llmkit.bridge.server import BridgeServer
    from llmkit.runtime.opening import open_model

    wanted = owner.task
    spec = ModelSpec(wanted["file"], Path(wanted["path"]))
    engine = open_model(
        spec,
        EngineOptions(**wanted["options"]),
        name=wanted["name"],
        force=wanted["force"],
        on_progress=owner.progress,
    )
    reason: str | None = None
    try:
        server = BridgeServer(engine, wanted["kernel_id"])
        # No busy cells here: with Python's default the engine finishes its step undisturbed.
        sys.setswitchinterval(0.005)
        owner.ready(path=str(server.connection.path))
        while reason is None and not owner.wait(LOOK_S):
            if not server.alive:
                reason = server.reason or "its bridge has ended"
            elif engine.state.is_gone and not server.is_unloading:
                reason = engine.state.reason or "the engine has ended"
        server.close(reason or "the model was unloaded")
    finally:
        engine.close()
    if reason is not None:
        print(f"llmkit: {reason}", file=sys.stderr, flush=True)
        raise EngineGoneError(reason)
