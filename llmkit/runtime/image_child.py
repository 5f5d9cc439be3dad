"""The process of a model that draws: it holds the model, and ends when its owner does.

Nothing stops the library in the middle of an image, so the owner ends this process instead.
"""

from __future__ import annotations

import base64
import os
import threading
from pathlib import Path

from llmkit.bridge.child import Owner
from llmkit.errors import LLMKitError
from llmkit.protocol.images import Drawing, ImageLines

__all__ = ["TARGET", "run"]

TARGET = "llmkit.runtime.image_child:run"
NICE = 5  # chats go first: each of their tokens is waited for


def run(owner: Owner) -> None:
    """Load, and draw what is asked for. Raises what a load raises, and `EngineError`."""
    # Imported here: a starting gateway imports this module too, and should not wait for numpy.
    from llmkit.diffusion.stable_diffusion import StableDiffusion, Weights

    task = owner.task
    if hasattr(os, "nice"):
        os.nice(NICE)
    parts = {name: Path(path) for name, path in task["parts"].items()}
    weights = Weights(Path(task["path"]), task["is_whole"], task["cfg_scale"], parts)
    model = StableDiffusion(weights, task["threads"], owner.progress, reads=task["reads"])
    threading.Thread(target=_end_with, args=(owner,), name="llmkit-end", daemon=True).start()
    owner.ready(uses_gpu=model.uses_gpu)
    while (asked := owner.asked()) is not None:
        try:
            model.draw(
                asked["prompt"],
                Drawing(**asked["drawing"]),
                {digest: base64.b64decode(text) for digest, text in asked["files"].items()},
                lambda event: owner.tell(ImageLines.of(event)),
            )
        except LLMKitError as error:
            owner.fail(error)
        else:
            owner.done()


def _end_with(owner: Owner) -> None:
    owner.wait()
    os._exit(0)
