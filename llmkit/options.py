"""How a model is loaded: one frozen record, checked once, used by `load`, `LocalEngine` and the command line. Standard library only."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from llmkit.errors import InvalidRequestError

__all__ = ["KV_TYPES", "EngineOptions"]

KV_TYPES = ("f16", "q8_0", "q4_0")
INTEGERS = {
    "batch_tokens": (1, 65_536),
    "n_ctx": (1, 1 << 24),
    "n_slots": (1, 256),
    "threads": (1, 1024),
    "kv_tokens": (256, 1 << 28),
    "max_waiting": (1, 1_000_000),
}
NUMBERS = {"target_itl_ms": (1.0, 1e6), "rope_scaling": (0.01, 1000.0), "host_cache_mb": (0.0, 1e9), "disk_cache_mb": (1.0, 1e9)}
FLAGS = ("kv_unified", "deterministic", "context_shift", "isolated", "share_prefixes")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """Everything that shapes an engine; see `llmkit.load` for what each one means.

    Raises `InvalidRequestError` that names the option.

    >>> EngineOptions(n_ctx=1024).n_ctx
    1024
    """

    n_ctx: int | None = None
    n_slots: int | None = None
    n_gpu_layers: int | Literal["auto"] = "auto"
    threads: int | None = None
    kv_unified: bool = False
    kv_tokens: int | None = None
    kv_type: str = "f16"
    flash_attention: bool | None = None
    rope_scaling: float | None = None
    lora: Any = ()  # a path, or {path: scale}; kept as pairs
    target_itl_ms: float = 500.0
    max_waiting: int = 1024
    deterministic: bool = False
    batch_tokens: int | None = None
    host_cache_mb: float = 512.0
    prefix_dir: str | None = None
    draft: str | None = None
    context_shift: bool = False
    isolated: bool = False
    share_prefixes: bool = False
    disk_cache_mb: float = 4096.0

    def __post_init__(self) -> None:
        for name, (low, high) in INTEGERS.items():
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high):
                raise InvalidRequestError(f"{name} must be an integer from {low} to {high}, not {value!r:.40}.", name)
        for name, (least, most) in NUMBERS.items():
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or not least <= value <= most):
                raise InvalidRequestError(f"{name} must be a number from {least:g} to {most:g}, not {value!r:.40}.", name)
        for name in FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise InvalidRequestError(f"{name} must be True or False, not {getattr(self, name)!r:.40}.", name)
        layers = self.n_gpu_layers
        if layers != "auto" and (isinstance(layers, bool) or not isinstance(layers, int) or not -1 <= layers <= 10_000):
            raise InvalidRequestError(f'n_gpu_layers must be "auto", -1 (all) or a number of layers, not {layers!r:.40}.', "n_gpu_layers")
        if self.kv_type not in KV_TYPES:
            raise InvalidRequestError(f"kv_type must be one of {', '.join(KV_TYPES)}, not {self.kv_type!r:.40}.", "kv_type")
        if self.flash_attention is False and self.kv_type != "f16":
            raise InvalidRequestError("a quantized KV cache (kv_type) needs flash attention; leave flash_attention out.", "flash_attention")
        if self.kv_tokens is not None and not self.kv_unified:
            raise InvalidRequestError("kv_tokens is the size of one shared KV buffer; it needs kv_unified=True.", "kv_tokens")
        object.__setattr__(self, "lora", _adapters(self.lora))
        if self.draft is not None:
            if self.deterministic:
                raise InvalidRequestError("a deterministic engine does not guess, so it has no use for a draft model; leave draft out.", "draft")
            object.__setattr__(self, "draft", str(self.draft))
        if self.deterministic and self.kv_unified:
            raise InvalidRequestError("a deterministic engine needs a KV buffer for each request; leave kv_unified out.", "kv_unified")
        if self.context_shift and (self.deterministic or self.kv_unified):
            raise InvalidRequestError("context_shift goes neither with deterministic=True nor with kv_unified=True.", "context_shift")
        if self.prefix_dir is not None:
            object.__setattr__(self, "prefix_dir", str(Path(self.prefix_dir).expanduser()))

    def as_dict(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)}


def _adapters(given: Any) -> tuple[tuple[str, float], ...]:
    """A path, a list of paths, or a dict of paths and scales, as pairs."""
    if isinstance(given, str | Path):
        given = {given: 1.0}
    elif not isinstance(given, dict):
        try:
            given = dict(tuple(p) if isinstance(p, tuple | list) else (p, 1.0) for p in given)
        except (TypeError, ValueError):
            raise InvalidRequestError(
                f"lora must be the path of an adapter, a list of paths, or a dict of paths and scales, not {given!r:.60}.", "lora"
            ) from None
    pairs = []
    for path, scale in given.items():
        if not isinstance(path, str | Path) or isinstance(scale, bool) or not isinstance(scale, int | float) or not math.isfinite(scale):
            raise InvalidRequestError(f"lora must give paths and finite scales, not {path!r:.60}: {scale!r:.20}.", "lora")
        pairs.append((str(path), float(scale)))
    names = [Path(path).stem for path, _ in pairs]
    for name in names:
        if names.count(name) > 1:
            raise InvalidRequestError(f"two adapters are named {name!r} (the name is the file's, without .gguf); rename one.", "lora")
    return tuple(pairs)
