"""How much memory a model will take and how much there is; from the header alone. Bytes throughout."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

from llmkit.models.gguf import ModelInfo

__all__ = ["MemoryEstimate", "default_context", "default_slots", "estimate", "free_ram"]

GIB = 1 << 30
COMPUTE_BASE = 64 << 20
DEFAULT_CONTEXT = 4096
DEFAULT_SLOTS = 8
KV_SHARE = 0.25  # of the free memory, for the default number of slots


@dataclass(frozen=True, slots=True, repr=False)
class MemoryEstimate:
    """What loading would take: weights, KV cache and compute buffers, against the memory that is free."""

    weights_bytes: int
    kv_bytes: int
    compute_bytes: int
    free_bytes: int
    n_ctx: int
    n_slots: int

    @property
    def total_bytes(self) -> int:
        return self.weights_bytes + self.kv_bytes + self.compute_bytes

    @property
    def fits(self) -> bool:
        return self.total_bytes <= self.free_bytes

    def _parts(self) -> str:
        return (
            f"weights {self.weights_bytes / GIB:.2f}, KV cache {self.kv_bytes / GIB:.2f} for {self.n_slots} x {self.n_ctx} tokens, "
            f"compute {self.compute_bytes / GIB:.2f}"
        )

    def __repr__(self) -> str:
        verdict = "fits" if self.fits else "does not fit"
        return f"MemoryEstimate({self.total_bytes / GIB:.2f} GiB: {self._parts()}; {verdict} in {self.free_bytes / GIB:.2f} GiB free)"

    def advice(self) -> str:
        """The refusal, with three ways out."""
        return (
            f"this needs about {self.total_bytes / GIB:.2f} GiB ({self._parts()}), but {self.free_bytes / GIB:.2f} GiB are free. "
            f"Try a smaller n_ctx, fewer slots (n_slots=1) or a smaller quantization of the model; force=True loads it all the same."
        )


def estimate(info: ModelInfo, *, n_ctx: int, n_slots: int, free_bytes: int | None = None) -> MemoryEstimate:
    """Estimate from a header. KV: see `ModelInfo.kv_bytes_per_token`; compute: a float32 row of logits for each token of a 512-token step, and a base."""
    vocab = next((t.shape[1] for t in info.tensors if t.name == "token_embd.weight" and len(t.shape) == 2), 32_000)
    return MemoryEstimate(
        weights_bytes=info.weights_bytes,
        kv_bytes=info.kv_bytes_per_token * n_ctx * n_slots,
        compute_bytes=COMPUTE_BASE + 4 * 512 * vocab,
        free_bytes=free_ram() if free_bytes is None else free_bytes,
        n_ctx=n_ctx,
        n_slots=n_slots,
    )


def default_context(info: ModelInfo) -> int:
    """The trained context, at most 4096 tokens."""
    return min(info.n_ctx_train or DEFAULT_CONTEXT, info.max_positions or DEFAULT_CONTEXT, DEFAULT_CONTEXT)


def default_slots(info: ModelInfo, n_ctx: int, free_bytes: int | None = None) -> int:
    """As many sequences (at most 8) as a quarter of the free memory has room for beside the weights."""
    free = (free_ram() if free_bytes is None else free_bytes) - info.weights_bytes
    per_slot = max(info.kv_bytes_per_token * n_ctx, 1)
    return max(1, min(DEFAULT_SLOTS, int(free * KV_SHARE) // per_slot))


def free_ram() -> int:
    """Memory this process may still take: the least of the machine's, the cgroup's and ``$MEM_LIMIT``'s (JupyterHub), in bytes."""
    import psutil

    limits = [int(psutil.virtual_memory().available)]
    with contextlib.suppress(OSError, ValueError):
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        if limit != "max":
            stat = dict(line.split() for line in Path("/sys/fs/cgroup/memory.stat").read_text().splitlines())
            used = int(Path("/sys/fs/cgroup/memory.current").read_text()) - int(stat.get("inactive_file", 0))
            limits.append(int(limit) - used)
    with contextlib.suppress(KeyError, ValueError):
        limits.append(int(os.environ["MEM_LIMIT"]) - int(psutil.Process().memory_info().rss))
    return max(0, min(limits))
