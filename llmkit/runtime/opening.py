"""The composition root: a model file becomes a running engine in this process."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from llmkit.backend.placement import chosen
from llmkit.errors import InsufficientMemoryError, ModelLoadError
from llmkit.models import gguf, memory
from llmkit.models.image_files import is_image_model
from llmkit.models.projectors import NONE, projector_of
from llmkit.models.registry import ModelSpec, resolve
from llmkit.models.speech_files import speech_kind
from llmkit.runtime import assembly
from llmkit.runtime.assembly import POOLING, estimate, placement_of
from llmkit.runtime.probing import probe
from llmkit.runtime.quantizing import quantized
from llmkit.runtime.running import running
from llmkit.settings.options import EngineOptions
from llmkit.system.reporting import report

if TYPE_CHECKING:
    from llmkit.runtime.embedder import LocalEmbedder
    from llmkit.runtime.images import LocalImages
    from llmkit.runtime.local import LocalEngine
    from llmkit.runtime.speech import LocalSpeech

__all__ = ["open_model"]

MAKING = 0.9  # of the progress, when a copy has to be made first
logger = logging.getLogger("llmkit")


def open_model(
    model: str | Path | ModelSpec,
    options: EngineOptions,
    *,
    name: str | None = None,
    force: bool = False,
    on_progress: Callable[[float], None] = lambda _: None,
    meanwhile: Callable[[], None] = lambda: None,
) -> LocalEngine | LocalEmbedder | LocalSpeech | LocalImages:
    """The engine that the file calls for: one that generates, embeds, hears, speaks or draws.

    ``meanwhile`` is called while the weights of one that generates are read.
    Raises what `llmkit.load` documents.
    """
    spec = resolve(model)
    if speech_kind(spec.path):
        from llmkit.runtime.speech import open_speech

        return open_speech(spec, options, name)
    if is_image_model(spec.path):
        from llmkit.runtime.images import open_images

        return open_images(spec, options, name, force=force, on_progress=on_progress)
    info = gguf.read_header(spec.path)
    _check_memory(info, options, force)
    if options.quantize is not None:
        spec, on_progress = _quantized(spec, options.quantize, on_progress)
        info = gguf.read_header(spec.path)
    options = _probed(spec, info, options, lambda: on_progress(0.0))
    if options.draft:
        probe(resolve(options.draft).path, on_wait=lambda: on_progress(0.0))
    with running.opening:
        return _open(spec, info, options, name, force, on_progress, meanwhile)


def _probed(
    spec: ModelSpec, info: gguf.ModelInfo, options: EngineOptions, on_wait: Callable[[], None]
) -> EngineOptions:
    """Try the files in a child. Returns the options with the projector that is to be loaded: one
    that was only found beside the model is left out if it does not fit."""
    lora = [Path(p) for p, _ in options.lora]
    embeds = info.value("pooling_type") in POOLING
    projector = None if embeds else projector_of(spec.path, options.projector)
    try:
        probe(spec.path, lora, projector, on_wait=on_wait)
    except ModelLoadError as error:
        if projector is None or options.projector is not None:
            raise
        probe(spec.path, lora, on_wait=on_wait)  # raises if the model is to blame
        report(f"{spec.path.name} is loaded for text alone: {error}")
        projector = None
    return replace(options, projector=NONE if projector is None else str(projector))


def _quantized(
    spec: ModelSpec, kind: str, on_progress: Callable[[float], None]
) -> tuple[ModelSpec, Callable[[float], None]]:
    """The model in another type, and what reports the rest of the work."""
    done = quantized(spec, kind, on_progress=lambda share: on_progress(MAKING * share))
    for note in filter(None, (done.note, done.detail)):
        if done.made and note is done.note:
            report(note)
        else:
            logger.info("%s", note)
    rest = (lambda share: on_progress(MAKING + (1 - MAKING) * share)) if done.made else on_progress
    return replace(spec, path=done.path), rest


def _open(
    spec: ModelSpec,
    info: gguf.ModelInfo,
    options: EngineOptions,
    name: str | None,
    force: bool,
    on_progress: Callable[[float], None],
    meanwhile: Callable[[], None],
) -> LocalEngine | LocalEmbedder:
    """Take the memory and load; one load at a time."""
    if info.value("pooling_type") not in POOLING:
        need = estimate(info, options)
        _check(info, need, force)
        loading = assembly.loading(spec, options, need)
        try:
            loading.start()
            # Most of Python's part is imported while the weights are read.
            import llmkit.backend.grammar
            import llmkit.backend.llama  # noqa: F401
            from llmkit.runtime.local import LocalEngine

            meanwhile()
            begun = need, loading
            return LocalEngine(
                spec, options, name=name, force=force, on_progress=on_progress, begun=begun
            )
        except BaseException:
            loading.cancel()
            raise
    from llmkit.runtime.embedder import LocalEmbedder

    there = assembly.gpus() if options.n_gpu_layers != 0 else []
    chosen(placement_of(options), [gpu.name for gpu in there])
    need = memory.estimate(info, n_ctx=options.n_ctx or memory.default_context(info), n_slots=1)
    _check(info, need, force or bool(there))
    embedder = LocalEmbedder(spec, info, options, running.turns, name)
    running.add(embedder)
    return embedder


def _check_memory(info: gguf.ModelInfo, options: EngineOptions, force: bool) -> None:
    """Refuse what does not fit before anything is tried with it."""
    if info.value("pooling_type") not in POOLING:
        _check(info, estimate(info, options), force)


def _check(info: gguf.ModelInfo, need: memory.MemoryEstimate, force: bool) -> None:
    if not (force or need.fits):
        raise InsufficientMemoryError(f"{info.path.name}: {need.advice()}")
