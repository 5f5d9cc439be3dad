"""Loads a file into llama.cpp, weights and context, if it fits into free memory.

Part of the composition root.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmkit.backend.advice import faster
from llmkit.backend.placement import Placement, chosen
from llmkit.engine.prefill import ALIGNMENT
from llmkit.errors import (
    InsufficientMemoryError,
    InvalidModelFileError,
    InvalidRequestError,
    ModelLoadError,
)
from llmkit.models import gguf, memory, projectors
from llmkit.models.devices import Gpu
from llmkit.models.quantization import scaled
from llmkit.models.registry import ModelSpec, cache_folder, resolve
from llmkit.settings.options import EngineOptions
from llmkit.system.accelerators import accelerators

if TYPE_CHECKING:
    from llmkit.backend.library import Device
    from llmkit.backend.llama import LlamaRunner
    from llmkit.backend.media import Projector
    from llmkit.backend.model import LlamaModel, Loading
    from llmkit.runtime.media import MediaUnit

__all__ = ["POOLING", "estimate", "gpus", "load_draft", "load_target", "loading", "placement_of"]

POOLING = (1, 2, 3, 4)  # how a model that embeds makes one vector of many


def estimate(info: gguf.ModelInfo, options: EngineOptions) -> memory.MemoryEstimate:
    """The memory that a load would take; defaults depend on what is free.

    Raises `InvalidRequestError` for options that this model cannot honour.
    """
    if options.quantize is not None:
        info = scaled(info, options.quantize)
    n_ctx = options.n_ctx or memory.default_context(info)
    if info.max_positions is not None and n_ctx > info.max_positions:
        raise InvalidRequestError(
            f"this model has positions for {info.max_positions} tokens only, not {n_ctx}.",
            "n_ctx",
        )
    n_ctx = -(-n_ctx // 256) * 256  # llama.cpp's cells come in blocks of 256
    there = gpus() if options.n_gpu_layers != 0 else []
    used = [
        Gpu(there[i].name, there[i].free_bytes)
        for i in chosen(placement_of(options), [gpu.name for gpu in there])
    ]
    free = sum(gpu.free_bytes for gpu in used) if used else None
    n_slots = options.n_slots or memory.default_slots(info, n_ctx, free)
    sizes: dict[str, Any] = {
        "n_ctx": n_ctx,
        "n_slots": n_slots,
        "kv_type": options.kv_type,
        "kv_tokens": options.kv_tokens,
        "batch_tokens": options.batch_tokens or memory.BATCH_TOKENS,
        "tensor_split": options.tensor_split,
        "gpus": used,
        "projector_bytes": _projector_bytes(info, options.projector),
        "projector_gpu": options.projector_gpu,
    }
    layers = options.n_gpu_layers
    if layers == "auto":
        layers = memory.layers_that_fit(info, **sizes) if used else 0
    need = memory.estimate(info, n_gpu_layers=layers, **sizes)
    return replace(need, hint=_hint(options, there) or "")


def _projector_bytes(model: gguf.ModelInfo, wanted: str | None) -> int:
    """What a model's projector takes, weights and computing; 0 for one that only lies beside it
    and cannot be used, which is left out. Raises `InvalidModelFileError` for one that is named."""
    if model.value("pooling_type") in POOLING:
        return 0
    path = projectors.projector_of(model.path, wanted)
    if path is None:
        return 0
    try:
        info = projectors.read_projector(path)
    except InvalidModelFileError:
        if wanted is None:
            return 0
        raise
    return info.weights_bytes + projectors.compute_bytes(info)


def _hint(options: EngineOptions, there: list[Device], *, sure: bool = False) -> str | None:
    """What would be faster; None for whoever wants no layer on a GPU."""
    if options.n_gpu_layers == 0:
        return None
    from llmkit.backend import library

    present = accelerators()
    built = library.backends() if present else []
    return faster(built, [gpu.name for gpu in there], present, sure=sure)


def placement_of(options: EngineOptions) -> Placement:
    """Where the options want the model."""
    return Placement(options.split_mode, options.main_device, options.tensor_split)


def gpus() -> list[Device]:
    """The GPUs that llama.cpp can use; querying them takes some memory on each."""
    from llmkit.backend import library

    return library.gpus()


def loading(spec: ModelSpec, options: EngineOptions, need: memory.MemoryEstimate) -> Loading:
    """What loads the weights of the model that generates, to be started."""
    from llmkit.backend.model import Loading

    return Loading(spec.path, n_gpu_layers=need.n_gpu_layers, placement=placement_of(options))


def load_target(
    spec: ModelSpec,
    options: EngineOptions,
    need: memory.MemoryEstimate,
    on_progress: Callable[[float], None],
    loading: Loading | None = None,
    turns: AbstractContextManager[None] | None = None,
) -> tuple[LlamaModel, LlamaRunner, MediaUnit | None]:
    """The model that generates, which `loading` may have begun to load, and what reads images and
    sounds for it; that takes ``turns`` if it is not to work beside the model.

    Raises `ModelLoadError`, leaving nothing in memory.
    """
    from llmkit.backend.llama import LlamaRunner
    from llmkit.backend.model import LlamaModel
    from llmkit.runtime.media import MediaUnit

    better = _hint(options, gpus(), sure=True)
    if better is not None:
        warnings.warn(better, RuntimeWarning, stacklevel=4)
    model = LlamaModel(
        spec.path,
        n_gpu_layers=need.n_gpu_layers,
        placement=placement_of(options),
        on_progress=on_progress,
        loading=loading,
    )
    projector: Projector | None = None
    try:
        if not model.can_generate:
            raise ModelLoadError(
                f"{spec.path.name} is not a text generation model: "
                "it has no plain decoder, or no vocabulary."
            )
        projector = _load_projector(model, spec, options, need)
        runner = LlamaRunner(
            model,
            n_ctx=need.n_ctx,
            n_slots=need.n_slots,
            max_batch_tokens=max(
                options.batch_tokens or 512,
                ALIGNMENT + need.n_slots if options.deterministic else 0,
                projector.largest_whole if projector is not None else 0,
            ),
            threads=options.threads,
            kv_unified=options.kv_unified,
            kv_tokens=options.kv_tokens,
            kv_type=options.kv_type,
            flash_attention=options.flash_attention,
            rope_scaling=options.rope_scaling,
            host_tokens=int(min(options.host_cache_mb * (1 << 20), memory.free_ram() // 8))
            // max(need.kv_bytes_per_token, 1024),
            prefix_dir=None if options.prefix_dir is None else Path(options.prefix_dir),
            max_disk_bytes=int(options.disk_cache_mb * (1 << 20)),
            locks=cache_folder().parent / "locks",
            deterministic=options.deterministic,
            lora=[Path(path) for path, _ in options.lora],
        )
        media = (
            MediaUnit(projector, runner.max_batch_tokens, None if options.encode_beside else turns)
            if projector is not None
            else None
        )
        return model, runner, media
    except BaseException:
        if projector is not None:
            projector.close()
        model.close()
        raise


def _load_projector(
    model: LlamaModel, spec: ModelSpec, options: EngineOptions, need: memory.MemoryEstimate
) -> Projector | None:
    path = projectors.projector_of(spec.path, options.projector)
    if path is None:
        return None
    info = projectors.read_projector(path)
    from llmkit.backend.library import num_threads
    from llmkit.backend.media import Projector

    return Projector(
        path,
        model,
        threads=options.threads or num_threads(),
        use_gpu=options.projector_gpu and need.n_gpu_layers != 0,
        side=info.integer("vision.image_size"),
    )


def load_draft(
    target: LlamaModel, options: EngineOptions, need: memory.MemoryEstimate, force: bool
) -> tuple[LlamaModel, LlamaRunner]:
    """The draft model, with the same slots.

    Raises `InvalidRequestError` if it cannot draft for ``target``, else what `load` raises.
    """
    from llmkit.backend.llama import LlamaRunner
    from llmkit.backend.model import LlamaModel

    spec = resolve(str(options.draft))
    if target.is_recurrent:
        raise InvalidRequestError(
            "this model is recurrent, so rejected tokens cannot be undone; leave draft out.",
            "draft",
        )
    layout: dict[str, Any] = (
        {"kv_unified": True, "kv_tokens": need.kv_tokens} if options.kv_unified else {}
    )
    its_options = replace(
        EngineOptions(n_ctx=need.n_ctx, n_slots=need.n_slots, projector=projectors.NONE, **layout),
        n_gpu_layers=options.n_gpu_layers,
        split_mode=options.split_mode,
        main_device=options.main_device,
        tensor_split=options.tensor_split,
    )
    its_need = estimate(gguf.read_header(spec.path), its_options)
    if not (force or its_need.fits):
        raise InsufficientMemoryError(f"the draft model {spec.path.name}: {its_need.advice()}")
    model = LlamaModel(
        spec.path, n_gpu_layers=its_need.n_gpu_layers, placement=placement_of(options)
    )
    try:
        if not model.can_generate or not model.vocab.is_same(target.vocab):
            raise InvalidRequestError(
                f"the draft model {spec.name!r} has a different vocabulary, so it cannot draft.",
                "draft",
            )
        if model.is_recurrent:
            raise InvalidRequestError(
                f"the draft model {spec.name!r} is recurrent, so rejected tokens cannot be undone.",
                "draft",
            )
        return model, LlamaRunner(
            model, n_ctx=its_need.n_ctx, n_slots=its_need.n_slots, threads=options.threads, **layout
        )
    except BaseException:
        model.close()
        raise
