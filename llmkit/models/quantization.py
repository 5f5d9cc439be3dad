"""Types of weights: llama.cpp's names for them, in headers and in file names. Pure."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Literal, NamedTuple

from llmkit.errors import InvalidRequestError
from llmkit.models.gguf import ModelInfo, TensorInfo
from llmkit.models.names import near

__all__ = ["PROJECTOR_ORDER", "TYPES", "Step", "bits_of", "kind_of", "label_of", "scaled",
           "step_to", "type_of"]  # fmt: skip

# Of a projector (mmproj) in several types: F16 is what llama.cpp's authors publish for use.
PROJECTOR_ORDER = ("F16", "BF16", "Q8_0", "F32")


class FileType(NamedTuple):
    """llama.cpp's number of a type (``llama_ftype``), and the bits a weight takes in it.

    Whole models, embeddings included: https://github.com/ggml-org/llama.cpp, tools/quantize.
    """

    number: int
    bits: float


# What llama.cpp makes from a model alone, smallest first. Its other types need an importance
# matrix, or fit the weights of one architecture only.
TYPES: Mapping[str, FileType] = {
    "Q2_K": FileType(10, 3.16),
    "Q3_K_S": FileType(11, 3.64),
    "Q3_K_M": FileType(12, 4.00),
    "Q3_K_L": FileType(13, 4.30),
    "IQ4_XS": FileType(30, 4.46),
    "Q4_0": FileType(2, 4.66),
    "IQ4_NL": FileType(25, 4.67),
    "Q4_K_S": FileType(14, 4.67),
    "Q4_K_M": FileType(15, 4.89),
    "Q4_1": FileType(3, 5.12),
    "Q5_0": FileType(8, 5.54),
    "Q5_K_S": FileType(16, 5.57),
    "Q5_K_M": FileType(17, 5.70),
    "Q5_1": FileType(9, 6.00),
    "Q6_K": FileType(18, 6.56),
    "Q8_0": FileType(7, 8.50),
    "F16": FileType(1, 16.0),
    "BF16": FileType(32, 16.0),
}
# Numbers of types that are read but not made.
READ_ONLY = {
    0: "F32", 19: "IQ2_XXS", 20: "IQ2_XS", 21: "Q2_K_S", 22: "IQ3_XS", 23: "IQ3_XXS", 24: "IQ1_S",
    26: "IQ3_S", 27: "IQ3_M", 28: "IQ2_S", 29: "IQ2_M", 31: "IQ1_M", 36: "TQ1_0", 37: "TQ2_0",
    38: "MXFP4", 39: "NVFP4",
}  # fmt: skip
NUMBERS = {t.number: name for name, t in TYPES.items()} | READ_ONLY
GUESSED = 1024  # a flag that llama.cpp adds to the number
UNQUANTIZED = ("F32", "F16", "BF16", "F64")
# What llama.cpp takes instead for rows that are no multiple of 256.
FALLBACKS = {"Q2": 4.5, "Q3": 4.5, "IQ4_XS": 4.5, "Q4_K": 5.5, "Q5_K": 6.0, "Q6_K": 8.5}
OUTER = ("token_embd.weight", "output.weight")  # kept finer than the rest
OUTER_BITS = 6.56
LABEL = re.compile(
    r"(?:^|[-_. ])((?:UD-)?(?:I?Q\d(?:_(?:\d|K))?(?:_(?:XXS|XS|NL|S|M|L|XL))?|TQ[12]_0|"
    r"MXFP4(?:_MOE)?|NVFP4|BF16|FP?16|FP?32))(?=$|[-_. ])",
    re.IGNORECASE,
)


def kind_of(text: str) -> str:
    """The name of a type that can be made, spelled in any case. Raises `InvalidRequestError`.

    >>> kind_of("q4_k_m")
    'Q4_K_M'
    """
    name = str(text).strip().upper().replace("-", "_")
    if name not in TYPES:
        raise InvalidRequestError(
            f"{text!r:.40} is not a type of weights that can be made{near(name, TYPES)} The types "
            f"are {', '.join(TYPES)}.",
            "quantize",
        )
    return name


def label_of(name: str) -> str:
    """The type that a file's name claims, in capitals; empty if it claims none.

    >>> label_of("Qwen3-0.6B-Q4_K_M.gguf"), label_of("tiny.f16.gguf"), label_of("tiny.gguf")
    ('Q4_K_M', 'F16', '')
    """
    found = LABEL.findall(name.removesuffix(".gguf"))
    return re.sub("^FP", "F", found[-1].upper()) if found else ""


def type_of(info: ModelInfo) -> str:
    """The type of a model's weights, such as ``Q4_K_M``: what its header claims, if most weights
    are about as large as that, else the type of most weights."""
    number = info.metadata.get("general.file_type")
    claimed = NUMBERS.get(number & ~GUESSED, "") if isinstance(number, int) else ""
    if claimed in TYPES and 0.6 < bits_of(info) / TYPES[claimed].bits < 1.7:
        return claimed
    return claimed if claimed == info.quantization else info.quantization


def bits_of(info: ModelInfo) -> float:
    """Bits a weight, over all tensors; 0 without tensors."""
    weights = sum(math.prod(t.shape) for t in info.tensors)
    return 8 * sum(t.num_bytes or 0 for t in info.tensors) / weights if weights else 0.0


Step = Literal["same", "down", "again", "up"]


def step_to(info: ModelInfo, kind: str) -> Step:
    """What making ``kind`` from this model is.

    ``same``: it is that already. ``down``: from full precision. ``again``: from a quantized model,
    losing precision a second time. ``up``: to a larger type, which gains none.
    """
    have = type_of(info)
    if have == kind:
        return "same"
    bits = TYPES[have].bits if have in TYPES else bits_of(info)
    if TYPES[kind].bits > bits + 0.01:
        return "up"
    return "down" if have in UNQUANTIZED else "again"


def scaled(info: ModelInfo, kind: str) -> ModelInfo:
    """The header as it would be in another type: for estimates of memory and disk, within 10 %."""
    if step_to(info, kind) == "same":
        return info
    tensors = tuple(replace(t, num_bytes=_bytes(t, kind)) for t in info.tensors)
    header = info.file_bytes - sum(t.num_bytes or 0 for t in info.tensors)
    size = header + sum(t.num_bytes or 0 for t in tensors)
    return replace(info, tensors=tensors, file_bytes=size)


def _bytes(tensor: TensorInfo, kind: str) -> int | None:
    if len(tensor.shape) < 2 or not tensor.name.endswith("weight"):
        return tensor.num_bytes
    bits = TYPES[kind].bits
    if tensor.shape[0] % 32:
        bits = max(bits, 16.0)
    elif tensor.shape[0] % 256 and kind not in ("F16", "BF16"):
        bits = next((b for start, b in FALLBACKS.items() if kind.startswith(start)), bits)
    if tensor.name in OUTER:
        bits = max(bits, OUTER_BITS if tensor.shape[0] % 256 == 0 else FALLBACKS["Q6_K"])
    return math.ceil(math.prod(tensor.shape) * bits / 8)
