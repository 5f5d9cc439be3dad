"""The header of a GGUF file, read with bounds: no value is trusted beyond the file's size.

Why not the `gguf` package: its reader maps and decodes the whole file (seconds for a large
vocabulary) and trusts counts. llama.cpp's own asserts kill the process, so a file is checked here
before llama.cpp sees it. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import re
import struct
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

from llmkit.errors import InvalidModelFileError
from llmkit.models.splits import names_of
from llmkit.system.files import open_plain

__all__ = ["ModelInfo", "TensorInfo", "read_header"]

MAX_KEYS, MAX_TENSORS, MAX_STRING = 100_000, 1_000_000, 64 << 20
MAX_NUMBERS, MAX_TEXTS = 1 << 24, 1 << 22  # in one array
MAX_HEADER = 512 << 20  # bytes
KEPT = 1024  # longest array that is read; of a longer one only the length
WINDOW = 1 << 20
LENGTH = struct.Struct("<Q")
MAX_DIMS = 4
SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
STRING, ARRAY = 8, 9
# By ggml type: name, elements per block, bytes per block.
BLOCKS = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 36),
    10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50), 20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136), 24: ("I8", 1, 1), 25: ("I16", 1, 2),
    26: ("I32", 1, 4), 27: ("I64", 1, 8), 28: ("F64", 1, 8), 29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36),
}  # fmt: skip
# Keys that llama.cpp asserts on, with its bounds (LLAMA_MAX_LAYERS, LLAMA_MAX_EXPERTS).
LIMITS = {
    "block_count": 512,
    "context_length": 1 << 31,
    "embedding_length": 1 << 24,
    "attention.head_count": 1 << 16,
    "attention.head_count_kv": 1 << 16,
    "expert_count": 1024,
    "expert_used_count": 1024,
}
KNOWN_STARTS = {
    b"PK\x03\x04": "a ZIP archive (perhaps a PyTorch checkpoint); convert it to GGUF first",
    b"ggml": "an old GGML file that predates GGUF; convert it again",
    b"ggjt": "an old GGJT file that predates GGUF; convert it again",
    b"\x1f\x8b": "a gzip file; unpack it first",
    b"<!DO": "an HTML page: the download returned an error page instead of the model",
    b"<htm": "an HTML page: the download returned an error page instead of the model",
    b"vers": "a Git LFS pointer: fetch the file itself with `git lfs pull`",
}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor: shape (ggml order, fastest first), type, and offset after the header."""

    name: str
    shape: tuple[int, ...]
    type_name: str
    offset: int
    num_bytes: int | None


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """A parsed header: metadata (long arrays as their length only) and tensors of all ``files``.

    Sizes in bytes, lengths in tokens.
    """

    path: Path
    file_bytes: int
    metadata: dict[str, Any] = field(repr=False)
    tensors: tuple[TensorInfo, ...] = field(repr=False)
    files: tuple[Path, ...] = ()

    @property
    def architecture(self) -> str:
        return str(self.metadata.get("general.architecture", ""))

    def value(self, key: str, default: Any = None) -> Any:
        """``<architecture>.<key>``, such as ``block_count``."""
        return self.metadata.get(f"{self.architecture}.{key}", default)

    def integer(self, key: str, default: int = 0) -> int:
        """A number in the header; the largest if there is one per layer."""
        value = self.value(key, default)
        if isinstance(value, list):
            value = max(value, default=default)
        return int(value) if isinstance(value, int | float) and math.isfinite(value) else default

    @property
    def n_ctx_train(self) -> int:
        return self.integer("context_length")

    @property
    def max_positions(self) -> int | None:
        """The most tokens that learned positions allow (the rows of their table); else None."""
        return next(
            (
                t.shape[1]
                for t in self.tensors
                if t.name == "position_embd.weight" and len(t.shape) == 2
            ),
            None,
        )

    @property
    def weights_bytes(self) -> int:
        return sum(t.num_bytes or 0 for t in self.tensors) or self.file_bytes

    @property
    def quantization(self) -> str:
        """The type of most weights, such as ``Q4_1``."""
        sizes: dict[str, int] = {}
        for t in self.tensors:
            sizes[t.type_name] = sizes.get(t.type_name, 0) + math.prod(t.shape)
        return max(sizes, key=lambda k: sizes[k], default="")

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of f16 keys and values per token, over all layers.

        2 bytes x (key + value length) x KV heads x layers.
        """
        layers, heads = self.integer("block_count"), self.integer("attention.head_count", 1)
        heads_kv = self.value("attention.head_count_kv", heads)
        total_heads = sum(heads_kv) if isinstance(heads_kv, list) else int(heads_kv) * layers
        head = self.integer("embedding_length") // max(heads, 1)
        key = self.integer("attention.key_length", head)
        value = self.integer("attention.value_length", head)
        return 2 * (key + value) * total_heads


def read_header(path: str | Path) -> ModelInfo:
    """Read and check the header of a GGUF file, and of all files of a split model.

    The weights stay unread. Headers are cached for as long as their files do not change.

    Raises `InvalidModelFileError` (what the file is instead, or what in it is impossible) and
    `FileNotFoundError`.
    """
    path = Path(path)
    if path.is_dir():
        raise InvalidModelFileError(
            f"{path} is a directory; name a .gguf file in it.{_gguf_names(path)}"
        )
    files = [path.with_name(name) for name in names_of(path.name)]
    missing = [f.name for f in files if not f.exists()]
    if missing and path.exists():
        raise InvalidModelFileError(
            f"{path} is one of {len(files)} files of a split model; "
            f"{', '.join(missing[:5])} is missing beside it."
        )
    parts = [_read_file(file, *_mark(file)) for file in files]
    info = parts[0]
    count = info.metadata.get("split.count", 0)
    if isinstance(count, int) and count > 1 and count != len(files):
        raise InvalidModelFileError(
            f"{path} is one of {count} files of a split model: they must be in one folder and be "
            f"called NAME-00001-of-{count:05}.gguf and so on."
        )
    return replace(
        info,
        file_bytes=sum(p.file_bytes for p in parts),
        tensors=tuple(t for p in parts for t in p.tensors),
        files=tuple(files),
    )


def _mark(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


@lru_cache(maxsize=32)
def _read_file(path: Path, size: int, modified: int) -> ModelInfo:
    """The header of one file; ``size`` and ``modified`` are part of the cache key."""
    try:
        opened = open_plain(path)
    except OSError as error:
        if isinstance(error, FileNotFoundError | PermissionError):
            raise
        raise InvalidModelFileError(f"{path} cannot be read: {error}") from None
    with opened as file:
        start = file.read(4)
        if start != b"GGUF":
            raise InvalidModelFileError(f"{path} is not a GGUF file: it {_what(start, size)}.")
        reader = _Reader(file, size, path)
        version, n_tensors, n_keys = reader.unpack("IQQ")
        if version not in (2, 3):
            raise InvalidModelFileError(
                f"{path} is GGUF version {version}; llama.cpp reads 2 and 3 (little-endian)."
            )
        if n_keys > MAX_KEYS or n_tensors > MAX_TENSORS or n_keys * 12 + n_tensors * 24 > size:
            raise InvalidModelFileError(
                f"{path} claims {n_keys} keys and {n_tensors} tensors in {size} bytes: "
                "the header is damaged. Download the file again."
            )
        metadata = {}
        for _ in range(n_keys):
            key = reader.string()
            metadata[key] = reader.value(*reader.unpack("I"))
        tensors = tuple(reader.tensor() for _ in range(n_tensors))
        info = ModelInfo(path, size, metadata, tensors, (path,))
        _check_tensors(info, file.tell())
    return info


def start_fault(path: Path) -> str | None:
    """What a file looks like that is no GGUF file, by its first bytes. Raises `OSError`."""
    with open_plain(path) as file:
        start = file.read(4)
    what = None if start == b"GGUF" else _what(start, path.stat().st_size)
    return what and re.split("[:;]", what)[0]


def _gguf_names(folder: Path) -> str:
    names = sorted(p.name for p in folder.glob("*.gguf"))[:5]
    return f" It has {', '.join(names)}." if names else ""


def _what(start: bytes, size: int) -> str:
    if size == 0:
        return "is empty"
    for magic, what in KNOWN_STARTS.items():
        if start.startswith(magic):
            return f"looks like {what}"
    if start[::-1] == b"GGUF":
        return "is a big-endian GGUF file, which this machine cannot read"
    if all(32 <= b < 127 or b in b"\t\r\n" for b in start):
        return f"looks like text, beginning with {start.decode()!r}"
    return f"begins with the bytes {start.hex(' ')}"


def _check_tensors(info: ModelInfo, header_end: int) -> None:
    alignment = info.metadata.get("general.alignment", 32)
    if (
        not isinstance(alignment, int)
        or alignment <= 0
        or alignment > 1 << 20
        or alignment & (alignment - 1)
    ):
        raise InvalidModelFileError(
            f"{info.path} claims an alignment of {alignment!r}: the header is damaged. "
            "Download the file again."
        )
    data = -(-header_end // alignment) * alignment
    end = max((data + t.offset + (t.num_bytes or 0) for t in info.tensors), default=data)
    if end > info.file_bytes:
        missing = end - info.file_bytes
        raise InvalidModelFileError(
            f"{info.path} is truncated: its header describes {end} bytes, but {missing} are "
            "missing. The download or copy was cut off; download it again."
        )
    for key, most in LIMITS.items():
        value = info.value(key)
        numbers = value if isinstance(value, list) else [value]
        if value is not None and not all(isinstance(v, int) and 0 <= v <= most for v in numbers):
            raise InvalidModelFileError(
                f"{info.path} claims {key} = {value!r:.40}: the header is damaged."
            )
    if info.integer("expert_used_count") > info.integer("expert_count"):
        raise InvalidModelFileError(
            f"{info.path} claims to use more experts than it has: the header is damaged."
        )


class _Reader:
    """Reads a file's little-endian values, never past its end."""

    def __init__(self, file: BinaryIO, size: int, path: Path) -> None:
        self._file, self._size, self._path = file, size, path

    def _damaged(self, what: str) -> InvalidModelFileError:
        return InvalidModelFileError(
            f"{self._path} is damaged or truncated: {what} at byte {self._file.tell()} "
            f"of {self._size}. Download the file again."
        )

    def read(self, n: int) -> bytes:
        if n > min(self._size, MAX_HEADER) - self._file.tell():
            raise self._damaged(f"{n} bytes are needed")
        return self._file.read(n)

    def unpack(self, layout: str) -> tuple[Any, ...]:
        return struct.unpack("<" + layout, self.read(struct.calcsize("<" + layout)))

    def string(self) -> str:
        (n,) = self.unpack("Q")
        if n > MAX_STRING:
            raise self._damaged(f"a string claims {n} bytes")
        return self.read(n).decode("utf-8", "replace")

    def _skip_strings(self, n: int) -> None:
        """Skip strings, such as a vocabulary's, that are not needed here."""
        start, at, window, length = self._file.tell(), 0, b"", 0
        unpack, end, left = LENGTH.unpack_from, min(self._size, MAX_HEADER), n
        while left:
            try:  # a model has 100,000 and more: no other work than this for each
                for skipped in range(left):  # noqa: B007
                    (length,) = unpack(window, at)
                    at += 8 + length
                left = 0
            except (struct.error, OverflowError):  # beyond the window
                left -= skipped
                self._check_string(start + at, length, end)
                start, at, length = start + at, 0, 0
                self._file.seek(start)
                window = self._file.read(WINDOW)
                if len(window) < 8:
                    raise self._damaged("an array is cut off") from None
        self._check_string(start + at, length, end)
        self._file.seek(start + at)

    def _check_string(self, at: int, length: int, end: int) -> None:
        """Whether a string of ``length`` bytes that is said to stop ``at`` can be there."""
        if length > MAX_STRING or at > end:
            self._file.seek(at - 8 - length)
            raise self._damaged(f"a string claims {length} bytes")

    def value(self, kind: int, in_array: bool = False) -> Any:
        if kind in SCALARS:
            return self.unpack(SCALARS[kind])[0]
        if kind == STRING:
            return self.string()
        if kind != ARRAY or in_array:  # llama.cpp does not read nested arrays either
            raise self._damaged(f"a value has the unknown type {kind}")
        item, n = self.unpack("IQ")
        if n > (MAX_NUMBERS if item in SCALARS else MAX_TEXTS) or n > self._size:
            raise self._damaged(f"an array claims {n} values")
        if item in SCALARS:
            size = n * struct.calcsize(SCALARS[item])
            if n <= KEPT:
                return list(struct.unpack(f"<{n}{SCALARS[item]}", self.read(size)))
            if size > self._size - self._file.tell():
                raise self._damaged(f"{size} bytes are needed")
            self._file.seek(size, 1)
            return n
        if n <= KEPT:
            return [self.value(item, in_array=True) for _ in range(n)]
        if item != STRING:
            raise self._damaged(f"an array has values of the unknown type {item}")
        self._skip_strings(n)
        return n

    def tensor(self) -> TensorInfo:
        name = self.string()
        (n_dims,) = self.unpack("I")
        if n_dims > MAX_DIMS:
            raise self._damaged(f"tensor {name[:80]!r} claims {n_dims} dimensions")
        shape = self.unpack("Q" * n_dims)
        kind, offset = self.unpack("IQ")
        elements = math.prod(shape)
        if elements > 1 << 50 or offset > self._size:
            raise self._damaged(f"tensor {name[:80]!r} claims shape {shape} at offset {offset}")
        type_name, block, block_bytes = BLOCKS.get(kind, (f"type {kind}", 0, 0))
        return TensorInfo(
            name, shape, type_name, offset, elements // block * block_bytes if block else None
        )
