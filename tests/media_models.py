"""Small projectors, and a text model with positions in two dimensions, made in milliseconds.

The vision and the audio encoder are random but always the same; `write_colours` makes one that
answers for what it sees.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from tiny_models import N_EMBD, N_FF, N_HEAD, N_LAYER, N_VOCAB, add_vocabulary, finish

WORDS = (" red", " green", " blue", " white")
RGB = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "white": (255, 255, 255)}
SECTIONS = [2, 3, 3, 0]
# What each type of projector wants to know, by the sides of a picture and a patch.
KNOWS: dict[str, Mapping[str, int]] = {
    "phi4": {"image_min_pixels": 1, "image_max_pixels": 64},  # in patches
    "gemma3": {},
    "qwen2vl_merger": {"spatial_merge_size": 2},
}


@dataclass(frozen=True)
class Sizes:
    """Of an encoder: width, width within, blocks, heads, the sides of a patch and a picture; and
    how many patches, across and down, become one token of a gemma3."""

    width: int = 32
    inner: int = 48
    blocks: int = 2
    heads: int = 2
    patch: int = 14
    picture: int = 56
    merged: int = 2


# As in SmolVLM: 86 million weights, 512 x 512 pixels, 64 tokens.
SIGLIP = Sizes(768, 3072, 12, 12, 16, 512, 4)


class _Maker:
    """A file of random weights."""

    def __init__(self, path: Path, seed: int, dtype: Any = np.float32, scale: float = 0.15) -> None:
        self.writer = gguf.GGUFWriter(path, "clip")
        self.writer.add_type("mmproj")
        self._rng = np.random.default_rng(seed)
        self._dtype, self._scale = dtype, scale

    def keys(self, prefix: str, values: Mapping[str, int | float | Sequence[float]]) -> None:
        for key, value in values.items():
            name = f"clip.{prefix}.{key}"
            if isinstance(value, int):
                self.writer.add_uint32(name, value)
            elif isinstance(value, float):
                self.writer.add_float32(name, value)
            else:
                self.writer.add_array(name, list(value))

    def matrix(self, name: str, *shape: int, scale: float | None = None) -> None:
        values = self._rng.standard_normal(shape, np.float32)
        values *= self._scale if scale is None else scale
        is_small = len(shape) == 1 or name.startswith(("mm.", "v.position"))
        self.writer.add_tensor(name, values.astype(np.float32 if is_small else self._dtype))

    def vector(self, name: str, size: int, value: float) -> None:
        self.writer.add_tensor(name, np.full(size, value, np.float32))

    def blocks(self, letter: str, sizes: Sizes) -> None:
        for i in range(sizes.blocks):
            block = f"{letter}.blk.{i}."
            for part in ("attn_q", "attn_k", "attn_v", "attn_out"):
                self.matrix(f"{block}{part}.weight", sizes.width, sizes.width)
                if part != "attn_k" or letter == "v":
                    self.matrix(f"{block}{part}.bias", sizes.width)
            for part in ("ln1", "ln2"):
                self.vector(f"{block}{part}.weight", sizes.width, 1)
                self.vector(f"{block}{part}.bias", sizes.width, 0)
            self.matrix(f"{block}ffn_up.weight", sizes.inner, sizes.width)
            self.matrix(f"{block}ffn_up.bias", sizes.inner)
            self.matrix(f"{block}ffn_down.weight", sizes.width, sizes.inner)
            self.matrix(f"{block}ffn_down.bias", sizes.width)

    def last_norm(self, letter: str, sizes: Sizes, weight: float = 1, bias: float = 0) -> None:
        self.vector(f"{letter}.post_ln.weight", sizes.width, weight)
        self.vector(f"{letter}.post_ln.bias", sizes.width, bias)

    def encoder(
        self, name: str, kind: str, sizes: Sizes, n_embd: int, epsilon: float = 1e-6
    ) -> None:
        self.writer.add_bool(f"clip.has_{name}_encoder", True)
        self.writer.add_string("clip.projector_type", kind)
        self.writer.add_bool("clip.use_gelu", True)
        values = {
            "embedding_length": sizes.width,
            "feed_forward_length": sizes.inner,
            "block_count": sizes.blocks,
            "projection_dim": n_embd,
            "attention.head_count": sizes.heads,
            "attention.layer_norm_epsilon": epsilon,
        }
        self.keys(name, values)

    def vision(self, kind: str, sizes: Sizes, n_embd: int, epsilon: float = 1e-6) -> None:
        self.encoder("vision", kind, sizes, n_embd, epsilon)
        half = [0.5] * 3
        values = {
            "image_size": sizes.picture,
            "patch_size": sizes.patch,
            "image_mean": half,
            "image_std": half,
        }
        self.keys("vision", values)
        area = sizes.patch**2
        scaled = {k: v * (area if "pixels" in k else 1) for k, v in KNOWS[kind].items()}
        self.keys("vision", scaled)
        if kind == "gemma3":
            self.keys("vision", {"projector.scale_factor": sizes.merged})


def write_vision(
    path: Path,
    kind: str,
    *,
    n_embd: int = N_EMBD,
    seed: int = 1,
    sizes: Sizes = Sizes(),
    **more: Any,
) -> Path:
    """A random vision encoder of type phi4 (causal), gemma3 (whole pictures), or qwen2vl_merger."""
    maker = _Maker(path, seed, **more)
    maker.vision(kind, sizes, n_embd)
    width, patch = sizes.width, sizes.patch
    maker.matrix("v.patch_embd.weight", width, 3, patch, patch, scale=0.05)
    if kind == "qwen2vl_merger":
        maker.matrix("v.patch_embd.weight.1", width, 3, patch, patch, scale=0.05)
    else:
        maker.matrix("v.patch_embd.bias", width)
        maker.matrix("v.position_embd.weight", (sizes.picture // patch) ** 2, width)
    maker.blocks("v", sizes)
    maker.last_norm("v", sizes)
    if kind == "gemma3":
        maker.vector("mm.soft_emb_norm.weight", width, 1)
        maker.matrix("mm.input_projection.weight", width, n_embd, scale=0.2)
    else:
        merged = 4 * width if kind == "qwen2vl_merger" else width
        maker.matrix("mm.0.weight", merged, merged)
        maker.matrix("mm.0.bias", merged)
        maker.matrix("mm.2.weight", n_embd, merged, scale=0.2)
        maker.matrix("mm.2.bias", n_embd)
    finish(maker.writer)
    return path


def write_audio(path: Path, n_embd: int = N_EMBD, mels: int = 80) -> Path:
    """A random audio encoder of type qwen2a: 750 tokens for each 30 seconds."""
    sizes = Sizes(blocks=1)
    maker = _Maker(path, 2)
    maker.encoder("audio", "qwen2a", sizes, n_embd)
    maker.keys("audio", {"num_mel_bins": mels})
    maker.matrix("a.conv1d.1.weight", sizes.width, mels, 3)
    maker.matrix("a.conv1d.1.bias", sizes.width, 1)
    maker.matrix("a.conv1d.2.weight", sizes.width, sizes.width, 3)
    maker.matrix("a.conv1d.2.bias", sizes.width, 1)
    maker.matrix("a.position_embd.weight", 1500, sizes.width)
    maker.blocks("a", sizes)
    maker.last_norm("a", sizes)
    maker.matrix("mm.a.fc.weight", n_embd, sizes.width)
    maker.matrix("mm.a.fc.bias", n_embd)
    finish(maker.writer)
    return path


def write_mrope_text(path: Path) -> Path:
    """A random text model of the family of Qwen2-VL."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "qwen2vl")
    writer.add_context_length(1024)
    writer.add_embedding_length(N_EMBD)
    writer.add_block_count(N_LAYER)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_feed_forward_length(N_FF)
    writer.add_head_count(N_HEAD)
    writer.add_head_count_kv(N_HEAD)
    writer.add_rope_dimension_sections(SECTIONS)
    writer.add_rope_freq_base(10_000.0)
    add_vocabulary(writer, ())

    def add(name: str, *shape: int, scale: float = 0.15, base: float = 0.0) -> None:
        writer.add_tensor(name, (base + scale * rng.standard_normal(shape)).astype(np.float32))

    add("token_embd.weight", N_VOCAB, N_EMBD, scale=1.0)
    add("output_norm.weight", N_EMBD, scale=0.0, base=1.0)
    add("output.weight", N_VOCAB, N_EMBD, scale=0.3)
    for i in range(N_LAYER):
        block = f"blk.{i}."
        for norm in ("attn_norm", "ffn_norm"):
            add(f"{block}{norm}.weight", N_EMBD, scale=0.0, base=1.0)
        for part in ("q", "k", "v"):
            add(f"{block}attn_{part}.weight", N_EMBD, N_EMBD, scale=0.3)
            add(f"{block}attn_{part}.bias", N_EMBD)
        add(f"{block}attn_output.weight", N_EMBD, N_EMBD)
        for part in ("gate", "up"):
            add(f"{block}ffn_{part}.weight", N_FF, N_EMBD)
        add(f"{block}ffn_down.weight", N_EMBD, N_FF)
    finish(writer)
    return path


