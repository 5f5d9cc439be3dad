"""How a model is loaded: a frozen record, checked once. Standard library only.

Used by `load`, `LocalEngine` and the command line.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from llmkit.errors import InvalidRequestError
from llmkit.settings import table
from llmkit.settings.table import Option, option

__all__ = ["KV_TYPES", "OPTIONS", "WEIGHT_TYPES", "EngineOptions"]

KV_TYPES = ("f16", "q8_0", "q4_0")
WEIGHT_TYPES = (
    "Q2_K", "Q3_K_S", "Q3_K_M", "Q3_K_L", "IQ4_XS", "Q4_0", "IQ4_NL", "Q4_K_S", "Q4_K_M", "Q4_1",
    "Q5_0", "Q5_K_S", "Q5_K_M", "Q5_1", "Q6_K", "Q8_0", "F16", "BF16",
)  # fmt: skip
SPLIT_MODES = ("none", "layer", "row")
MAX_DEVICES = 16
SPEED, MEMORY, PREFIXES, BEHAVIOUR = "Speed", "Memory", "Cached prefixes", "Behaviour"


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """The options of an engine.

    Raises `InvalidRequestError` naming the option.

    >>> EngineOptions(n_ctx=1024).n_ctx
    1024
    """

    n_ctx: int | None = option(
        "integer",
        None,
        "Most tokens per request, prompt and answer; by default up to 4096, as memory allows.",
        MEMORY,
        low=1,
        high=1 << 24,
        unit="tokens",
    )
    n_slots: int | None = option(
        "integer",
        None,
        "Requests computed at once; by default up to 8, as memory allows.",
        MEMORY,
        low=1,
        high=256,
    )
    n_gpu_layers: int | Literal["auto"] = option(
        "layers", "auto", "Layers on the GPU: auto (as many as fit), -1 (all), or a number.", MEMORY
    )
    split_mode: str = option(
        "choice",
        "layer",
        "Several GPUs: none (one holds the model), layer (each some layers), row (each part of "
        "every matrix).",
        MEMORY,
        choices=SPLIT_MODES,
    )
    main_device: int = option(
        "integer",
        0,
        "The GPU that split_mode none and row use, counted from 0 among those visible.",
        MEMORY,
        low=0,
        high=MAX_DEVICES - 1,
    )
    tensor_split: Any = option(
        "shares",
        (),
        "Each GPU's share of the model, such as 3,1; by default by their free memory.",
        MEMORY,
    )  # kept as numbers
    threads: int | None = option(
        "integer",
        None,
        "Compute threads; by default all cores available to this process.",
        SPEED,
        low=1,
        high=1024,
    )
    kv_unified: bool = option(
        "flag",
        False,
        "One KV buffer for all requests instead of one each; requests that do not fit wait.",
        MEMORY,
    )
    kv_tokens: int | None = option(
        "integer",
        None,
        "Size of the kv_unified buffer; by default n_ctx x n_slots.",
        MEMORY,
        low=256,
        high=1 << 28,
        unit="tokens",
    )
    kv_type: str = option("choice", "f16", "Data type of the KV cache.", MEMORY, choices=KV_TYPES)
    quantize: str | None = option(
        "choice",
        None,
        "Load the weights in this smaller type; the copy is made once and kept.",
        MEMORY,
        choices=WEIGHT_TYPES,
    )
    flash_attention: bool | None = option(
        "switch", None, "Flash attention; by default llama.cpp decides.", SPEED
    )
    rope_scaling: float | None = option(
        "number",
        None,
        "Stretch positions by this factor, for contexts longer than the model was trained on.",
        BEHAVIOUR,
        low=0.01,
        high=1000.0,
    )
    lora: Any = option(
        "adapters",
        (),
        "LoRA adapters: a path, a list, or a dict of paths and scales; requests pick by name.",
        BEHAVIOUR,
    )  # kept as pairs
    target_itl_ms: float = option(
        "number",
        500.0,
        "Longest gap between two tokens of a stream that prompts of others may cause.",
        SPEED,
        low=1.0,
        high=1e6,
        unit="ms",
    )
    max_waiting: int = option(
        "integer", 1024, "Most requests that may wait.", BEHAVIOUR, low=1, high=1_000_000
    )
    deterministic: bool = option(
        "flag",
        False,
        "Same request, same tokens, whatever else is running; slower.",
        BEHAVIOUR,
    )
    batching: bool = option(
        "flag", True, "Compute requests together; without it, one at a time.", SPEED
    )
    batch_requests: int | None = option(
        "integer",
        None,
        "Most requests computed together; by default one for each slot.",
        SPEED,
        low=1,
        high=256,
    )
    batch_wait_ms: float = option(
        "number",
        0.0,
        "How long an idle engine waits for more requests before it computes the first.",
        SPEED,
        low=0.0,
        high=10_000.0,
        unit="ms",
    )
    batch_tokens: int | None = option(
        "integer",
        None,
        "Most tokens computed per step.",
        SPEED,
        low=1,
        high=65_536,
        unit="tokens",
    )
    host_cache_mb: float = option(
        "number",
        512.0,
        "RAM for prefixes that lost their slot.",
        PREFIXES,
        low=0.0,
        high=1e9,
        unit="MB",
    )
    prefix_dir: str | None = option(
        "path", None, "Folder for computed prefixes that outlive the process.", PREFIXES
    )
    draft: str | None = option(
        "text",
        None,
        "A smaller model of the same vocabulary to draft tokens; the text stays the model's own.",
        SPEED,
    )
    projector: str | None = option(
        "text",
        None,
        "The file that reads images and sounds (mmproj); by default one beside the model, none "
        "for text alone.",
        BEHAVIOUR,
    )
    projector_gpu: bool = option(
        "flag", True, "Encode images and sounds on the GPU, if one holds layers.", SPEED
    )
    encode_beside: bool = option(
        "flag",
        True,
        "Encode images and sounds beside the steps; without it between them, and streams stall.",
        SPEED,
    )
    media_cache_mb: float = option(
        "number",
        256.0,
        "RAM for encoded images and sounds.",
        PREFIXES,
        low=0.0,
        high=1e9,
        unit="MB",
    )
    context_shift: bool = option(
        "flag",
        False,
        "When the context is full, drop the older half of what follows the prompt and go on.",
        BEHAVIOUR,
    )
    isolated: bool = option(
        "flag",
        False,
        "Run the model in its own process: if it crashes, the kernel survives.",
        BEHAVIOUR,
    )
    share_prefixes: bool = option(
        "flag",
        False,
        "Share cached prompt prefixes among all callers.",
        PREFIXES,
    )
    disk_cache_mb: float = option(
        "number", 4096.0, "Size limit of prefix_dir.", PREFIXES, low=1.0, high=1e9, unit="MB"
    )

    def __post_init__(self) -> None:
        table.check(self)
        if self.flash_attention is False and self.kv_type != "f16":
            raise InvalidRequestError(
                "a quantized KV cache (kv_type) needs flash attention; leave flash_attention out.",
                "flash_attention",
            )
        if self.kv_tokens is not None and not self.kv_unified:
            raise InvalidRequestError(
                "kv_tokens is the size of one shared KV buffer; it needs kv_unified=True.",
                "kv_tokens",
            )
        if not self.batching and (self.batch_requests or 1) > 1:
            raise InvalidRequestError(
                "batching=False computes one request at a time; leave batch_requests out.",
                "batch_requests",
            )
        object.__setattr__(self, "lora", _adapters(self.lora))
        object.__setattr__(self, "tensor_split", _shares(self.tensor_split))
        if self.tensor_split and self.split_mode == "none":
            raise InvalidRequestError(
                "tensor_split spreads a model over GPUs, and split_mode none does not; "
                "leave one of them out.",
                "tensor_split",
            )
        if self.main_device and self.split_mode == "layer":
            raise InvalidRequestError(
                "main_device is for split_mode none (the model on that GPU alone) or row; "
                "layer uses all GPUs alike.",
                "main_device",
            )
        if self.draft is not None:
            if self.deterministic:
                raise InvalidRequestError(
                    "a deterministic engine cannot use a draft model; leave draft out.",
                    "draft",
                )
            object.__setattr__(self, "draft", str(self.draft))
        if self.projector is not None:
            object.__setattr__(self, "projector", str(self.projector))
        if self.deterministic and self.kv_unified:
            raise InvalidRequestError(
                "a deterministic engine needs a KV buffer per request; leave kv_unified out.",
                "kv_unified",
            )
        if self.context_shift and (self.deterministic or self.kv_unified):
            raise InvalidRequestError(
                "context_shift works neither with deterministic=True nor with kv_unified=True.",
                "context_shift",
            )
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
                "lora must be the path of an adapter, a list of paths, or a dict of paths and "
                f"scales, not {given!r:.60}.",
                "lora",
            ) from None
    pairs = []
    for path, scale in given.items():
        if (
            not isinstance(path, str | Path)
            or isinstance(scale, bool)
            or not isinstance(scale, int | float)
            or not math.isfinite(scale)
        ):
            raise InvalidRequestError(
                f"lora must give paths and finite scales, not {path!r:.60}: {scale!r:.20}.", "lora"
            )
        pairs.append((str(path), float(scale)))
    names = [Path(path).stem for path, _ in pairs]
    for name in names:
        if names.count(name) > 1:
            raise InvalidRequestError(
                f"two adapters are named {name!r} (the file name without .gguf); rename one.",
                "lora",
            )
    return tuple(pairs)


def _shares(given: Any) -> tuple[float, ...]:
    """Numbers, or text such as "3,1"."""
    try:
        values = given.split(",") if isinstance(given, str) else given
        shares = tuple(float(value) for value in values)
    except (TypeError, ValueError):
        shares = (math.nan,)
    if len(shares) > MAX_DEVICES or not all(0 <= s < math.inf for s in shares):
        shares = (math.nan,)
    if shares and not 0 < sum(shares) < math.inf:
        raise InvalidRequestError(
            f"tensor_split must be shares of at most {MAX_DEVICES} GPUs, such as 3,1, none "
            f"negative and not all 0, not {given!r:.60}.",
            "tensor_split",
        )
    return shares


OPTIONS: dict[str, Option] = table.table(EngineOptions)
