"""Stable-diffusion.cpp in C calls: an `ImageGenerator` that owns its process.

Its callbacks are global, and nothing stops it but the end of the process, so it runs in one of its
own, on that one's main thread (`llmkit.runtime.image_child`). The package's own Python is left out:
it takes paths of adapters out of prompts.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import sys
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from llmkit.diffusion.files import encoded
from llmkit.diffusion.start import Start
from llmkit.errors import EngineError, ModelLoadError
from llmkit.protocol.images import Drawing, Picture, Step
from llmkit.system.resources import usable_cores
from llmkit.system.text import printable

__all__ = ["StableDiffusion", "Weights"]

PROJECTION = 1  # previews: the latent image's own colours, at an eighth of the size
TINY = 2  # previews by the small decoder, where there is one
TILED_PIXELS = 512 * 512  # larger images are decoded in tiles
WARNING = 2  # of the library's levels
ENCODED = "encode_first_stage completed"  # what it says before the first step from a picture


@dataclass(frozen=True, slots=True)
class Weights:
    """The files of a model: one that is whole, or a denoiser, and ``parts`` by name. ``cfg_scale``
    is its own."""

    path: Path
    is_whole: bool
    cfg_scale: float
    parts: dict[str, Path] = field(default_factory=dict)


class StableDiffusion:
    """A model in this process; one that ``reads`` can also start from a picture.

    Raises `ModelLoadError` with the library's own last words.
    """

    def __init__(
        self,
        model: Weights,
        threads: int | None,
        on_progress: Callable[[float], None],
        *,
        reads: bool = False,
    ) -> None:
        self._library: Any = importlib.import_module("stable_diffusion_cpp.stable_diffusion_cpp")
        self._model = model
        self._words: deque[str] = deque(maxlen=5)
        self._uses_gpu = False
        self._on_progress: Callable[[int, int], None] = lambda done, all_: on_progress(
            done / max(1, all_)
        )
        self._on_preview: Callable[[Any], None] = lambda _: None
        self._on_encoded: Callable[[], None] = lambda: None
        self._set_callbacks()
        parameters = self._library.sd_ctx_params_t()
        self._library._lib.sd_ctx_params_init(ctypes.byref(parameters))
        whole = "model_path" if model.is_whole else "diffusion_model_path"
        setattr(parameters, whole, os.fsencode(model.path))
        for name, path in model.parts.items():
            setattr(parameters, f"{name}_path", os.fsencode(path))
        parameters.n_threads = threads or usable_cores()
        parameters.free_params_immediately = False
        parameters.vae_decode_only = not reads
        parameters.diffusion_flash_attn = True
        self._context = self._library.new_sd_ctx(ctypes.byref(parameters))
        if not self._context:
            raise ModelLoadError(f"{model.path.name} cannot be loaded{self._last_words()}.")

    @property
    def uses_gpu(self) -> bool:
        """Whether the library said that it computes on one."""
        return self._uses_gpu

    def draw(
        self,
        prompt: str,
        options: Drawing,
        files: Mapping[str, bytes],
        tell: Callable[[Step | Picture], None],
    ) -> None:
        """Draw the images one after the other, from what ``files`` hold by digest. Raises
        `EngineError`, and `InvalidRequestError` for a file that cannot be read."""
        self._words.clear()
        start = Start.of(options, files)
        for index in range(options.n):
            picture = self._one(prompt, options, start, index, tell)
            tell(picture)

    def _one(
        self,
        prompt: str,
        options: Drawing,
        start: Start | None,
        index: int,
        tell: Callable[[Step | Picture], None],
    ) -> Picture:
        assert options.seed is not None and options.steps is not None
        assert options.width is not None and options.height is not None
        steps = options.steps if start is None else start.steps
        counter = _Counter(index, steps, options.previews, is_encoding=start is not None)
        seed = options.seed + index
        waiting: list[Step] = []

        def count(done: int, all_: int) -> None:
            step = counter.count(done, all_)
            if step is not None:
                waiting.append(step)
                if not counter.shows(step.step):
                    flush(b"")

        def flush(preview: bytes) -> None:
            while waiting:
                step = waiting.pop(0)
                tell(Step(step.index, step.step, step.steps, b"" if waiting else preview))

        def show(image: Any) -> None:
            if waiting:
                flush(encoded(_pixels(image), image.width, image.height, options))

        self._on_progress, self._on_preview = count, show
        self._on_encoded = counter.begin
        kind = TINY if "taesd" in self._model.parts else PROJECTION
        self._set_preview(kind if options.previews else 0, counter.interval)
        asked = self._asked(prompt, options, start, seed)
        found = self._library.generate_image(self._context, ctypes.byref(asked))
        flush(b"")
        if not found or not found[0].data:
            raise EngineError(f"no image was made{self._last_words()}.")
        image = found[0]
        facts = {
            "prompt": prompt,
            "negative_prompt": options.negative_prompt,
            "seed": str(seed),
            "steps": str(options.steps),
            "cfg_scale": f"{self._scale(options):g}",
            "model": self._model.path.stem,
        }
        if start is not None:
            facts["strength"] = f"{options.strength:g}"
        data = encoded(_pixels(image), image.width, image.height, options, facts)
        width, height = int(image.width), int(image.height)
        _free(image.data, found)
        return Picture(index, seed, width, height, data)

    def _asked(self, prompt: str, options: Drawing, start: Start | None, seed: int) -> Any:
        assert options.width is not None and options.height is not None
        asked = self._library.sd_img_gen_params_t()
        self._library._lib.sd_img_gen_params_init(ctypes.byref(asked))
        asked.prompt, asked.negative_prompt = prompt.encode(), options.negative_prompt.encode()
        asked.width, asked.height, asked.seed = options.width, options.height, seed
        asked.sample_params.sample_steps = options.steps
        asked.sample_params.guidance.txt_cfg = self._scale(options)
        method = self._library.sd_get_default_sample_method(self._context)
        asked.sample_params.sample_method = method
        asked.sample_params.scheduler = self._library.sd_get_default_scheduler(
            self._context, method
        )
        asked.vae_tiling_params.enabled = options.width * options.height > TILED_PIXELS
        if start is not None:
            asked.strength = start.strength
            asked.init_image = self._image(start.picture)
            if start.mask is not None:
                asked.mask_image = self._image(start.mask)
        return asked

    def _image(self, pixels: np.ndarray) -> Any:
        """Pixels that the caller keeps, uint8 of shape (height, width, channels)."""
        height, width, channels = pixels.shape
        data = pixels.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        return self._library.sd_image_t(width, height, channels, data)

    def _scale(self, options: Drawing) -> float:
        return self._model.cfg_scale if options.cfg_scale is None else options.cfg_scale

    def _last_words(self) -> str:
        return f": {' | '.join(self._words)}" if self._words else ""

    def _set_callbacks(self) -> None:
        @self._library.sd_log_callback  # type: ignore[untyped-decorator]
        def said(level: int, text: bytes, _: Any) -> None:
            words = printable(text.decode("utf-8", "replace").strip())
            self._uses_gpu |= words.endswith(("Using CUDA backend", "Using Metal backend"))
            if ENCODED in words:
                self._on_encoded()
            if level >= WARNING and words:
                self._words.append(words.partition(" - ")[2] or words)
                print(words, file=sys.stderr, flush=True)

        @self._library.sd_progress_callback  # type: ignore[untyped-decorator]
        def went(step: int, steps: int, seconds: float, _: Any) -> None:
            self._on_progress(step, steps)

        @self._library.sd_preview_callback  # type: ignore[untyped-decorator]
        def saw(step: int, num_frames: int, frames: Any, is_noisy: bool, _: Any) -> None:
            if num_frames:
                self._on_preview(frames[0])

        self._callbacks = said, went, saw  # which C holds
        self._library.sd_set_log_callback(said, None)
        self._library.sd_set_progress_callback(went, None)

    def _set_preview(self, kind: int, interval: int) -> None:
        callback = self._callbacks[2] if kind else None
        self._library.sd_set_preview_callback(callback, kind, interval, True, False, None)


@dataclass(slots=True)
class _Counter:
    """The steps of an image among all that the library counts: tensors and tiles are none, nor
    what it counts while it ``is_encoding`` a picture."""

    index: int
    steps: int
    previews: int
    is_encoding: bool = False
    last: int = -1

    def begin(self) -> None:
        self.is_encoding = False

    def count(self, done: int, all_: int) -> Step | None:
        """The step, if it is the next."""
        if self.is_encoding or all_ != self.steps or done != self.last + 1:
            return None
        self.last = done
        return Step(self.index, done, self.steps)

    @property
    def interval(self) -> int:
        """After how many steps one is shown; the last is not, since the image itself follows."""
        if not self.previews:
            return self.steps
        even = round(self.steps / (self.previews + 1))
        return max(1, min(even, (self.steps - 1) // self.previews))

    def shows(self, step: int) -> bool:
        """Whether it is one of those that are shown."""
        number, rest = divmod(step, self.interval)
        return not rest and 0 < number <= self.previews and step < self.steps


def _pixels(image: Any) -> bytes:
    if image.channel != 3:
        raise EngineError(f"the library made an image of {image.channel} channels.")
    return ctypes.string_at(image.data, image.width * image.height * 3)


def _free(*pointers: Any) -> None:
    """Give back what the library allocated."""
    if sys.platform != "win32":  # where the library has a heap of its own
        free = ctypes.CDLL(None).free
        free.argtypes, free.restype = [ctypes.c_void_p], None
        for pointer in pointers:
            free(ctypes.cast(pointer, ctypes.c_void_p))
