"""Loads a file into llama.cpp, weights and context, if it fits into free memory.

Part of the composition root.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmkit.engine.prefill import ALIGNMENT
from llmkit.errors import InsufficientMemoryError, InvalidRequestError, ModelLoadError
from llmkit.models import gguf, memory
from llmkit.models.registry import ModelSpec, cache_folder, resolve
from llmkit.settings.options import EngineOptions

if TYPE_CHECKING:
    from llmkit.backend.llama import LlamaRunner
    from llmkit.backend.model import LlamaModel

__all__ = ["device_memory", "estimate", "load_draft", "load_target"]

GPU_HINT = (
    "there is a GPU, but this build of llama.cpp is CPU only. Install the GPU build with\n"
    '    CMAKE_ARGS="-DGGML_CUDA=on" pip install --force-reinstall '
    "--no-cache-dir --no-deps llama-cpp-python"
)


def estimate(info: gguf.ModelInfo, options: EngineOptions) -> memory.MemoryEstimate:
    """The memory that a load would take; defaults depend on what is free.

    Raises `InvalidRequestError` for options that this model cannot honour.
    """
    n_ctx = options.n_ctx or memory.default_context(info)
    if info.max_positions is not None and n_ctx > info.max_positions:
        raise InvalidRequestError(
            f"this model has positions for {info.max_positions} tokens only, not {n_ctx}.",
            "n_ctx",
        )
    n_ctx = -(-n_ctx // 256) * 256  # llama.cpp's cells come in blocks of 256
    device = device_memory() if options.n_gpu_layers != 0 else None
    free = None if device is None else device[1] - device[0]
    n_slots = options.n_slots or memory.default_slots(info, n_ctx, free)
    sizes: dict[str, Any] = {
        "n_ctx": n_ctx,
        "n_slots": n_slots,
        "kv_type": options.kv_type,
        "kv_tokens": options.kv_tokens,
        "batch_tokens": options.batch_tokens or memory.BATCH_TOKENS,
    }
    layers = options.n_gpu_layers
    if layers == "auto":
        layers = 0 if free is None else memory.layers_that_fit(info, gpu_free_bytes=free, **sizes)
    return memory.estimate(info, n_gpu_layers=layers, gpu_free_bytes=free, **sizes)


def device_memory() -> tuple[int, int] | None:
    """Used and total bytes of all GPUs that llama.cpp can use; None without one."""
    from llmkit.backend import library

    gpus = [d for d in library.devices() if d.is_gpu]
    return (
        (sum(d.total_bytes - d.free_bytes for d in gpus), sum(d.total_bytes for d in gpus))
        if gpus
        else None
    )


def load_target(
    spec: ModelSpec,
    options: EngineOptions,
    need: memory.MemoryEstimate,
    on_progress: Callable[[float], None],
) -> tuple[LlamaModel, LlamaRunner]:
    """The model that generates. Raises `ModelLoadError`, leaving nothing in memory."""
    from llmkit.backend import library
    from llmkit.backend.llama import LlamaRunner
    from llmkit.backend.model import LlamaModel

    if not library.gpu_backend() and Path("/proc/driver/nvidia/version").exists():
        warnings.warn(GPU_HINT, RuntimeWarning, stacklevel=4)
    model = LlamaModel(spec.path, n_gpu_layers=need.n_gpu_layers, on_progress=on_progress)
    try:
        if not model.can_generate:
            raise ModelLoadError(
                f"{spec.path.name} is not a text generation model: "
                "it has no plain decoder, or no vocabulary."
            )
        runner = LlamaRunner(
            model,
            n_ctx=need.n_ctx,
            n_slots=need.n_slots,
            max_batch_tokens=max(
                options.batch_tokens or 512,
                ALIGNMENT + need.n_slots if options.deterministic else 0,
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
        return model, runner
    except BaseException:
        model.close()
        raise


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
    its_options = EngineOptions(
        n_ctx=need.n_ctx, n_slots=need.n_slots, n_gpu_layers=options.n_gpu_layers, **layout
    )
    its_need = estimate(gguf.read_header(spec.path), its_options)
    if not (force or its_need.fits):
        raise InsufficientMemoryError(f"the draft model {spec.path.name}: {its_need.advice()}")
    model = LlamaModel(spec.path, n_gpu_layers=its_need.n_gpu_layers)
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
