"""`LocalImages`: a model of this process that draws, behind the `EngineClient` protocol.

One request at a time, on the thread of a `SerialEngine`. The model itself is in a child process
(`llmkit.runtime.image_process`), which an aborted request ends.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

from llmkit.diffusion.extra import check_installed
from llmkit.errors import InsufficientMemoryError, InvalidRequestError
from llmkit.media import pictures
from llmkit.models.image_files import ImageModel, image_model
from llmkit.models.memory import MemoryEstimate, free_ram
from llmkit.models.registry import ModelSpec
from llmkit.protocol import GenerationRequest, ModelDescription
from llmkit.protocol.images import (
    MAX_PROMPT_CHARS,
    MAX_SIDE,
    MAX_WORK,
    MIN_SIDE,
    SIDE,
    Drawing,
    ImageGenerator,
    ImageLines,
    Step,
)
from llmkit.runtime.image_process import PROCESS_BYTES, ImageProcess
from llmkit.runtime.running import running
from llmkit.runtime.serial import PAUSE, SerialEngine
from llmkit.runtime.serial_jobs import Job
from llmkit.settings.options import EngineOptions

__all__ = ["LocalImages", "estimate", "open_images"]

PATCH = 16 * 16  # pixels of a token, which each step costs
CHARS = 4  # of a token of a prompt, about
PIECE = 1 << 18  # characters of a line that are sent at once
STRENGTH = 0.75  # by default: the picture can still be recognised


def open_images(
    spec: ModelSpec,
    options: EngineOptions,
    name: str | None = None,
    *,
    force: bool = False,
    on_progress: Callable[[float], None] = lambda _: None,
) -> LocalImages:
    """The engine for a file that is one of `llmkit.models.image_files`.

    Raises `InsufficientMemoryError`, and `ModelLoadError`, which may name the package to install.
    """
    check_installed()
    model = image_model(spec.path)
    model.check()
    need = estimate(model)
    if not (force or need.fits):
        raise InsufficientMemoryError(
            f"{spec.path.name} needs {need.total_bytes / 1e9:.1f} GB of memory, "
            f"{need.compute_bytes / 1e9:.1f} of it for an image of {_said(model.size)}; "
            f"{need.free_bytes / 1e9:.1f} GB are free. Unload other models, take a smaller file, "
            "or put taesd.safetensors beside it, a small decoder; force=True tries it anyway."
        )
    process = ImageProcess(model, threads=options.threads, on_progress=on_progress, force=force)
    engine = LocalImages(spec, process, options, name)
    running.add(engine)
    return engine


def estimate(model: ImageModel) -> MemoryEstimate:
    """The memory that loading a model takes, and one image of its own size with it."""
    return MemoryEstimate(
        weights_bytes=model.weights_bytes,
        kv_bytes=0,
        compute_bytes=PROCESS_BYTES + model.buffer_bytes,
        free_bytes=free_ram(),
        n_ctx=0,
        n_slots=1,
        kv_tokens=0,
    )


class LocalImages(SerialEngine):
    """An `EngineClient` that only draws."""

    kind = "images"

    def __init__(
        self,
        spec: ModelSpec,
        model: ImageGenerator,
        options: EngineOptions,
        name: str | None = None,
    ) -> None:
        self._model = model
        description = ModelDescription(
            name=name or spec.name,
            path=str(spec.path),
            n_ctx=MAX_PROMPT_CHARS,
            n_slots=1,
            created=int(time.time()),
            image_size=_said(model.size),
            inputs=("image",),  # to start from
            **model.facts,
        )
        super().__init__(description, options.max_waiting)

    def _does(self) -> str:
        name = self.description.name
        return f"{name!r} draws images (/v1/images/generations); it cannot generate text."

    def _check(self, request: GenerationRequest) -> None:
        if not isinstance(request.prompt, str) or request.drawing is None:
            raise InvalidRequestError(self._does(), "model")
        if not request.prompt.strip():
            raise InvalidRequestError("prompt: say what is to be drawn.", "prompt")
        if len(request.prompt) > MAX_PROMPT_CHARS:
            raise InvalidRequestError(
                f"prompt: {len(request.prompt)} characters; at most {MAX_PROMPT_CHARS} are "
                "allowed.",
                "prompt",
            )
        for name, text in (
            ("prompt", request.prompt),
            ("negative_prompt", request.drawing.negative_prompt),
        ):
            if "\0" in text or any("\ud800" <= c <= "\udfff" for c in text):
                raise InvalidRequestError(
                    f"{name}: NUL and halves of surrogate pairs are no text; leave them out.", name
                )
        drawing = self._whole(request.drawing, request.media)
        width, height, steps = drawing.width or 0, drawing.height or 0, drawing.steps or 0
        if drawing.n * steps * width * height > MAX_WORK:
            most = MAX_WORK // (width * height)
            raise InvalidRequestError(
                f"n: {drawing.n} x {steps} steps of {width}x{height} are too much for one request; "
                f"at this size at most {most} steps of all images together are allowed.",
                "n",
            )
        if drawing.image and (refusal := self._model.refusal) is not None:
            raise InvalidRequestError(refusal, "image")
        self._model.check_room(width, height)

    def _lines(self, job: Job) -> Iterator[tuple[str, int]]:
        """Long lines come in pieces. Between two images others may have their turn."""
        drawing, prompt, files = job.request.drawing, str(job.request.prompt), job.request.media
        assert drawing is not None
        job.prompt_tokens = -(-(len(prompt) + len(drawing.negative_prompt)) // CHARS)
        whole = self._whole(drawing, files)
        made_a_step = (whole.width or 0) * (whole.height or 0) // PATCH
        for index in range(whole.n):
            if index:
                yield PAUSE, 0
            one = replace(whole, n=1, seed=(whole.seed or 0) + index)
            job.redone_s = self._model.load_s
            try:
                for event in self._model.images(prompt, one, files, lambda: job.is_over):
                    line = ImageLines.of(replace(event, index=index))
                    made = made_a_step if isinstance(event, Step) and event.step else 0
                    for at in range(0, len(line), PIECE):
                        yield line[at : at + PIECE], 0 if at else made
            finally:
                self._describe()

    def _describe(self) -> None:
        """Without pictures among the inputs once the model has turned out to read none."""
        if self._model.refusal is not None:
            self.description = replace(self.description, inputs=())

    def _whole(self, drawing: Drawing, files: Mapping[str, bytes]) -> Drawing:
        width, height = self._model.size
        if drawing.image:
            width, height = _shaped(_size(drawing, files), width * height)
        return replace(
            drawing,
            width=drawing.width or width,
            height=drawing.height or height,
            seed=secrets.randbelow(2**31) if drawing.seed is None else drawing.seed,
            steps=drawing.steps or self._model.steps,
            strength=STRENGTH if drawing.image and drawing.strength is None else drawing.strength,
        )

    def _free(self) -> None:
        self._model.close()


def _size(drawing: Drawing, files: Mapping[str, bytes]) -> tuple[int, int]:
    """Of the picture to start from. Raises `InvalidRequestError`, also for a mask of another
    size."""
    found = []
    for name, digest in (("image", drawing.image), ("mask", drawing.mask or drawing.image)):
        try:
            found.append(pictures.size(files.get(digest, b"")))
        except InvalidRequestError as error:
            raise InvalidRequestError(f"{name}: {error}", name) from None
    if found[0] != found[1]:
        raise InvalidRequestError(
            f"mask: it has {_said(found[1])} pixels, the image {_said(found[0])}; they must be of "
            "one size.",
            "mask",
        )
    return found[0]


def _shaped(sides: tuple[int, int], pixels: int) -> tuple[int, int]:
    """The sides of an image that is shaped like a picture, and has about so many pixels."""
    scale = (pixels / (sides[0] * sides[1])) ** 0.5
    width, height = (
        min(max(round(side * scale / SIDE) * SIDE, MIN_SIDE), MAX_SIDE) for side in sides
    )
    return width, height


def _said(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
