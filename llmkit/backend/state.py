"""Copies of sequences in RAM, and on disk across processes. Engine thread only.

A file is ``<fingerprint>-<digest>.kv``: a line of JSON (tokens, salt, a checksum), then llama.cpp's
state of the sequence. The fingerprint covers the model file, context settings and llama.cpp
version, the digest covers tokens and salt. A foreign, damaged or truncated file is skipped with a
warning.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import tempfile
import time
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmkit.backend.library import C
from llmkit.errors import InvalidRequestError
from llmkit.system.files import open_plain, shallow_json
from llmkit.system.reporting import report

if TYPE_CHECKING:
    from filelock import BaseFileLock

__all__ = ["StateStore", "fingerprint"]

SUFFIX, PART = ".kv", ".part"
OURS = re.compile(r"[0-9a-f]{16}-[0-9a-f]{24}\.kv")
OUR_PART = re.compile(r"[0-9a-f]{16}-\w+\.part")
STALE_S = 3600.0
LOCK_S = 1.0
MAX_HEAD_BYTES = 1 << 26
SAMPLE_BYTES = 1 << 20


def fingerprint(model: Path, **settings: object) -> str:
    """Identifies a model file (size, first and last mebibyte) and everything else that the bytes of
    a state depend on."""
    size = model.stat().st_size
    digest = hashlib.sha256(f"{size} {sorted(settings.items())}".encode())
    with model.open("rb") as file:
        digest.update(file.read(SAMPLE_BYTES))
        file.seek(max(0, size - SAMPLE_BYTES))
        digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()[:16]


class StateStore:
    """States by key. ``folder=None`` keeps nothing on disk; ``max_disk_bytes`` bounds the folder,
    where the least recently used files go first. ``locks`` is where processes that share the folder
    keep its lock."""

    def __init__(
        self,
        context: Any,
        fingerprint: str,
        folder: Path | None,
        max_disk_bytes: int,
        locks: Path | None = None,
    ) -> None:
        self._context = context
        self._fingerprint = fingerprint
        self._folder = folder
        self._max_disk_bytes = max_disk_bytes
        self._states: dict[int, np.ndarray] = {}
        self._files: dict[int, Path] = {}
        self.lost: list[int] = []  # since last read
        if folder is not None:
            try:
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                stat = folder.stat()
            except OSError as error:
                raise InvalidRequestError(
                    f"prefix_dir {folder} cannot be used: {error.strerror or error}.", "prefix_dir"
                ) from None
            if hasattr(os, "getuid") and (stat.st_uid != os.getuid() or stat.st_mode & 0o022):
                raise InvalidRequestError(
                    f"prefix_dir {folder} belongs to another user or is writable by others: "
                    "its files cannot be trusted.",
                    "prefix_dir",
                )
            self._lock = None if locks is None else _lock_of(folder, locks)
            self._remove_stale(folder)

    @staticmethod
    def _remove_stale(folder: Path) -> None:
        """Remove what a process left half written when it died. Others may be writing now, and
        other programs use such names too."""
        for file in folder.glob(f"*{PART}"):
            with contextlib.suppress(OSError):
                if OUR_PART.fullmatch(file.name) and time.time() - file.lstat().st_mtime > STALE_S:
                    file.unlink()

    def found(self) -> list[tuple[int, list[int], str]]:
        """The files of this model: key, tokens, salt. Keys count from 1."""
        entries: list[tuple[int, list[int], str]] = []
        for file in (
            sorted(self._folder.glob(f"{self._fingerprint}-*{SUFFIX}"))
            if self._folder is not None
            else []
        ):
            try:
                with open_plain(file) as stream:
                    head = shallow_json(stream.readline(MAX_HEAD_BYTES))
                tokens, salt = [int(t) for t in head["tokens"]], str(head["salt"])
                if file.name != self._name(tokens, salt):
                    raise ValueError("its name does not match its content")
            except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
                report(f"skipping the saved prefix {file}: {error}")
                continue
            key = len(entries) + 1
            self._files[key] = file
            entries.append((key, tokens, salt))
        return entries

    def _name(self, tokens: Sequence[int], salt: str) -> str:
        digest = hashlib.sha256(json.dumps([list(tokens), salt]).encode()).hexdigest()[:24]
        return f"{self._fingerprint}-{digest}{SUFFIX}"

    def park(self, key: int, slot: int, tokens: Sequence[int], salt: str, save: bool) -> None:
        """Copy a sequence out of the context. What cannot be kept is ``lost``."""
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
        """Put a copy into a sequence, replacing its content. False: the copy is lost and the
        sequence is empty."""
        state = self._states.get(key)
        if state is None:
            state = self._load(key)
        if (
            state is not None
            and int(C.llama_state_seq_set_data(self._context, _bytes(state), state.size, slot))
            == state.size
        ):
            return True
        self.drop(key)
        self.lost.append(key)
        return False

    def copy(self, source: int, target: int) -> bool:
        """Copy one sequence to another, at once. False: no room, and the target is empty."""
        state = self._read(source)
        return (
            state is not None
            and int(C.llama_state_seq_set_data(self._context, _bytes(state), state.size, target))
            == state.size
        )

    def drop(self, key: int) -> None:
        """Forget a copy; a file stays on disk."""
        self._states.pop(key, None)
        self._files.pop(key, None)

    def _load(self, key: int) -> np.ndarray | None:
        file = self._files.get(key)
        if file is None:
            return None
        try:
            with open_plain(file) as stream:
                data = stream.read()
            os.utime(file)
            end = data.index(b"\n", 0, MAX_HEAD_BYTES) + 1
            if zlib.crc32(memoryview(data)[end:]) != shallow_json(data[:end])["crc32"]:
                raise ValueError("its checksum does not match")
        except (OSError, ValueError, KeyError, TypeError, MemoryError) as error:
            report(f"skipping the saved prefix {file}: {error}")
            return None
        return np.frombuffer(data, np.uint8)[end:]

    def _write(self, key: int, state: np.ndarray, tokens: Sequence[int], salt: str) -> bool:
        assert self._folder is not None
        head = (
            json.dumps(
                {"tokens": list(tokens), "salt": salt, "crc32": zlib.crc32(state.data)}
            ).encode()
            + b"\n"
        )
        file = self._folder / self._name(tokens, salt)
        try:
            with self._locked():
                if not self._make_room(len(head) + state.size):
                    report(
                        f"a prefix of {state.size >> 20} MiB is larger than the limit of the "
                        f"folder {self._folder}"
                    )
                    return False
                handle, temporary = tempfile.mkstemp(  # mode 0600
                    dir=self._folder, prefix=f"{self._fingerprint}-", suffix=PART
                )
                try:
                    with os.fdopen(handle, "wb") as stream:
                        stream.write(head)
                        stream.write(state.data)
                    os.replace(temporary, file)
                except BaseException:
                    os.unlink(temporary)
                    raise
        except OSError as error:  # including a lock that stays held
            report(f"a prefix could not be saved in {self._folder}: {error}")
            return False
        self._files[key] = file
        return True

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the folder's lock, since other processes may share it. Where files cannot be locked
        (some network file systems), go without.

        Raises `OSError` if the lock stays held.
        """
        stack = contextlib.ExitStack()
        with stack:
            if self._lock is not None:
                with contextlib.suppress(NotImplementedError):
                    stack.enter_context(self._lock)
            yield

    def _make_room(self, size: int) -> bool:
        assert self._folder is not None
        if size > self._max_disk_bytes:
            return False
        files = []
        for file in self._folder.glob(f"*{SUFFIX}"):
            with contextlib.suppress(OSError):
                if not OURS.fullmatch(file.name):
                    continue
                stat = file.lstat()
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


def _lock_of(folder: Path, locks: Path) -> BaseFileLock:
    """The lock of a folder, kept elsewhere: the folder holds prefixes only."""
    from filelock import FileLock  # takes a while, and few loads need it

    locks.mkdir(mode=0o700, parents=True, exist_ok=True)
    return FileLock(
        locks / f"{hashlib.sha256(bytes(folder.resolve())).hexdigest()[:24]}.lock", timeout=LOCK_S
    )


def _bytes(array: np.ndarray) -> Any:
    import ctypes

    return ctypes.cast(array.ctypes.data, ctypes.POINTER(ctypes.c_uint8))
