"""For the tests of drawing: a model that draws without a library, and a reader of images."""

from __future__ import annotations

import io
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from llmkit.bridge.child import Owner
from llmkit.diffusion.files import encoded
from llmkit.errors import EngineError, InvalidRequestError, ModelLoadError
from llmkit.protocol.images import Drawing, ImageLines, Picture, Step

__all__ = ["FakePainter", "image", "loading"]


class FakePainter:
    """An `ImageGenerator` whose images have the colour of their seed. ``gate``, if set, is waited
    for before each step after the first."""

    size, steps, load_s = (128, 64), 4, 0.0
    refusal: str | None = None
    max_pixels = 1 << 22

    def __init__(self) -> None:
        self.facts: dict[str, Any] = {"architecture": "fake", "weights_bytes": 1000}
        self.gate: threading.Semaphore | None = None
        self.stopped = threading.Event()
        self.asked: list[tuple[str, Drawing]] = []
        self.files: dict[str, bytes] = {}

    def check_room(self, width: int, height: int) -> None:
        if width * height > self.max_pixels:
            raise InvalidRequestError("size: 64x64 fits.", "size")

    def images(
        self,
        prompt: str,
        options: Drawing,
        files: Mapping[str, bytes],
        is_over: Callable[[], bool] = lambda: False,
    ) -> Iterator[Step | Picture]:
        self.asked.append((prompt, options))
        self.files = dict(files)
        width, height = options.width or 0, options.height or 0
        assert options.seed is not None and options.steps is not None
        for index in range(options.n):
            if prompt == "crash":
                raise EngineError("the process that draws was ended by SIGKILL")
            shown = [
                round(options.steps * (i + 1) / (options.previews + 1))
                for i in range(options.previews)
            ]
            for step in range(options.steps + 1):
                while self.gate is not None and step and not self.gate.acquire(timeout=0.05):
                    if is_over():
                        self.stopped.set()
                        return
                small = bytes([step, 0, 0]) * (width * height // 64)
                seen = encoded(small, width // 8, height // 8, options)
                yield Step(index, step, options.steps, seen if step in shown else b"")
            seed = options.seed + index
            pixels = bytes([seed % 256, 7, 9]) * (width * height)
            data = encoded(pixels, width, height, options, {"seed": str(seed)})
            yield Picture(index, seed, width, height, data)

    def close(self) -> None:
        self.stopped.set()


def loading(owner: Owner) -> None:
    """For a child process: a model that reads no pictures, which the name of its file says how."""
    if owner.task["reads"]:
        if Path(owner.task["path"]).stem == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise ModelLoadError("tensor 'encoder' is missing.")
    owner.ready(uses_gpu=False)
    while owner.asked() is not None:
        owner.tell(ImageLines.of(Step(0, 1, 1)))
        owner.done()


def image(data: bytes) -> Image.Image:
    found = Image.open(io.BytesIO(data))
    found.load()
    return found
