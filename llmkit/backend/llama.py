"""A GGUF model and its context in llama.cpp. The engine thread is the only caller of a runner, but for ``interrupt``."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from llmkit.backend import library
from llmkit.backend.library import C, short
from llmkit.backend.sampler import SamplerChain
from llmkit.backend.vocab import Vocab
from llmkit.engine.batch import Batch, Chunk, Fork, Open, SlotOp, StepOutput
from llmkit.errors import ModelLoadError

__all__ = ["LlamaModel", "LlamaRunner", "num_threads"]

VOCAB_TYPE_NONE = 0


def num_threads() -> int:
    """Cores this process may use: affinity and cgroup quota, at least 1."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            count = min(count, max(1, int(quota) // int(period)))
    return count


class LlamaModel:
    """The weights of one file, read-only once loaded; contexts share them.

    Raises `ModelLoadError` with llama.cpp's last error lines. A KeyboardInterrupt ends the load.
    """

    def __init__(self, path: Path, *, n_gpu_layers: int = -1) -> None:
        library.start()
        library.log.clear()
        cancelled = threading.Event()

        @C.llama_progress_callback  # type: ignore[untyped-decorator]
        def on_progress(share: float, _: Any) -> bool:
            return not cancelled.is_set()

        params = C.llama_model_default_params()
        params.n_gpu_layers = n_gpu_layers
        params.progress_callback = on_progress
        self.handle: Any = None
        self.vocab: Vocab

        def load() -> None:
            self.handle = C.llama_model_load_from_file(os.fsencode(path), params)

        # In a thread of its own, so that the stop button reaches the waiting one.
        worker = threading.Thread(target=load, name="llmkit-load", daemon=True)
        worker.start()
        try:
            while worker.is_alive():
                worker.join(0.1)
        except KeyboardInterrupt:
            cancelled.set()
            worker.join()
            self.close()
            raise KeyboardInterrupt("loading was stopped") from None
        if not self.handle:
            raise ModelLoadError(f"llama.cpp could not load {path}: " + "; ".join(library.log.errors()))
        self.vocab = Vocab(self.handle)

    @property
    def n_ctx_train(self) -> int:
        return int(C.llama_model_n_ctx_train(self.handle))

    @property
    def size_bytes(self) -> int:
        return int(C.llama_model_size(self.handle))

    @property
    def n_params(self) -> int:
        return int(C.llama_model_n_params(self.handle))

    @property
    def can_generate(self) -> bool:
        plain = C.llama_model_has_decoder(self.handle) and not C.llama_model_has_encoder(self.handle) and not C.llama_model_is_diffusion(self.handle)
        return bool(plain) and int(C.llama_vocab_type(C.llama_model_get_vocab(self.handle))) != VOCAB_TYPE_NONE

    @property
    def is_recurrent(self) -> bool:
        """Recurrent or hybrid: its state cannot be cut back to an earlier position."""
        return bool(C.llama_model_is_recurrent(self.handle) or C.llama_model_is_hybrid(self.handle))

    @property
    def has_sliding_window(self) -> bool:
        return int(C.llama_model_n_swa(self.handle)) > 0

    def close(self) -> None:
        """Free the weights; after all runners."""
        if self.handle:
            C.llama_model_free(self.handle)
            self.handle = None
        _return_free_memory()


def _return_free_memory() -> None:
    """glibc keeps freed memory for later; a notebook user wants to see it gone."""
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError, OSError):
            ctypes.CDLL(None).malloc_trim(0)


