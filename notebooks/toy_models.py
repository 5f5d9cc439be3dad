"""Lesson 10's toy models, made in seconds, so that nothing is downloaded: a projector with which a
text model knows four colours when it sees them, and an image model that draws noise."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from llmkit.models.registry import resolve

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "white": (255,) * 3}
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


class ProjectorWriter:
    """Writes a projector with random weights."""

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

    def close(self) -> None:
        self.writer.write_header_to_file()
        self.writer.write_kv_data_to_file()
        self.writer.write_tensors_to_file()
        self.writer.close()


def write_colours(path: Path, model: str = "smollm2") -> Path:
    """A projector for ``model`` that turns each patch of one colour into the embedding of its name.

    A patch's mean colour becomes its four barycentric coordinates among the corners of the colour
    cube (the patch embedding), a layer norm spreads them, and a saturated GELU picks one row of the
    model's own embeddings exactly.
    """
    corners = np.array([[1, -1, -1], [-1, 1, -1], [-1, -1, 1], [1, 1, 1]], float)
    weights = np.linalg.inv(np.c_[corners, np.ones(4)])
    copies, hidden, patch = 8, 8, 28
    sizes = Sizes(4 * copies, 4 * copies, 1, 1, patch, 2 * patch)
    words = _embeddings(resolve(model).path)
    maker = ProjectorWriter(path, 0, scale=0)
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
    maker.close()
    return path


def _embeddings(model: Path) -> np.ndarray:
    """Of the colours' names: float32, shape (4, n_embd)."""
    reader = gguf.GGUFReader(model)
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    table = next(t for t in reader.tensors if t.name == "token_embd.weight")
    rows = [tokens.index(f"\u0120{name}") for name in COLOURS]  # GPT-2's sign for a space
    return np.asarray(gguf.quants.dequantize(table.data[rows], table.tensor_type), np.float32)


def write_checkpoint(path: Path) -> Path:
    """The tensors of a small Stable Diffusion, all zeros: 893 MB that take 84 KB on the disk."""
    at, header = 0, {}
    for name, shape in _tensors().items():
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    with path.open("wb") as file:
        file.write(_head(header))
        file.truncate(file.tell() + at)
    return path


def write_decoder(path: Path) -> Path:
    """A small decoder with random weights, 10 MB."""
    arrays = _decoder(np.random.default_rng(1))
    at, header = 0, {}
    for name, array in arrays.items():
        span = [at, at + array.nbytes]
        header[name] = {"dtype": "F32", "shape": list(array.shape), "data_offsets": span}
        at += array.nbytes
    path.write_bytes(_head(header) + b"".join(array.tobytes() for array in arrays.values()))
    return path


def _head(header: dict[str, Any]) -> bytes:
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


class _Shapes(dict[str, tuple[int, ...]]):
    def linear(self, name: str, made: int, read: int, *, bias: bool = True) -> None:
        self[f"{name}.weight"] = (made, read)
        if bias:
            self[f"{name}.bias"] = (made,)

    def convolution(self, name: str, made: int, read: int, side: int = 3) -> None:
        self[f"{name}.weight"], self[f"{name}.bias"] = (made, read, side, side), (made,)

    def norm(self, name: str, channels: int) -> None:
        self[f"{name}.weight"] = self[f"{name}.bias"] = (channels,)

    def residual(self, name: str, read: int, made: int) -> None:
        self.norm(f"{name}.in_layers.0", read)
        self.convolution(f"{name}.in_layers.2", made, read)
        self.linear(f"{name}.emb_layers.1", made, 1280)
        self.norm(f"{name}.out_layers.0", made)
        self.convolution(f"{name}.out_layers.3", made, made)
        if read != made:
            self.convolution(f"{name}.skip_connection", made, read, 1)

    def attention(self, name: str, channels: int) -> None:
        self.norm(f"{name}.norm", channels)
        self.convolution(f"{name}.proj_in", channels, channels, 1)
        block = f"{name}.transformer_blocks.0"
        for part, context in (("attn1", channels), ("attn2", 768)):
            self.linear(f"{block}.{part}.to_q", channels, channels, bias=False)
            self.linear(f"{block}.{part}.to_k", channels, context, bias=False)
            self.linear(f"{block}.{part}.to_v", channels, context, bias=False)
            self.linear(f"{block}.{part}.to_out.0", channels, channels)
        self.linear(f"{block}.ff.net.0.proj", 8 * channels, channels)
        self.linear(f"{block}.ff.net.2", channels, 4 * channels)
        for number in (1, 2, 3):
            self.norm(f"{block}.norm{number}", channels)
        self.convolution(f"{name}.proj_out", channels, channels, 1)


