"""The batch of embeddings passed to llama.cpp, its arrays owned by numpy. Engine thread only."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np

from llmkit.backend.library import C
from llmkit.backend.media import Embeddings
from llmkit.engine.batch import Chunk

__all__ = ["MediaRows"]


class MediaRows:
    """At most ``size`` cells of images and sounds, of any number of sequences. No logits: a prompt
    ends with text."""

    def __init__(self, size: int) -> None:
        self._seq, self._output = np.zeros(size, np.int32), np.zeros(size, np.int8)
        self._n_seq = np.ones(size, np.int32)
        self._seq_pointers = self._seq.ctypes.data + 4 * np.arange(size, dtype=np.uint64)
        self._rows = np.zeros((0, 0), np.float32)
        self._pos = np.zeros((0, 0), np.int32)
        self.batch = C.llama_batch()
        self._kinds: dict[str, Any] = {name: kind for name, kind, *_ in C.llama_batch._fields_}
        self._point(n_seq_id=self._n_seq, seq_id=self._seq_pointers, logits=self._output)

    def _point(self, **arrays: np.ndarray) -> None:
        for name, array in arrays.items():
            setattr(self.batch, name, ctypes.cast(array.ctypes.data, self._kinds[name]))

    def fill(self, chunks: Sequence[Chunk]) -> None:
        """Write the chunks, each of one item."""
        rows, places, at = [], [], 0
        for chunk in chunks:
            item, encoded = chunk.item, chunk.encoded
            assert item is not None and isinstance(encoded, Embeddings)
            begin = chunk.start - item.start
            end = begin + len(chunk.tokens)
            rows.append(encoded.rows[begin:end])
            places.append(encoded.places[:, begin:end] + (item.start + chunk.offset))
            self._seq[at : at + len(chunk.tokens)] = chunk.slot
            at += len(chunk.tokens)
        self._rows = rows[0] if len(rows) == 1 else np.concatenate(rows)
        self._pos = np.ascontiguousarray(np.concatenate(places, axis=1), np.int32)
        self._point(embd=self._rows, pos=self._pos)
        self.batch.n_tokens = at