def write_colours(path: Path, model: Path, tokens: Sequence[int]) -> Path:
    """A projector for ``model`` that turns each patch of one colour into the embedding of a word.

    ``tokens`` are those of `WORDS`. A patch's mean colour becomes its four barycentric coordinates
    among the corners of the colour cube (the patch embedding), a layer norm spreads them, and a
    saturated GELU picks one row of the model's own embeddings exactly.
    """
    corners = np.array([[1, -1, -1], [-1, 1, -1], [-1, -1, 1], [1, 1, 1]], float)
    weights = np.linalg.inv(np.c_[corners, np.ones(4)])
    copies, hidden, patch = 8, 8, 28
    sizes = Sizes(4 * copies, 4 * copies, 1, 1, patch, 2 * patch)
    words = _word_rows(model, tokens)
    maker = _Maker(path, 0, scale=0)
    maker.vision("phi4", sizes, words.shape[1], 1e-10)

    def add(name: str, values: Any) -> None:
        maker.writer.add_tensor(name, np.ascontiguousarray(values, np.float32))

    colour = np.repeat(weights[:3].T, copies, 0)[:, :, None, None] / patch**2
    add("v.patch_embd.weight", colour * np.ones((1, 1, patch, patch)))
    add("v.patch_embd.bias", np.repeat(weights[3], copies))
    add("v.position_embd.weight", np.zeros((4, sizes.width)))
    maker.blocks("v", sizes)
    maker.last_norm("v", sizes, np.sqrt(3) / 4, 0.25)
    pool = np.zeros((hidden, sizes.width))
    pool[:4] = np.kron(np.eye(4), np.ones(copies) / copies)
    add("mm.0.weight", 40 * pool)
    add("mm.0.bias", np.full(hidden, -20))
    add("mm.2.weight", np.hstack([words.T, np.zeros((words.shape[1], hidden - 4))]) / 20)
    add("mm.2.bias", np.zeros(words.shape[1]))
    finish(maker.writer)
    return path


def _word_rows(model: Path, tokens: Sequence[int]) -> np.ndarray:
    """Rows of a model's embeddings: float32, shape (len(tokens), n_embd)."""
    tensors = {t.name: t for t in gguf.GGUFReader(model).tensors}
    table = tensors["token_embd.weight"]
    rows = gguf.quants.dequantize(table.data[list(tokens)], table.tensor_type)
    return np.asarray(rows, np.float32)


def width_of(model: Path) -> int:
    """The numbers in an embedding of a text model."""
    tensors = {t.name: t for t in gguf.GGUFReader(model).tensors}
    return int(tensors["token_embd.weight"].shape[0])
