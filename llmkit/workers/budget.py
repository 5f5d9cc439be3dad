"""How much memory models may take together, and how much one will take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llmkit.models import gguf, memory
from llmkit.models.image_files import image_model, is_image_model
from llmkit.models.memory import free_ram
from llmkit.models.projectors import NONE
from llmkit.models.registry import resolve
from llmkit.models.speech_files import speech_kind
from llmkit.runtime.assembly import POOLING, estimate
from llmkit.runtime.images import estimate as image_estimate
from llmkit.settings.options import EngineOptions

__all__ = ["Budget", "Need", "need_of"]

GIB = 1 << 30
WORKER_BYTES = 120 << 20  # a worker beside the process that draws


@dataclass(frozen=True, slots=True)
class Need:
    """Memory in bytes: in RAM, and on GPUs. ``resident_bytes``: the part of ``ram_bytes`` that the
    system counts as used already, which weights that are mapped are not. ``n_ctx``: the context
    that it is for; 0 if that is not known. ``in_child``: most of it is in a child of the worker."""

    ram_bytes: int
    gpu_bytes: int = 0
    resident_bytes: int = 0
    n_ctx: int = 0
    in_child: bool = False

    def times(self, count: int) -> Need:
        """Of so many processes; ``n_ctx`` is each one's."""
        return replace(
            self,
            ram_bytes=count * self.ram_bytes,
            gpu_bytes=count * self.gpu_bytes,
            resident_bytes=count * self.resident_bytes,
        )


@dataclass(frozen=True, slots=True)
class Budget:
    """Limits in bytes; None means what is free.

    >>> Budget(ram_bytes=8 * GIB).lacking(Need(5 * GIB), [Need(4 * GIB)])
    '5.0 GiB of RAM needed, 4.0 of 8.0 free'
    """

    ram_bytes: int | None = None
    gpu_bytes: int | None = None
    free: Callable[[], int] = free_ram

    def lacking(self, need: Need, held: Sequence[Need]) -> str:
        """What is missing for a model beside those ``held``; empty if it fits."""
        if self.ram_bytes is None:
            # What loaded models will still take is spoken for.
            spoken = sum(max(0, h.ram_bytes - h.resident_bytes) for h in held)
            free = total = self.free() - spoken
        else:
            total = self.ram_bytes
            free = total - sum(h.ram_bytes for h in held)
        if need.ram_bytes > free:
            return _said("RAM", need.ram_bytes, free, total)
        if self.gpu_bytes is not None:
            free = self.gpu_bytes - sum(h.gpu_bytes for h in held)
            if need.gpu_bytes > free:
                return _said("GPU memory", need.gpu_bytes, free, self.gpu_bytes)
        return ""

    def never(self, need: Need) -> str:
        """Why a model cannot fit even alone; empty if it can, or if only the system knows."""
        for what, size, limit in (
            ("RAM", need.ram_bytes, self.ram_bytes),
            ("GPU memory", need.gpu_bytes, self.gpu_bytes),
        ):
            if limit is not None and size > limit:
                return (
                    f"it needs {size / GIB:.1f} GiB of {what}, and the budget for all models is "
                    f"{limit / GIB:.1f}. Try a smaller n_ctx, fewer slots, or a larger budget."
                )
        return ""


def _said(what: str, need: int, free: int, total: int) -> str:
    free = max(0, free)
    return f"{need / GIB:.1f} GiB of {what} needed, {free / GIB:.1f} of {total / GIB:.1f} free"


def need_of(task: dict[str, Any]) -> Need:
    """The memory of a worker's task, estimated from the headers of its files; runs no llama.cpp.

    Where there is a GPU, layers count as its own unless the options keep them off it. What draws
    counts as RAM alone: only its library knows whether it uses a GPU. Raises what
    `llmkit.models.gguf.read_header` raises.
    """
    if speech_kind(Path(task["path"])):
        speech = memory.speech_estimate(Path(task["path"]), task["options"]["n_gpu_layers"])
        return Need(speech.ram_bytes, speech.gpu_bytes)
    if is_image_model(Path(task["path"])):
        whole = image_estimate(image_model(Path(task["path"])))
        return Need(WORKER_BYTES + whole.total_bytes, in_child=True)
    options = EngineOptions(**task["options"])
    need = _need(Path(task["path"]), options)
    if options.draft is not None:
        alone = replace(options, draft=None, lora=(), projector=NONE)
        draft = _need(resolve(options.draft).path, alone)
        need = replace(
            need,
            ram_bytes=need.ram_bytes + draft.ram_bytes,
            gpu_bytes=need.gpu_bytes + draft.gpu_bytes,
        )
    return need


def _need(path: Path, options: EngineOptions) -> Need:
    info = gguf.read_header(path)
    if info.max_positions is not None and (options.n_ctx or 0) > info.max_positions:
        options = replace(options, n_ctx=None)  # the worker says whether that will do
    whole = estimate(info, replace(options, n_gpu_layers=0))
    n_ctx = min(whole.n_ctx, info.max_positions or whole.n_ctx, whole.kv_tokens)
    if info.value("pooling_type") in POOLING:  # an embedder takes texts as long as it was made for
        n_ctx = 0
    layers = -1 if options.n_gpu_layers == "auto" else options.n_gpu_layers
    if not layers or not Path("/proc/driver/nvidia/version").exists():
        return Need(whole.total_bytes, n_ctx=n_ctx)
    split = memory.estimate(
        info,
        n_ctx=whole.n_ctx,
        n_slots=whole.n_slots,
        n_gpu_layers=layers,
        kv_type=options.kv_type,
        kv_tokens=options.kv_tokens,
        gpu_free_bytes=1 << 62,
        projector_bytes=whole.projector_bytes,
        projector_gpu=options.projector_gpu,
    )
    return Need(split.ram_bytes, split.gpu_bytes, n_ctx=n_ctx)
