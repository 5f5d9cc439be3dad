"""How much memory a model will take, from its header alone, and how much is free. In bytes."""

from __future__ import annotations

import contextlib
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmkit.models.devices import DeviceNeed, Gpu, places
from llmkit.models.gguf import ModelInfo
from llmkit.models.speech_files import speech_kind
from llmkit.system.resources import group_memory

__all__ = [
    "MemoryEstimate",
    "default_context",
    "default_slots",
    "estimate",
    "free_ram",
    "layers_that_fit",
    "speech_estimate",
]

GIB = 1 << 30
# What llmkit and llama.cpp keep besides weights and KV. In RAM, fitted to resident memory (within
# 10% for models of 0.1 to 0.3 G parameters, contexts of 2k to 64k tokens; docs/performance.md): the
# vocabulary's tables, and the rows of activations that a step touches. On a GPU, buffers count in
# full.
BASE_BYTES = 4 << 20
VOCABULARY_BYTES = 290
GPU_BASE_BYTES = 64 << 20
BATCH_TOKENS = 512
DEFAULT_CONTEXT = 4096
DEFAULT_SLOTS = 8
# Size relative to an f16 element: blocks of 32 with their scales.
KV_SIZE = {"f16": 1.0, "q8_0": 34 / 64, "q4_0": 18 / 64}
SPEECH_BYTES = 300 << 20  # libraries, and what is computed at once
SPEECH_GPU_BYTES = 1 << 30  # CUDA's own, and what is computed at once
HOUR_BYTES = 3600 * 16_000 * 4  # the samples of the longest sound, by default
KV_SHARE = 0.25  # of the free memory, for the default number of slots


@dataclass(frozen=True, slots=True, repr=False)
class MemoryEstimate:
    """What loading would take: weights, KV cache and compute buffers, and the projector that reads
    images and sounds, against free memory.

    ``gpu_bytes`` of it go to GPUs (``n_gpu_layers`` of the model's layers), where
    ``gpu_free_bytes`` are free; None without a GPU. ``devices`` says how much each would hold,
    ``hint`` what would be faster than this.
    """

    weights_bytes: int
    kv_bytes: int
    compute_bytes: int
    free_bytes: int
    n_ctx: int
    n_slots: int
    kv_tokens: int
    n_gpu_layers: int = 0
    gpu_bytes: int = 0
    gpu_free_bytes: int | None = None
    devices: tuple[DeviceNeed, ...] = ()
    hint: str = ""
    projector_bytes: int = 0

    @property
    def kv_bytes_per_token(self) -> int:
        return self.kv_bytes // self.kv_tokens if self.kv_tokens else 0

    @property
    def total_bytes(self) -> int:
        return self.weights_bytes + self.kv_bytes + self.compute_bytes + self.projector_bytes

    @property
    def ram_bytes(self) -> int:
        """What stays in main memory."""
        return self.total_bytes - self.gpu_bytes

    @property
    def fits(self) -> bool:
        return self.ram_bytes <= self.free_bytes and all(gpu.fits for gpu in self.devices)

    def _parts(self) -> str:
        projector = self.projector_bytes
        cache = (
            f"KV cache {self.kv_bytes / GIB:.2f} for {self.n_slots} x {self.n_ctx} tokens, "
            if self.kv_tokens
            else ""
        )
        return (
            f"weights {self.weights_bytes / GIB:.2f}, {cache}compute "
            f"{self.compute_bytes / GIB:.2f}"
            + (f", projector {projector / GIB:.2f}" if projector else "")
        )

    def _free(self) -> str:
        if self.gpu_free_bytes is None:
            return f"{self.free_bytes / GIB:.2f} GiB free"
        gpus = ", ".join(map(str, self.devices))
        return f"{gpus}, {self.ram_bytes / GIB:.2f} of {self.free_bytes / GIB:.2f} in RAM"

    def __repr__(self) -> str:
        verdict = "fits" if self.fits else "does not fit"
        return (
            f"MemoryEstimate({self.total_bytes / GIB:.2f} GiB: {self._parts()}; "
            f"{verdict}: {self._free()}" + (f"; {self.hint}" if self.hint else "") + ")"
        )

    def advice(self) -> str:
        """The refusal, with what to do about it."""
        fewer = (
            " fewer layers on the GPU (n_gpu_layers),"
            if not all(gpu.fits for gpu in self.devices)
            else ""
        )
        return (
            f"this needs about {self.total_bytes / GIB:.2f} GiB ({self._parts()}), which does not "
            f"fit: {self._free()}. Try a smaller n_ctx, fewer slots (n_slots=1),{fewer} or a "
            "smaller quantization of the model; force=True loads it anyway."
        )


