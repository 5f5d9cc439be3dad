"""Small projectors, and a text model with positions in two dimensions, made in milliseconds.

The vision and the audio encoder are random but always the same. `toy_models` has one that answers
for what it sees.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
from tiny_models import N_EMBD, N_FF, N_HEAD, N_LAYER, N_VOCAB, add_vocabulary, finish
from toy_models import ProjectorWriter, Sizes

SMALL = Sizes()
SECTIONS = [2, 3, 3, 0]
# As in SmolVLM: 86 million weights, 512 x 512 pixels, 64 tokens.
SIGLIP = Sizes(768, 3072, 12, 12, 16, 512, 4)


def write_vision(
    path: Path,
    kind: str,
    *,
    n_embd: int = N_EMBD,
    seed: int = 1,
    sizes: Sizes = SMALL,
    **more: Any,
) -> Path:
    """A random vision encoder of type phi4 (causal), gemma3 (whole pictures), or qwen2vl_merger."""
    maker = ProjectorWriter(path, seed, **more)
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
    maker.close()
    return path


def write_audio(path: Path, n_embd: int = N_EMBD, mels: int = 80) -> Path:
    """A random audio encoder of type qwen2a: 750 tokens for each 30 seconds."""
    sizes = Sizes(blocks=1)
    maker = ProjectorWriter(path, 2)
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
    maker.close()
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


def width_of(model: Path) -> int:
    """The numbers in an embedding of a text model."""
    tensors = {t.name: t for t in gguf.GGUFReader(model).tensors}
    return int(tensors["token_embd.weight"].shape[0])
