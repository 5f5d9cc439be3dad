"""The batch passed to llama.cpp: one per context, its arrays owned by numpy. Engine thread only."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np

from llmkit.backend.library import C
from llmkit.engine.batch import Chunk

__all__ = ["Rows"]


class Rows:
    """At most ``size`` tokens, each with sequence and position, and whether its logits are
    needed."""

    def __init__(self, size: int) -> None:
        self._token, self._pos = np.zeros(size, np.int32), np.zeros(size, np.int32)
        self._seq, self._output = np.zeros(size, np.int32), np.zeros(size, np.int8)
        self._n_seq = np.ones(size, np.int32)
        self._seq_pointers = self._seq.ctypes.data + 4 * np.arange(size, dtype=np.uint64)
        self.batch = C.llama_batch()
        kinds: dict[str, Any] = {name: kind for name, kind, *_ in C.llama_batch._fields_}
        arrays: dict[str, np.ndarray] = {
            "token": self._token,
            "pos": self._pos,
            "n_seq_id": self._n_seq,
            "seq_id": self._seq_pointers,
            "logits": self._output,
        }
        for name, array in arrays.items():
            setattr(self.batch, name, ctypes.cast(array.ctypes.data, kinds[name]))

    @property
    def output(self) -> np.ndarray:
        """Whether logits are needed, per token of the batch: int8, shape (n_tokens,)."""
        return self._output[: self.batch.n_tokens]

    def fill(self, chunks: Sequence[Chunk]) -> list[int]:
        """Write the chunks. Returns the row of each chunk's first token."""
        at, rows = 0, []
        self._output[:] = 0
        for chunk in chunks:
            end = at + len(chunk.tokens)
            self._token[at:end] = chunk.tokens
            first = chunk.start + chunk.offset
            self._pos[at:end] = np.arange(first, first + end - at)
            self._seq[at:end] = chunk.slot
            if chunk.sample:
                self._output[end - 1 - chunk.draft : end] = 1
            self._output[at : at + len(chunk.targets)] = 1
            rows.append(at)
            at = end
        self.batch.n_tokens = at
        return rows