def estimate(
    info: ModelInfo,
    *,
    n_ctx: int,
    n_slots: int,
    n_gpu_layers: int = 0,
    kv_type: str = "f16",
    kv_tokens: int | None = None,
    free_bytes: int | None = None,
    gpu_free_bytes: int | None = None,
    gpus: Sequence[Gpu] = (),
    tensor_split: Sequence[float] = (),
    batch_tokens: int = BATCH_TOKENS,
    projector_bytes: int = 0,
    projector_gpu: bool = False,
) -> MemoryEstimate:
    """Estimate from a header.

    KV: see `ModelInfo.kv_bytes_per_token`; compute: the vocabulary's tables and the activations of
    a step of ``batch_tokens``, on a GPU also its float32 logits. ``n_gpu_layers`` counts as in
    llama.cpp, from the last layer, with the output layer as one more; -1 means all. Without a GPU
    it counts as 0. ``gpu_free_bytes`` is short for one of ``gpus``. The projector goes to the first
    GPU (``projector_gpu``) if any layer is on one.
    """
    if not gpus and gpu_free_bytes is not None:
        gpus = (Gpu("the GPU", gpu_free_bytes),)
    vocab = next(
        (t.shape[1] for t in info.tensors if t.name == "token_embd.weight" and len(t.shape) == 2),
        32_000,
    )
    kv_tokens = kv_tokens or n_ctx * n_slots
    kv = int(info.kv_bytes_per_token * KV_SIZE[kv_type]) * kv_tokens
    activations = (
        4
        * batch_tokens
        * (2 * info.integer("feed_forward_length") + 8 * info.integer("embedding_length"))
    )
    layers = (
        0
        if not gpus
        else _num_layers(info)
        if n_gpu_layers < 0
        else min(n_gpu_layers, _num_layers(info))
    )
    where = places(layers, gpus, tensor_split) if layers else []
    held = _held(info, kv, where)
    steps = {gpu: GPU_BASE_BYTES + activations for gpu in held}
    if where:
        steps[where[-1]] += 4 * batch_tokens * vocab
    if where and projector_gpu:
        held[0] += projector_bytes
    compute = BASE_BYTES + VOCABULARY_BYTES * vocab + (sum(steps.values()) or activations)
    devices = tuple(
        DeviceNeed(gpu.name, held[i] + steps.get(i, 0), gpu.free_bytes)
        for i, gpu in enumerate(gpus)
    )
    return MemoryEstimate(
        weights_bytes=info.weights_bytes,
        kv_bytes=kv,
        compute_bytes=compute,
        free_bytes=free_ram() if free_bytes is None else free_bytes,
        n_ctx=n_ctx,
        n_slots=n_slots,
        kv_tokens=kv_tokens,
        n_gpu_layers=layers,
        gpu_bytes=sum(device.num_bytes for device in devices),
        gpu_free_bytes=sum(gpu.free_bytes for gpu in gpus) if gpus else None,
        devices=devices,
        projector_bytes=projector_bytes,
    )