class LlamaRunner:
    """One llama.cpp context with ``n_slots`` sequences of ``n_ctx`` tokens; implements `ModelRunner`.

    ``kv_unified`` puts all sequences into one buffer instead of one stream each (slower with many clients: each query walks the cells of
    the others). Raises `ModelLoadError` when the context cannot be made.
    """

    def __init__(
        self,
        model: LlamaModel,
        *,
        n_ctx: int,
        n_slots: int,
        max_batch_tokens: int = 512,
        threads: int | None = None,
        kv_unified: bool = False,
    ) -> None:
        self.n_ctx, self.n_slots = n_ctx, n_slots
        self.max_batch_tokens = max(max_batch_tokens, n_slots)
        self.can_truncate = self.can_fork = not model.is_recurrent
        self._model = model
        threads = threads or num_threads()
        params = C.llama_context_default_params()
        params.n_ctx = n_ctx * n_slots
        params.n_seq_max = n_slots
        params.n_batch = params.n_ubatch = self.max_batch_tokens
        params.n_threads = params.n_threads_batch = threads
        params.kv_unified = kv_unified
        # A sliding-window cache would accept a truncation and answer wrongly after it; the full one is right, for more memory.
        params.swa_full = model.has_sliding_window
        params.no_perf = True
        self._interrupt = ctypes.create_string_buffer(2)
        params.abort_callback = _strlen()
        params.abort_callback_data = ctypes.addressof(self._interrupt)
        library.log.clear()
        self._context: Any = C.llama_init_from_model(model.handle, params)
        if not self._context:
            raise ModelLoadError(f"llama.cpp could not make a context of {n_slots} x {n_ctx} tokens: " + "; ".join(library.log.errors()))
        self._memory = C.llama_get_memory(self._context)
        if not self._memory:
            C.llama_free(self._context)
            raise ModelLoadError("this model keeps no context memory: it is no text generation model.")
        self._n_vocab = model.vocab.n_tokens
        self._c_seconds = 0.0  # of the running step, inside llama.cpp
        self._samplers: list[SamplerChain | None] = [None] * n_slots
        self._faults: dict[int, str] = {}
        self._ignore_eos = [False] * n_slots
        self._end_tokens = np.fromiter(model.vocab.end_tokens, np.int64)
        self._make_batch(self.max_batch_tokens)
        self._seq_rm, self._seq_cp = short("llama_memory_seq_rm"), short("llama_memory_seq_cp")
        self._pos_max = short("llama_memory_seq_pos_max")
        self._logits = short("llama_get_logits")
        self._decode = C.llama_decode
        self._synchronize = C.llama_synchronize

    def _make_batch(self, size: int) -> None:
        """One llama_batch for the life of the context, its arrays owned by numpy."""
        self._token, self._pos = np.zeros(size, np.int32), np.zeros(size, np.int32)
        self._seq, self._output = np.zeros(size, np.int32), np.zeros(size, np.int8)
        self._n_seq = np.ones(size, np.int32)
        self._seq_pointers = self._seq.ctypes.data + 4 * np.arange(size, dtype=np.uint64)
        self._batch = C.llama_batch()
        kinds: dict[str, Any] = {name: kind for name, kind, *_ in C.llama_batch._fields_}
        arrays: dict[str, np.ndarray] = {"token": self._token, "pos": self._pos, "n_seq_id": self._n_seq, "seq_id": self._seq_pointers, "logits": self._output}
        for name, array in arrays.items():
            setattr(self._batch, name, ctypes.cast(array.ctypes.data, kinds[name]))

    def execute(self, batch: Batch) -> StepOutput:
        for op in batch.ops:
            self._apply(op)
        if not batch.chunks:
            return StepOutput((), ())
        rows = self._fill(batch.chunks)
        start = time.perf_counter()
        code = self._decode(self._context, self._batch)
        if code == 0:
            self._synchronize(self._context)
            self._c_seconds = time.perf_counter() - start
            # Sampling may use the interrupt flag no more: the decode is whole, its tokens count.
            tokens = self._sample(batch.chunks, rows)
            resident = [c.start + len(c.tokens) for c in batch.chunks]
            return StepOutput(tokens, resident, faults=tuple(self._faults.items()), backend_s=self._c_seconds)
        seconds = time.perf_counter() - start
        nothing = [None] * len(batch.chunks)
        if code == 2:
            return StepOutput(nothing, [self._resident(c) for c in batch.chunks], interrupted=True, backend_s=seconds)
        if code == 1:
            return StepOutput(nothing, [c.start for c in batch.chunks], no_room=True, backend_s=seconds)
        error = "; ".join(library.log.errors(2)) or f"llama_decode returned {code}"
        return StepOutput(nothing, [0] * len(batch.chunks), error=error, backend_s=seconds)

    def _apply(self, op: SlotOp) -> None:
        if isinstance(op, Open):
            previous = self._samplers[op.slot]
            if previous is not None:
                previous.close()
            self._ignore_eos[op.slot] = op.sampling.ignore_eos
            self._samplers[op.slot] = None
            self._faults.pop(op.slot, None)
            try:
                if not op.sampling.plain_greedy:
                    self._samplers[op.slot] = SamplerChain(op.sampling, self._model.vocab, op.history)
            except Exception as error:  # this request's own parameters: the others go on
                self._faults[op.slot] = repr(error)
        elif isinstance(op, Fork):
            # Between split streams only whole copies exist; the rest is cut off afterwards.
            self._seq_rm(self._memory, op.target, -1, -1)
            self._seq_cp(self._memory, op.source, op.target, -1, -1)
            self._seq_rm(self._memory, op.target, op.length, -1)
        elif not self._seq_rm(self._memory, op.slot, op.length or -1, -1):
            raise RuntimeError(f"llama.cpp could not cut sequence {op.slot} back to {op.length} tokens")

    def _fill(self, chunks: tuple[Chunk, ...]) -> list[int]:
        """Write the chunks into the C batch. Returns the batch row of each chunk's last token."""
        at, rows = 0, []
        self._output[:] = 0
        for chunk in chunks:
            end = at + len(chunk.tokens)
            self._token[at:end] = chunk.tokens
            self._pos[at:end] = np.arange(chunk.start, chunk.start + end - at)
            self._seq[at:end] = chunk.slot
            self._output[end - 1] = chunk.sample
            rows.append(end - 1)
            at = end
        self._batch.n_tokens = at
        return rows

    def _sample(self, chunks: tuple[Chunk, ...], rows: list[int]) -> list[int | None]:
        n_outputs = sum(c.sample for c in chunks)
        if not n_outputs:
            return [None] * len(chunks)
        logits = np.ctypeslib.as_array(self._logits(self._context), (n_outputs, self._n_vocab))
        tokens: list[int | None] = []
        row_of_output = 0
        for chunk, row in zip(chunks, rows, strict=True):
            if not chunk.sample:
                tokens.append(None)
                continue
            sampler = self._samplers[chunk.slot]
            if sampler is None:
                tokens.append(self._argmax(logits[row_of_output], self._ignore_eos[chunk.slot]))
            else:
                start = time.perf_counter()
                tokens.append(sampler.sample(self._context, row))
                self._c_seconds += time.perf_counter() - start
            row_of_output += 1
        return tokens

    def _argmax(self, row: np.ndarray, ignore_eos: bool) -> int:
        """numpy over a view of the logits takes 18 us where the C chain takes 120: that one copies the vocabulary first."""
        token = int(row.argmax())
        if ignore_eos and token in self._model.vocab.end_tokens:
            row[self._end_tokens] = -np.inf
            token = int(row.argmax())
        return token

    def _resident(self, chunk: Chunk) -> int:
        """After an interrupt: how many tokens of the slot are whole. The last one of a sampling chunk is given up, since its logits are lost."""
        if not self.can_truncate:  # its state may be half updated, and says nothing of it
            self._seq_rm(self._memory, chunk.slot, -1, -1)
            return 0
        length = int(self._pos_max(self._memory, chunk.slot)) + 1
        keep = min(length, chunk.start + len(chunk.tokens) - chunk.sample)
        if keep < length:
            self._seq_rm(self._memory, chunk.slot, keep, -1)
        return keep

    def logits(self, tokens: list[int]) -> np.ndarray:
        """Teacher-forced logits of a token list in slot 0: float32, shape (len(tokens), n_vocab). For tests and perplexity, on an idle engine only."""
        self._seq_rm(self._memory, 0, -1, -1)
        out = []
        for at in range(0, len(tokens), self.max_batch_tokens):
            part = tokens[at : at + self.max_batch_tokens]
            self._fill((Chunk(0, at, part, True),))
            self._output[: len(part)] = 1
            if self._decode(self._context, self._batch):
                raise RuntimeError("llama_decode failed")
            out.append(np.ctypeslib.as_array(self._logits(self._context), (len(part), self._n_vocab)).copy())
        self._seq_rm(self._memory, 0, -1, -1)
        return np.concatenate(out)

    def interrupt(self) -> None:
        self._interrupt[0] = b"\x01"

    def clear_interrupt(self) -> None:
        self._interrupt[0] = b"\x00"

    def close(self) -> None:
        for sampler in self._samplers:
            if sampler is not None:
                sampler.close()
        self._samplers = [None] * self.n_slots
        if self._context:
            C.llama_free(self._context)
            self._context = None


def _strlen() -> Any:
    """libc's strlen as an abort callback over a two-byte flag: true when the flag is set. ggml asks hundreds of times a decode, where a Python function
    would need the GIL each time (beside a busy cell that costs a second a token)."""
    libc = ctypes.CDLL(None) if sys.platform != "win32" else ctypes.cdll.msvcrt
    return ctypes.cast(libc.strlen, C.ggml_abort_callback)
