"""Which files are models that draw, by the names of their tensors, and what lies beside them.

The files are a stranger's: of a header nothing is believed that the file's size contradicts.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from llmkit.errors import InvalidModelFileError, LLMKitError, ModelLoadError
from llmkit.models import gguf
from llmkit.system.files import open_plain

__all__ = ["PARTS", "ImageModel", "image_model", "is_image_model"]

MAX_HEADER = 4 << 20
MAX_BRACKETS = 100_000  # three a tensor: each becomes an object of much more than a byte
WHOLE = "model.diffusion_model."  # a checkpoint with its encoders and decoder
# What is beside a model in files of its own, and the names that such files have.
PARTS = ("vae", "taesd", "clip_l", "clip_g", "t5xxl", "llm")
SUFFIXES = (".safetensors", ".gguf")
NEEDED = {
    "flux": ("vae", "clip_l", "t5xxl"),
    "sd3": ("vae", "clip_l", "clip_g"),
    "sdxl": ("clip_l", "clip_g"),
    "sd1": ("clip_l",),
    "qwen_image": ("vae", "llm"),
    "lumina2": ("vae", "llm"),
}
SMALL, LARGE = (512, 512), (1024, 1024)
FAST = ("turbo", "schnell", "lightning")  # in the names of models that take few steps
FEW, MANY = 4, 20
# Bytes of memory a pixel: the decoder's, which looks at 512x512 of them at a time, and the
# smaller decoder's; and the denoiser's.
DECODED, DECODED_SMALL, DENOISED = 6600, 1800, 2200


@dataclass(frozen=True, slots=True)
class ImageModel:
    """A model that draws: its ``family``, whether the file has all of it, and its ``parts``."""

    path: Path
    family: str
    is_whole: bool
    parts: dict[str, Path] = field(default_factory=dict)

    @property
    def size(self) -> tuple[int, int]:
        """Width and height that it was made for."""
        return SMALL if self.family in ("sd1", "sd2") else LARGE

    @property
    def is_fast(self) -> bool:
        """Whether it takes few steps, without a scale, as its name says."""
        return any(word in self.path.stem.lower() for word in FAST)

    @property
    def steps(self) -> int:
        """Steps by default."""
        return FEW if self.is_fast else MANY

    @property
    def cfg_scale(self) -> float:
        """The scale by default: models of flow matching have it built in."""
        return 1.0 if self.is_fast or self.family == "flux" else 7.0

    @property
    def files(self) -> tuple[Path, ...]:
        return (self.path, *self.parts.values())

    @property
    def weights_bytes(self) -> int:
        return sum(file.stat().st_size for file in self.files)

    @property
    def buffer_bytes(self) -> int:
        """What an image of its own size takes besides, about."""
        return self.buffer_of(*self.size)

    def buffer_of(self, width: int, height: int) -> int:
        """What an image of this size takes besides, about, in bytes."""
        decoder = DECODED_SMALL if "taesd" in self.parts else DECODED
        return max(decoder * min(width * height, 512 * 512), DENOISED * width * height)

    def check(self) -> None:
        """Raises `ModelLoadError`, which names the files that are missing beside it, and
        `InvalidModelFileError` for one that is broken."""
        for part in self.parts.values():
            _names(part)
        if self.is_whole:
            return
        missing = [name for name in NEEDED.get(self.family, ()) if name not in self.parts]
        if missing:
            wanted = ", ".join(f"{name}.safetensors" for name in missing)
            raise ModelLoadError(
                f"{self.path.name} holds the denoiser of a {self.family} model only. Put {wanted} "
                "beside it (or .gguf), in a folder of their own."
            )


def is_image_model(path: Path) -> bool:
    """Whether a file is a model that draws. Raises nothing: what is broken is none."""
    try:
        return bool(_family(path)[0])
    except (OSError, LLMKitError):
        return False


def image_model(path: Path) -> ImageModel:
    """The model of a file, with the parts beside it: ``vae.safetensors`` or ``NAME.vae.gguf``.

    Raises `InvalidModelFileError` for what is none, or cut off.
    """
    family, is_whole = _family(path)
    if not family:
        raise InvalidModelFileError(f"{path} is not a model that draws.")
    parts = {}
    for name in ("taesd",) if is_whole else PARTS:  # the others are in it
        names = [f"{stem}{end}" for stem in (f"{path.stem}.{name}", name) for end in SUFFIXES]
        found = next((path.with_name(n) for n in names if path.with_name(n).is_file()), None)
        if found is not None:
            parts[name] = found
    return ImageModel(path, family, is_whole, parts)


def _family(path: Path) -> tuple[str, bool]:
    """The family by a file's tensors, empty if it is none, and whether it holds all parts."""
    if path.suffix not in SUFFIXES:
        return "", False
    names, architecture = _names(path)
    architecture = architecture if architecture in NEEDED else ""
    whole = [name.removeprefix(WHOLE) for name in names if name.startswith(WHOLE)]
    if not whole:
        return architecture or _family_of(names, is_whole=False), False
    return architecture or _family_of(frozenset(whole), is_whole=True, beside=names), True


def _names(path: Path) -> tuple[frozenset[str], str]:
    """The tensors of a file, and the architecture that it names, if it does."""
    if path.suffix == ".gguf":
        info = gguf.read_header(path)
        return frozenset(tensor.name for tensor in info.tensors), info.architecture
    status = path.stat()
    return _tensor_names(path, status.st_size, status.st_mtime_ns), ""


def _family_of(
    names: frozenset[str], *, is_whole: bool, beside: frozenset[str] = frozenset()
) -> str:
    def has(start: str, where: frozenset[str] = names) -> bool:
        return any(name.startswith(start) for name in where)

    if has("double_blocks."):
        return "flux"
    if has("joint_blocks."):
        return "sd3"
    if has("input_blocks.") and has("output_blocks."):
        if has("label_emb.") or has("conditioner.embedders.1.", beside):
            return "sdxl"
        return "sd2" if has("cond_stage_model.model.", beside) else "sd1"
    return "sd1" if is_whole else ""


@lru_cache(maxsize=64)
def _tensor_names(path: Path, size: int, modified: int) -> frozenset[str]:
    """Of a safetensors file; ``size`` and ``modified`` are part of the cache key."""
    with open_plain(path) as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(MAX_HEADER, size - 8):
            raise InvalidModelFileError(f"{path} is not a safetensors file, or it is cut off.")
        text = file.read(length)
        if text.count(b"[") + text.count(b"{") > MAX_BRACKETS:
            raise InvalidModelFileError(f"{path} has a damaged header: too many brackets.")
        try:
            header: Any = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InvalidModelFileError(f"{path} has a damaged header: {error!s:.100}") from None
    if not isinstance(header, dict):
        raise InvalidModelFileError(f"{path} has a damaged header.")
    header.pop("__metadata__", None)
    room = size - 8 - length
    for name, tensor in header.items():
        match tensor:
            case {"data_offsets": [int(begin), int(end)]} if 0 <= begin <= end:
                if end > room:
                    raise InvalidModelFileError(
                        f"{path} is truncated: {end - room} bytes are missing. Download it again."
                    )
            case _:
                raise InvalidModelFileError(f"{path} has a damaged header: {name!r:.80}.")
    return frozenset(header)
