"""A context that turns texts into vectors: a pooled model, with whole sequences in each batch. Only
its own thread calls it."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np

from llmkit.backend import library
from llmkit.backend.library import C, num_threads
from llmkit.backend.model import LlamaModel
from llmkit.errors import EngineError, ModelLoadError

__all__ = ["POOLINGS", "Embedder"]

MAX_SEQUENCES = 64
RANK = 4
POOLINGS = (1, 2, 3, RANK)  # mean, first token, last token, a score


class Embedder:
    """Vectors of token sequences (``ranks``: scores of pairs). ``max_tokens`` is the longest
    sequence, and the size of a batch.

    Raises `ModelLoadError` for a model that does not pool.
    """

    def __init__(self, model: LlamaModel, *, max_tokens: int, threads: int | None = None) -> None:
        params = C.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = self.max_tokens = max_tokens
        params.n_seq_max = MAX_SEQUENCES
        params.kv_unified = True
        params.embeddings = True
        params.n_threads = params.n_threads_batch = threads or num_threads()
        params.no_perf = True
        library.log.clear()
        self._context: Any = C.llama_init_from_model(model.handle, params)
        if not self._context:
            raise ModelLoadError(
                "llama.cpp could not create a context: " + "; ".join(library.log.errors())
            )
        pooling = int(C.llama_pooling_type(self._context))
        self.ranks = pooling == RANK
        self.size = int(C.llama_model_n_cls_out(model.handle) if self.ranks else model.n_embd)
        if pooling not in POOLINGS:
            C.llama_free(self._context)
            raise ModelLoadError(
                "this is not an embedding model: it does not say how token vectors are pooled "
                "(mean, first or last token)."
            )
        self._batch = C.llama_batch_init(max_tokens, 0, 1)

    def encode(self, sequences: Sequence[Sequence[int]]) -> np.ndarray:
        """Vectors of at most `MAX_SEQUENCES` sequences with at most ``max_tokens`` tokens together:
        float32, shape (n, size). Raises `EngineError`."""
        at = 0
        for number, tokens in enumerate(sequences):
            for position, token in enumerate(tokens):
                self._batch.token[at], self._batch.pos[at] = token, position
                self._batch.n_seq_id[at], self._batch.seq_id[at][0] = 1, number
                self._batch.logits[at] = True
                at += 1
        self._batch.n_tokens = at
        memory = C.llama_get_memory(self._context)
        if memory:
            C.llama_memory_clear(memory, True)
        code = C.llama_decode(self._context, self._batch)
        if code:
            raise EngineError(
                f"the texts could not be embedded: {'; '.join(library.log.errors(2)) or code}"
            )
        C.llama_synchronize(self._context)
        vectors = np.empty((len(sequences), self.size), np.float32)
        for number in range(len(sequences)):
            source = C.llama_get_embeddings_seq(self._context, number)
            vectors[number] = np.ctypeslib.as_array(
                ctypes.cast(source, ctypes.POINTER(ctypes.c_float)), (self.size,)
            )
        return vectors

    def close(self) -> None:
        if self._context:
            C.llama_batch_free(self._batch)
            C.llama_free(self._context)
            self._context = None
