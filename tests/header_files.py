"""GGUF files that have a header and next to nothing else: nobody loads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np


def write(path: Path, architecture: str = "llama", **metadata: Any) -> Path:
    """A header with one tensor: nobody loads it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(512)
    for key, value in metadata.items():
        add = writer.add_uint32 if isinstance(value, int) else writer.add_string
        add(key.replace("__", "."), value)
    writer.add_tensor("token_embd.weight", np.zeros((32, 64), np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def split(folder: Path, stem: str, count: int = 3) -> list[Path]:
    return [
        write(folder / f"{stem}-{i:05}-of-{count:05}.gguf", split__count=count)
        for i in range(1, count + 1)
    ]
