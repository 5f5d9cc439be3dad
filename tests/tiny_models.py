"""Tiny random models of families that no small package carries: recurrent (Mamba), hybrid (Jamba),
and a plain Llama with a LoRA adapter for it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np

N_EMBD, N_LAYER, N_FF, N_HEAD, STATE, RANK, CONV = 64, 4, 96, 4, 8, 4, 4
INNER = 2 * N_EMBD
N_VOCAB = 3 + 256


def write(
    path: Path, architecture: str, seed: int = 0, *, template: str = "", control: Sequence[str] = ()
) -> Path:
    """A model that answers at random, but always the same. ``architecture``: llama, mamba or jamba.
    ``control`` tokens take the places of the last bytes, which are in no text."""
    rng = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(512)
    writer.add_embedding_length(N_EMBD)
    writer.add_block_count(N_LAYER)
    writer.add_layer_norm_rms_eps(1e-5)
    attention = [
        architecture == "llama" or (architecture == "jamba" and i % 2 == 1) for i in range(N_LAYER)
    ]
    writer.add_feed_forward_length(0 if architecture == "mamba" else N_FF)
    writer.add_head_count(0 if architecture == "mamba" else N_HEAD)
    if architecture == "jamba":
        writer.add_head_count_kv([N_HEAD if a else 0 for a in attention])
    if architecture != "llama":
        writer.add_ssm_conv_kernel(CONV)
        writer.add_ssm_inner_size(INNER)
        writer.add_ssm_state_size(STATE)
        writer.add_ssm_time_step_rank(RANK)
    add_vocabulary(writer, control)
    if template:
        writer.add_chat_template(template)

    def add(name: str, *shape: int, scale: float = 0.15, base: float = 0.0) -> None:
        writer.add_tensor(name, (base + scale * rng.standard_normal(shape)).astype(np.float32))

    add("token_embd.weight", N_VOCAB, N_EMBD, scale=1.0)
    add("output_norm.weight", N_EMBD, scale=0.0, base=1.0)
    add("output.weight", N_VOCAB, N_EMBD, scale=0.3)
    for i, is_attention in enumerate(attention):
        block = f"blk.{i}."
        add(f"{block}attn_norm.weight", N_EMBD, scale=0.0, base=1.0)
        if is_attention:
            for part in ("q", "k", "v", "output"):
                add(f"{block}attn_{part}.weight", N_EMBD, N_EMBD)
        else:
            _add_mamba(add, block, norms=architecture == "jamba")
        if architecture != "mamba":
            add(f"{block}ffn_norm.weight", N_EMBD, scale=0.0, base=1.0)
            add(f"{block}ffn_gate.weight", N_FF, N_EMBD)
            add(f"{block}ffn_up.weight", N_FF, N_EMBD)
            add(f"{block}ffn_down.weight", N_EMBD, N_FF)
    finish(writer)
    return path


def write_large(path: Path, n_embd: int = 4096, n_ff: int = 14336, n_layer: int = 8) -> Path:
    """A gigabyte of zeros in Q4_0 that takes no place on the disk (the file is a hole) but seconds
    to load."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(512)
    writer.add_embedding_length(n_embd)
    writer.add_block_count(n_layer)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_feed_forward_length(n_ff)
    writer.add_head_count(32)
    add_vocabulary(writer, ())
    sizes = []

    def add(name: str, *shape: int) -> None:
        flat = len(shape) == 1
        kind = gguf.GGMLQuantizationType.F32 if flat else gguf.GGMLQuantizationType.Q4_0
        stored = shape if flat else gguf.quant_shape_to_byte_shape(shape, kind)
        sizes.append(int(np.prod(stored)) * (4 if flat else 1))
        writer.add_tensor_info(
            name, stored, np.dtype(np.float32 if flat else np.uint8), sizes[-1], raw_dtype=kind
        )

    add("token_embd.weight", N_VOCAB, n_embd)
    add("output_norm.weight", n_embd)
    for i in range(n_layer):
        for part in ("q", "k", "v", "output"):
            add(f"blk.{i}.attn_{part}.weight", n_embd, n_embd)
        for part in ("attn", "ffn"):
            add(f"blk.{i}.{part}_norm.weight", n_embd)
        for part, shape in (
            ("gate", (n_ff, n_embd)),
            ("up", (n_ff, n_embd)),
            ("down", (n_embd, n_ff)),
        ):
            add(f"blk.{i}.ffn_{part}.weight", *shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with path.open("r+b") as file:
        file.truncate(sum(-(-n // 32) * 32 for n in (path.stat().st_size, *sizes)))
    return path


def write_lora(path: Path, scale: float = 1.0) -> Path:
    """An adapter for the tiny Llama that changes its queries."""
    rng = np.random.default_rng(7)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 4.0)
    for i in range(N_LAYER):
        writer.add_tensor(
            f"blk.{i}.attn_v.weight.lora_a",
            (scale * rng.standard_normal((4, N_EMBD))).astype(np.float32),
        )
        writer.add_tensor(
            f"blk.{i}.attn_v.weight.lora_b",
            (scale * rng.standard_normal((N_EMBD, 4))).astype(np.float32),
        )
    finish(writer)
    return path


def _add_mamba(add: object, block: str, *, norms: bool) -> None:
    a: Any = add
    a(f"{block}ssm_in.weight", 2 * INNER, N_EMBD)
    a(f"{block}ssm_conv1d.weight", INNER, CONV, scale=0.4)
    a(f"{block}ssm_conv1d.bias", INNER)
    a(f"{block}ssm_x.weight", RANK + 2 * STATE, INNER)
    a(f"{block}ssm_dt.weight", INNER, RANK, scale=0.3)
    a(f"{block}ssm_dt.bias", INNER, scale=0.1, base=-2.0)
    a(f"{block}ssm_a", INNER, STATE, scale=0.2, base=-1.0)
    a(f"{block}ssm_d", INNER)
    a(f"{block}ssm_out.weight", N_EMBD, INNER)
    if norms:
        for name, size in (("dt", RANK), ("b", STATE), ("c", STATE)):
            a(f"{block}ssm_{name}_norm.weight", size, scale=0.0, base=1.0)


def add_vocabulary(writer: gguf.GGUFWriter, control: Sequence[str]) -> None:
    """Bytes, and control tokens."""
    kept = 256 - len(control)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(
        ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(kept)), *control]
    )
    writer.add_token_scores([0.0] * N_VOCAB)
    writer.add_token_types([2, 3, 3, *([6] * kept), *([3] * len(control))])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(False)


def finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def leftovers(tmp_path: Path) -> list[Path]:
    """What is left of models that were being made or fetched."""
    return [p for p in tmp_path.rglob("*") if p.suffix in (".part", ".making")]
