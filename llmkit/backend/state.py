"""Copies of sequences outside the context: in RAM, and on disk from one process to the next. Engine thread only.

A file is ``<fingerprint>-<digest>.kv``: a line of JSON (tokens, salt, a checksum), then llama.cpp's state of the sequence. The fingerprint stands for model
file, context settings and llama.cpp version, the digest for tokens and salt. A file that is foreign, damaged or cut off is passed over with a warning.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import warnings
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llmkit.backend.library import C
from llmkit.errors import InvalidRequestError

__all__ = ["StateStore", "fingerprint"]

SUFFIX = ".kv"
SAMPLE_BYTES = 1 << 20


def fingerprint(model: Path, **settings: object) -> str:
    """Stands for a model file (size, and its first and last mebibyte) and everything else that the bytes of a state depend on."""
    size = model.stat().st_size
    digest = hashlib.sha256(f"{size} {sorted(settings.items())}".encode())
    with model.open("rb") as file:
        digest.update(file.read(SAMPLE_BYTES))
        file.seek(max(0, size - SAMPLE_BYTES))
        digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()[:16]


class StateStore:
    """States by key. ``folder=None`` keeps nothing on disk; ``max_disk_bytes`` bounds the folder, the files used least recently go first."""

    def __init__(self, context: Any, fingerprint: str, folder: Path | None, max_disk_bytes: int) -> None:
        self._context = context
        self._fingerprint = fingerprint
        self._folder = folder
        self._max_disk_bytes = max_disk_bytes
        self._states: dict[int, np.ndarray] = {}
        self._files: dict[int, Path] = {}
        self.lost: list[int] = []  # since it was last read
        if folder is not None:
            try:
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                stat = folder.stat()
            except OSError as error:
                raise InvalidRequestError(f"prefix_dir {folder} cannot be used: {error.strerror or error}.", "prefix_dir") from None
            if hasattr(os, "getuid") and (stat.st_uid != os.getuid() or stat.st_mode & 0o022):
                raise InvalidRequestError(
                    f"prefix_dir {folder} belongs to another user, or others may write to it: what lies there cannot be trusted.", "prefix_dir"
                )
            for file in folder.glob("*.part"):
                file.unlink(missing_ok=True)

    def found(self) -> list[tuple[int, list[int], str]]:
        """The files of this model: key, tokens, salt. Keys count from 1."""
        entries: list[tuple[int, list[int], str]] = []
        for file in sorted(self._folder.glob(f"{self._fingerprint}-*{SUFFIX}")) if self._folder is not None else []:
            try:
                with file.open("rb") as stream:
                    head = json.loads(stream.readline(1 << 26))
                tokens, salt = [int(t) for t in head["tokens"]], str(head["salt"])
                if file.name != self._name(tokens, salt):
                    raise ValueError("its name does not fit its content")
            except (OSError, ValueError, KeyError, TypeError) as error:
                warnings.warn(f"passing over the saved prefix {file}: {error}", RuntimeWarning, stacklevel=2)
                continue
            key = len(entries) + 1
            self._files[key] = file
            entries.append((key, tokens, salt))
        return entries

    def _name(self, tokens: Sequence[int], salt: str) -> str:
        digest = hashlib.sha256(json.dumps([list(tokens), salt]).encode()).hexdigest()[:24]
        return f"{self._fingerprint}-{digest}{SUFFIX}"

    def park(self, key: int, slot: int, tokens: Sequence[int], salt: str, save: bool) -> None:
        """Copy a sequence. What cannot be kept is ``lost``."""
        state = self._read(slot)
        if state is None:
            self.lost.append(key)
        elif not save:
            self._states[key] = state
        elif self._folder is None or not self._write(key, state, tokens, salt):
            self.lost.append(key)

    def _read(self, slot: int) -> np.ndarray | None:
        size = int(C.llama_state_seq_get_size(self._context, slot))
        try:
            state = np.empty(size, np.uint8)
        except MemoryError:
            return None
        written = int(C.llama_state_seq_get_data(self._context, _bytes(state), size, slot))
        return state if written == size else None

    def restore(self, key: int, slot: int) -> bool:
        """Put a copy into a sequence, whatever that held. False: it is lost, and the sequence is empty."""
        state = self._states.get(key)
        if state is None:
            state = self._load(key)
        if state is not None and int(C.llama_state_seq_set_data(self._context, _bytes(state), state.size, slot)) == state.size:
            return True
        self.drop(key)
        self.lost.append(key)
        return False

    def copy(self, source: int, target: int) -> bool:
        """Make a sequence the copy of another, at once. False: there is no room, and the target is empty."""
        state = self._read(source)
        return state is not None and int(C.llama_state_seq_set_data(self._context, _bytes(state), state.size, target)) == state.size

    def drop(self, key: int) -> None:
        """Forget a copy in RAM."""
        self._states.pop(key, None)
        self._files.pop(key, None)

    def _load(self, key: int) -> np.ndarray | None:
        file = self._files.get(key)
        if file is None:
            return None
        try:
            data = file.read_bytes()
            os.utime(file)
            end = data.index(b"\n") + 1
            if zlib.crc32(memoryview(data)[end:]) != json.loads(data[:end])["crc32"]:
                raise ValueError("its checksum does not fit")
        except (OSError, ValueError, KeyError, TypeError) as error:
            warnings.warn(f"passing over the saved prefix {file}: {error}", RuntimeWarning, stacklevel=2)
            return None
        return np.frombuffer(data, np.uint8)[end:]

    def _write(self, key: int, state: np.ndarray, tokens: Sequence[int], salt: str) -> bool:
        assert self._folder is not None
        head = json.dumps({"tokens": list(tokens), "salt": salt, "crc32": zlib.crc32(state.data)}).encode() + b"\n"
        if not self._make_room(len(head) + state.size):
            warnings.warn(f"a prefix of {state.size >> 20} MiB is larger than the limit of the folder {self._folder}", RuntimeWarning, stacklevel=2)
            return False
        file = self._folder / self._name(tokens, salt)
        try:
            handle, temporary = tempfile.mkstemp(dir=self._folder, suffix=".part")  # mode 0600
            try:
                with os.fdopen(handle, "wb") as stream:
                    stream.write(head)
                    stream.write(state.data)
                os.replace(temporary, file)
            except BaseException:
                os.unlink(temporary)
                raise
        except OSError as error:
            warnings.warn(f"a prefix could not be saved in {self._folder}: {error}", RuntimeWarning, stacklevel=2)
            return False
        self._files[key] = file
        return True

    def _make_room(self, size: int) -> bool:
        assert self._folder is not None
        if size > self._max_disk_bytes:
            return False
        files = []
        for file in self._folder.glob(f"*{SUFFIX}"):
            with contextlib.suppress(OSError):
                stat = file.stat()
                files.append((stat.st_mtime, stat.st_size, file))
        used = sum(size for _, size, _ in files)
        for _, file_size, file in sorted(files):
            if used + size <= self._max_disk_bytes:
                break
            with contextlib.suppress(OSError):
                file.unlink()
            used -= file_size
            for key in [k for k, f in self._files.items() if f == file]:
                self.drop(key)
                self.lost.append(key)
        return True

    def close(self) -> None:
        self._states.clear()


def _bytes(array: np.ndarray) -> Any:
    import ctypes

    return ctypes.cast(array.ctypes.data, ctypes.POINTER(ctypes.c_uint8))
