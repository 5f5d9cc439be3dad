"""How much memory a model will take, from its header alone, and how much is free. In bytes."""

from __future__ import annotations

import contextlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmkit.models.gguf import ModelInfo

__all__ = [
    "MemoryEstimate",
    "default_context",
    "default_slots",
    "estimate",
    "free_ram",
    "layers_that_fit",
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
KV_SHARE = 0.25  # of the free memory, for the default number of slots


@dataclass(frozen=True, slots=True, repr=False)
class MemoryEstimate:
    """What loading would take: weights, KV cache and compute buffers, against free memory.

    ``gpu_bytes`` of it go to the GPU (``n_gpu_layers`` of the model's layers), where
    ``gpu_free_bytes`` are free; None without a GPU.
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

    @property
    def kv_bytes_per_token(self) -> int:
        return self.kv_bytes // self.kv_tokens

    @property
    def total_bytes(self) -> int:
        return self.weights_bytes + self.kv_bytes + self.compute_bytes

    @property
    def ram_bytes(self) -> int:
        """What stays in main memory."""
        return self.total_bytes - self.gpu_bytes

    @property
    def fits(self) -> bool:
        return self.ram_bytes <= self.free_bytes and self.gpu_bytes <= (self.gpu_free_bytes or 0)

    def _parts(self) -> str:
        return (
            f"weights {self.weights_bytes / GIB:.2f}, KV cache {self.kv_bytes / GIB:.2f} for "
            f"{self.n_slots} x {self.n_ctx} tokens, compute {self.compute_bytes / GIB:.2f}"
        )

    def _free(self) -> str:
        if self.gpu_free_bytes is None:
            return f"{self.free_bytes / GIB:.2f} GiB free"
        gpu = f"{self.gpu_bytes / GIB:.2f} of {self.gpu_free_bytes / GIB:.2f} GiB free on the GPU"
        return f"{gpu}, {self.ram_bytes / GIB:.2f} of {self.free_bytes / GIB:.2f} in RAM"

    def __repr__(self) -> str:
        verdict = "fits" if self.fits else "does not fit"
        return (
            f"MemoryEstimate({self.total_bytes / GIB:.2f} GiB: {self._parts()}; "
            f"{verdict}: {self._free()})"
        )

    def advice(self) -> str:
        """The refusal, with what to do about it."""
        fewer = (
            " fewer layers on the GPU (n_gpu_layers),"
            if self.gpu_bytes > (self.gpu_free_bytes or 0)
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
    batch_tokens: int = BATCH_TOKENS,
) -> MemoryEstimate:
    """Estimate from a header.

    KV: see `ModelInfo.kv_bytes_per_token`; compute: the vocabulary's tables and the activations of
    a step of ``batch_tokens``, on a GPU also its float32 logits. ``n_gpu_layers`` counts as in
    llama.cpp, from the last layer, with the output layer as one more; -1 means all. Without a GPU
    it counts as 0.
    """
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
        if gpu_free_bytes is None
        else _num_layers(info)
        if n_gpu_layers < 0
        else min(n_gpu_layers, _num_layers(info))
    )
    on_gpu = GPU_BASE_BYTES + 4 * batch_tokens * vocab + activations if layers else 0
    compute = BASE_BYTES + VOCABULARY_BYTES * vocab + (on_gpu or activations)
    return MemoryEstimate(
        weights_bytes=info.weights_bytes,
        kv_bytes=kv,
        compute_bytes=compute,
        free_bytes=free_ram() if free_bytes is None else free_bytes,
        n_ctx=n_ctx,
        n_slots=n_slots,
        kv_tokens=kv_tokens,
        n_gpu_layers=layers,
        gpu_bytes=_gpu_bytes(info, kv, on_gpu, layers),
        gpu_free_bytes=gpu_free_bytes,
    )


def layers_that_fit(
    info: ModelInfo, *, n_ctx: int, n_slots: int, gpu_free_bytes: int, **sizes: Any
) -> int:
    """The most layers (counting the output layer) that fit into 90% of a GPU's free memory.

    With their weights, KV cache and compute buffers.
    """
    room = int(gpu_free_bytes * 0.9)
    for layers in range(_num_layers(info), 0, -1):
        need = estimate(
            info, n_ctx=n_ctx, n_slots=n_slots, n_gpu_layers=layers, gpu_free_bytes=room, **sizes
        )
        if need.gpu_bytes <= room:
            return layers
    return 0


def _num_layers(info: ModelInfo) -> int:
    return info.integer("block_count") + 1


def _gpu_bytes(info: ModelInfo, kv: int, compute: int, layers: int) -> int:
    """What ``layers`` layers put on the GPU.

    The input embedding stays in RAM; if the model has no output matrix, the GPU gets a copy of it.
    """
    if not layers:
        return 0
    blocks = info.integer("block_count")
    first = blocks - (layers - 1)
    sizes = {t.name: t.num_bytes or 0 for t in info.tensors}
    on_gpu = sizes.get("output.weight") or sizes.get("token_embd.weight", 0)
    on_gpu += sum(
        n
        for name, n in sizes.items()
        if (block := re.match(r"blk\.(\d{1,4})\.", name)) and int(block[1]) >= first
    )
    return on_gpu + kv * (layers - 1) // max(blocks, 1) + compute


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
    with contextlib.suppress(OSError, ValueError):
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        if limit != "max":
            stat = dict(
                line.split() for line in Path("/sys/fs/cgroup/memory.stat").read_text().splitlines()
            )
            used = int(Path("/sys/fs/cgroup/memory.current").read_text()) - int(
                stat.get("inactive_file", 0)
            )
            limits.append(int(limit) - used)
    with contextlib.suppress(KeyError, ValueError):
        limits.append(int(os.environ["MEM_LIMIT"]) - int(psutil.Process().memory_info().rss))
    return max(0, min(limits))
