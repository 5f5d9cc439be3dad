"""The file beside a model that reads images and sounds (mmproj): which, and whether it is one.

llama.cpp divides by some numbers of its header, and ends the process where they are 0, so they are
looked at before it sees the file. No weights are read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from llmkit.errors import InvalidModelFileError, ModelNotFoundError
from llmkit.models import gguf
from llmkit.models.gguf import ModelInfo
from llmkit.models.names import folded
from llmkit.models.quantization import PROJECTOR_ORDER, label_of
from llmkit.models.scanning import is_projector
from llmkit.models.splits import stem_of

__all__ = ["NONE", "compute_bytes", "nearest", "projector_of", "read_projector"]

NONE = "none"  # in place of a path
# Their tokens depend on the whole prompt, so its other parts could not be cached.
UNSUPPORTED = ("deepseek4v", "hunyuanvl")
MAX_WIDTH, MAX_BLOCKS, MAX_SIDE = 1 << 16, 512, 1 << 15
LIMITS = {
    "embedding_length": MAX_WIDTH,
    "feed_forward_length": 1 << 20,
    "projection_dim": 1 << 20,
    "attention.head_count": 1 << 12,
    "image_size": MAX_SIDE,
    "patch_size": 1 << 12,
    "num_mel_bins": 1 << 12,
    "spatial_merge_size": 1 << 8,
    "projector.scale_factor": 1 << 8,
}
KINDS = {"vision": "images", "audio": "sounds"}
FRAMES = 3000  # of 30 seconds of sound


def projector_of(model: Path, wanted: str | None) -> Path | None:
    """The projector to load with a model: the ``wanted`` file; by default one beside the model, if
    there is one; `NONE` means none. Raises `ModelNotFoundError`."""
    if wanted == NONE:
        return None
    if wanted is None:
        beside = [f for f in model.parent.glob("*.gguf") if is_projector(f.name) and f != model]
        return nearest(model, ((f, label_of(f.name)) for f in beside))
    path = Path(wanted).expanduser()
    if not path.is_file():
        raise ModelNotFoundError(
            f'there is no projector {wanted!r}: name an mmproj file, or "{NONE}" to load the model '
            "for text alone."
        )
    return path.resolve()


def nearest(model: Path, candidates: Iterable[tuple[Path, str]]) -> Path | None:
    """The projector of a model among files and their types of weights: one that is named like it,
    or one that names no model; of several types the usual one."""
    wanted, found = _bare(model), list(candidates)
    same = [c for c in found if _bare(c[0]) == wanted] or [
        c for c in found if not _bare(c[0]) or wanted.startswith(_bare(c[0]))
    ]
    order = {name: i for i, name in enumerate(PROJECTOR_ORDER)}
    best = min(same, key=lambda c: (order.get(c[1], 9), str(c[0])), default=None)
    return None if best is None else best[0]


def _bare(path: Path) -> str:
    """A file's name without its type of weights and ``mmproj``: what model it is of."""
    stem = folded(stem_of(path.name))
    label = folded(label_of(stem))
    words = re.split(r"[-_. ]+", stem.replace(label, " ") if label else stem)
    return "-".join(w for w in words if w not in ("", "mmproj", "model"))


def read_projector(path: Path) -> ModelInfo:
    """The header of a projector, checked. Raises `InvalidModelFileError`."""
    try:
        info = gguf.read_header(path)
    except OSError as error:
        raise InvalidModelFileError(f"{path} cannot be read: {error.strerror or error}") from None
    if info.architecture != "clip":
        raise InvalidModelFileError(
            f"{path} is not a projector; its architecture is {info.architecture or 'unknown'}. "
            "Name the mmproj file of the model."
        )
    kinds = [kind for kind in KINDS if info.metadata.get(f"clip.has_{kind}_encoder") is True]
    if not kinds:
        raise InvalidModelFileError(f"{path} reads neither images nor sounds.")
    for kind in kinds:
        named = info.value(f"{kind}.projector_type", info.value("projector_type"))
        if named in UNSUPPORTED:
            raise InvalidModelFileError(
                f"{path} is of the type {named}, which llmkit cannot use: what it makes of an "
                "image depends on the rest of the prompt."
            )
        _check_numbers(info, kind)
    return info


def _check_numbers(info: ModelInfo, kind: str) -> None:
    for key, most in LIMITS.items():
        value = info.value(f"{kind}.{key}")
        if value is not None and not (isinstance(value, int) and 0 < value <= most):
            raise InvalidModelFileError(
                f"{info.path} claims {kind}.{key} = {value!r:.40}: the header is damaged."
            )
    blocks = info.value(f"{kind}.block_count", 0)
    width, heads = (info.value(f"{kind}.{k}") for k in ("embedding_length", "attention.head_count"))
    if not (isinstance(blocks, int) and 0 <= blocks <= MAX_BLOCKS):
        raise InvalidModelFileError(
            f"{info.path} claims {kind}.block_count = {blocks!r:.40}: the header is damaged."
        )
    if width and heads and width % heads:
        raise InvalidModelFileError(
            f"{info.path} claims {heads} heads for a width of {width}: the header is damaged."
        )


def compute_bytes(info: ModelInfo) -> int:
    """About what encoding the largest image or 30 seconds of sound takes, beside the weights."""
    return max(
        4
        * count
        * (
            2 * info.integer(f"{kind}.feed_forward_length")
            + 8 * info.integer(f"{kind}.embedding_length")
        )
        for kind, count in (("vision", _num_patches(info)), ("audio", FRAMES))
    )


def _num_patches(info: ModelInfo) -> int:
    pixels = max(info.integer("vision.image_size") ** 2, info.integer("vision.image_max_pixels"))
    return pixels // max(info.integer("vision.patch_size"), 1) ** 2