def _tensors() -> _Shapes:
    shapes, model = _Shapes(), "model.diffusion_model."
    shapes.linear(f"{model}time_embed.0", 1280, 320)
    shapes.linear(f"{model}time_embed.2", 1280, 1280)
    shapes.convolution(f"{model}input_blocks.0.0", 320, 4)
    widths, width = [320], 320
    for block, made in ((1, 320), (4, 640), (7, 1280)):
        shapes.residual(f"{model}input_blocks.{block}.0", width, made)
        shapes.attention(f"{model}input_blocks.{block}.1", made)
        widths.append(width := made)
        if made < 1280:
            shapes.convolution(f"{model}input_blocks.{block + 2}.0.op", width, width)
            widths.append(width)
    for block, made in ((0, 1280), (1, 1280), (3, 640), (4, 640), (6, 320), (7, 320)):
        shapes.residual(f"{model}output_blocks.{block}.0", width + widths.pop(), made)
        shapes.attention(f"{model}output_blocks.{block}.1", made)
        width = made
    shapes.convolution(f"{model}output_blocks.2.1.conv", 1280, 1280)
    shapes.convolution(f"{model}output_blocks.5.2.conv", 640, 640)
    shapes.norm(f"{model}out.0", width)
    shapes.convolution(f"{model}out.2", 4, 320)
    text = "cond_stage_model.transformer.text_model."
    shapes[f"{text}embeddings.token_embedding.weight"] = (49408, 768)
    shapes[f"{text}embeddings.position_embedding.weight"] = (77, 768)
    for layer in range(12):
        name = f"{text}encoder.layers.{layer}."
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes.linear(f"{name}self_attn.{part}", 768, 768)
        shapes.norm(f"{name}layer_norm1", 768)
        shapes.norm(f"{name}layer_norm2", 768)
        shapes.linear(f"{name}mlp.fc1", 3072, 768)
        shapes.linear(f"{name}mlp.fc2", 768, 3072)
    shapes.norm(f"{text}final_layer_norm", 768)
    return shapes


def _decoder(random: np.random.Generator) -> dict[str, np.ndarray]:
    arrays: dict[str, np.ndarray] = {}

    def convolution(name: str, made: int, read: int, *, bias: bool = True) -> None:
        drawn = random.standard_normal((made, read, 3, 3)) * (0.7 / np.sqrt(9 * read))
        arrays[f"{name}.weight"] = drawn.astype(np.float32)
        if bias:
            arrays[f"{name}.bias"] = np.zeros(made, np.float32)

    def block(name: str) -> None:
        for part in (0, 2, 4):
            convolution(f"{name}.conv.{part}", 64, 64)

    convolution("decoder.layers.0", 64, 4)
    layer = 2
    for _ in range(3):
        for _ in range(3):
            block(f"decoder.layers.{layer}")
            layer += 1
        convolution(f"decoder.layers.{layer + 1}", 64, 64, bias=False)
        layer += 2
    block(f"decoder.layers.{layer}")
    convolution(last := f"decoder.layers.{layer + 1}", 3, 64)
    arrays[f"{last}.weight"] *= 3  # else all is nearly black
    arrays[f"{last}.bias"] += 0.5
    convolution("encoder.layers.0", 64, 3)
    block("encoder.layers.1")
    layer = 2
    for _ in range(3):
        convolution(f"encoder.layers.{layer}", 64, 64, bias=False)
        layer += 1
        for _ in range(3):
            block(f"encoder.layers.{layer}")
            layer += 1
    convolution(f"encoder.layers.{layer}", 4, 64)
    return arrays