def speech_estimate(path: Path, n_gpu_layers: int | str = "auto") -> MemoryEstimate:
    """The memory that a model of speech takes: one that hears with an hour of sound, or one that
    speaks; ``path`` is its file. Only one that hears is on a GPU, if ``n_gpu_layers`` says so."""
    size, hears = path.stat().st_size, speech_kind(path) == "whisper"
    on_gpu = size + SPEECH_GPU_BYTES if hears and n_gpu_layers not in ("auto", 0) else 0
    return MemoryEstimate(
        weights_bytes=size,
        kv_bytes=0,
        compute_bytes=SPEECH_BYTES + (HOUR_BYTES if hears else 0) + size + on_gpu,
        free_bytes=free_ram(),
        n_ctx=0,
        n_slots=1,
        kv_tokens=0,
        gpu_bytes=on_gpu,
    )


def layers_that_fit(
    info: ModelInfo,
    *,
    n_ctx: int,
    n_slots: int,
    gpu_free_bytes: int = 0,
    gpus: Sequence[Gpu] = (),
    **sizes: Any,
) -> int:
    """The most layers (counting the output layer) that fit into 90% of each GPU's free memory.

    With their weights, KV cache and compute buffers.
    """
    gpus = gpus or (Gpu("the GPU", gpu_free_bytes),)
    room = [Gpu(gpu.name, int(gpu.free_bytes * 0.9)) for gpu in gpus]
    for layers in range(_num_layers(info), 0, -1):
        need = estimate(info, n_ctx=n_ctx, n_slots=n_slots, n_gpu_layers=layers, gpus=room, **sizes)
        if all(gpu.fits for gpu in need.devices):
            return layers
    return 0


def _num_layers(info: ModelInfo) -> int:
    return info.integer("block_count") + 1


def _held(info: ModelInfo, kv: int, where: Sequence[int]) -> Counter[int]:
    """Weights and KV on each GPU; ``where`` are the GPUs of the last layers, the output's last.

    The input embedding stays in RAM; if the model has no output matrix, its GPU gets a copy of it.
    """
    held: Counter[int] = Counter()
    if not where:
        return held
    blocks = info.integer("block_count")
    first = blocks - (len(where) - 1)
    sizes = {t.name: t.num_bytes or 0 for t in info.tensors}
    held[where[-1]] += sizes.get("output.weight") or sizes.get("token_embd.weight", 0)
    for gpu in where[:-1]:
        held[gpu] += kv // max(blocks, 1)
    for name, size in sizes.items():
        block = re.match(r"blk\.(\d{1,4})\.", name)
        if block and first <= int(block[1]) < blocks:
            held[where[int(block[1]) - first]] += size
    return held


def default_context(info: ModelInfo) -> int:
    """The trained context, at most 4096 tokens."""
    return min(
        info.n_ctx_train or DEFAULT_CONTEXT, info.max_positions or DEFAULT_CONTEXT, DEFAULT_CONTEXT
    )


def default_slots(info: ModelInfo, n_ctx: int, free_bytes: int | None = None) -> int:
    """As many sequences (at most 8) as fit in a quarter of the memory free after the weights."""
    free = (free_ram() if free_bytes is None else free_bytes) - info.weights_bytes
    per_slot = max(info.kv_bytes_per_token * n_ctx, 1)
    return max(1, min(DEFAULT_SLOTS, int(free * KV_SHARE) // per_slot))


def free_ram() -> int:
    """Memory that this process may still take, in bytes.

    The least of what the machine, the cgroup and ``$MEM_LIMIT`` (JupyterHub) allow.
    """
    import psutil

    limits = [int(psutil.virtual_memory().available)]
    group = group_memory()
    if group is not None:
        limits.append(group.free)
    with contextlib.suppress(KeyError, ValueError):
        limits.append(int(os.environ["MEM_LIMIT"]) - int(psutil.Process().memory_info().rss))
    return max(0, min(limits))
