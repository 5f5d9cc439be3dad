"""A context of llama.cpp: the sequences of one model, computed in batches. Only the engine thread
calls a runner, except for ``interrupt`` and ``sampler``."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from llmkit.backend import library
from llmkit.backend.grammar import Constraint
from llmkit.backend.library import C, num_threads, strlen
from llmkit.backend.media_rows import MediaRows
from llmkit.backend.model import LlamaModel
from llmkit.backend.outputs import merged, with_gaps
from llmkit.backend.patience import Patience
from llmkit.backend.rows import Rows
from llmkit.backend.sampler import ChainCache, Sampler
from llmkit.backend.selection import Selector
from llmkit.backend.sequences import Sequences
from llmkit.backend.state import StateStore, fingerprint
from llmkit.engine.batch import Batch, Chunk, Close, Open, SlotOp, StepOutput
from llmkit.errors import ModelLoadError
from llmkit.protocol.sampling import SamplingParams
from llmkit.system.waiting import deferred

__all__ = ["LlamaRunner"]

Adapters = tuple[tuple[str, float], ...]
MASK_GRACE_S = 0.02  # how long a step waits for masks, all of its requests together
KV_TYPES = {"f16": 1, "q8_0": 8, "q4_0": 2}


class LlamaRunner:
    """A llama.cpp context with ``n_slots`` sequences of ``n_ctx`` tokens; implements `ModelRunner`.

    ``kv_unified`` puts all sequences into one buffer instead of one stream each (slower with many
    clients: each query scans the cells of the others). Raises `ModelLoadError` if the context
    cannot be created.
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
        kv_tokens: int | None = None,
        kv_type: str = "f16",
        flash_attention: bool | None = None,
        rope_scaling: float | None = None,
        host_tokens: int = 0,
        prefix_dir: Path | None = None,
        max_disk_bytes: int = 0,
        locks: Path | None = None,
        deterministic: bool = False,
        lora: Sequence[Path] = (),
    ) -> None:
        self.n_ctx, self.n_slots = n_ctx, n_slots
        self.max_batch_tokens = max(max_batch_tokens, n_slots)
        self.can_truncate = self.can_fork = not model.is_recurrent
        self.capacity = (kv_tokens or n_ctx * n_slots) if kv_unified else None
        self._model = model
        self._deterministic = deterministic
        # ggml's flash attention works on tiles of 64 queries; smaller chunks cost up to twice as
        # much per token (9.6 ms instead of 5.4 at 2,500 tokens).
        self.tile = 1 if flash_attention is False or model.on_gpu else 64
        self.num_threads = threads = threads or num_threads()
        params = C.llama_context_default_params()
        params.n_ctx = self.capacity or n_ctx * n_slots
        params.n_seq_max = n_slots
        params.n_batch = params.n_ubatch = self.max_batch_tokens
        params.n_threads = params.n_threads_batch = threads
        params.kv_unified = kv_unified
        params.type_k = params.type_v = KV_TYPES[kv_type]
        if flash_attention is not None:
            params.flash_attn_type = int(flash_attention)
        if rope_scaling is not None:
            params.rope_freq_scale = 1 / rope_scaling
        # A sliding-window cache would accept a truncation and then answer wrongly; the full one is
        # right, but takes more memory.
        params.swa_full = model.has_sliding_window
        params.no_perf = True
        self._interrupt = ctypes.create_string_buffer(2)
        params.abort_callback = strlen()
        params.abort_callback_data = ctypes.addressof(self._interrupt)
        library.log.clear()
        self._context: Any = None
        try:
            with deferred():  # takes seconds for a large cache
                self._context = C.llama_init_from_model(model.handle, params)
        except KeyboardInterrupt:
            C.llama_free(self._context)
            raise
        if not self._context:
            raise ModelLoadError(
                f"llama.cpp could not create a context of {n_slots} x {n_ctx} tokens: "
                + "; ".join(library.log.errors())
            )
        self.device_bytes = model.device_bytes | library.log.device_bytes()
        mine = library.log.gpu_bytes()
        self.gpu_bytes = {
            name: model.gpu_bytes.get(name, 0) + mine.get(name, 0)
            for name in sorted(model.gpu_bytes | mine)
        }
        self._memory = C.llama_get_memory(self._context)
        if not self._memory:
            C.llama_free(self._context)
            raise ModelLoadError("this is not a text generation model: it keeps no context memory.")
        self._samplers: dict[int, Sampler] = {}
        self._chains = ChainCache(model.vocab)
        self._adapters: dict[int, Adapters] = {}
        self._lora = {path.stem: self._load_adapter(path) for path in lora}
        self._serials = [0] * n_slots
        self._faults: dict[int, str] = {}
        self._rows = Rows(self.max_batch_tokens)
        self._media_rows: MediaRows | None = None
        self._decode = C.llama_decode
        self._synchronize = C.llama_synchronize
        settings = {
            "n_ctx": self.capacity or n_ctx,
            "unified": kv_unified,
            "kv_type": kv_type,
            "flash": flash_attention,
            "rope": rope_scaling,
        }
        try:
            settings["lora"] = [fingerprint(path) for path in lora] if prefix_dir else []
            identity = (
                fingerprint(model.path, library=library.version(), **settings) if prefix_dir else ""
            )
            self._store = StateStore(self._context, identity, prefix_dir, max_disk_bytes, locks)
        except BaseException:
            C.llama_free(self._context)
            raise
        self._sequences = Sequences(
            self._memory, self._store, can_truncate=self.can_truncate, deterministic=deterministic
        )
        self._selector = Selector(
            self._context, model.vocab.n_tokens, self._sequences, self._faults
        )
        self.saves, self.host_tokens = prefix_dir is not None, host_tokens

    def _load_adapter(self, path: Path) -> Any:
        """An adapter lives as long as the model, which frees it. Raises `ModelLoadError`."""
        library.log.clear()
        handle = C.llama_adapter_lora_init(self._model.handle, os.fsencode(path))
        if not handle:
            C.llama_free(self._context)
            raise ModelLoadError(
                f"llama.cpp could not load the adapter {path}: " + "; ".join(library.log.errors())
            )
        return handle

    @property
    def can_shift(self) -> bool:
        """Whether tokens can move to other positions; not every position encoding allows it."""
        return bool(C.llama_memory_can_shift(self._memory)) and self.can_truncate

    def set_threads(self, count: int) -> None:
        """Compute with ``count`` threads from the next step on."""
        C.llama_set_n_threads(self._context, count, count)

    def saved(self) -> list[tuple[int, list[int], str]]:
        return self._store.found()

    def execute(self, batch: Batch) -> StepOutput:
        self._patience = Patience(MASK_GRACE_S)  # for the whole step, however many decodes it takes
        self._sequences.begin(batch.ops)
        for op in batch.ops:
            self._apply(op)
        lost, self._store.lost = tuple(self._store.lost), []
        broken = self._sequences.broken
        if not batch.chunks:
            return StepOutput((), (), lost=lost, broken=tuple(broken))
        if broken:
            whole = [c for c in batch.chunks if c.slot not in broken]
            return replace(
                with_gaps(batch.chunks, self._step(whole, lost), broken), broken=tuple(broken)
            )
        return self._step(batch.chunks, lost)

    def _step(self, chunks: Sequence[Chunk], lost: Sequence[int]) -> StepOutput:
        """Chunks with different adapters are decoded separately, and so are text, images, and
        images that must be whole, those of each size (llama.cpp takes equal parts of sequences
        together, and so would cut the longer ones). In a deterministic engine every chunk is, since
        its arithmetic depends on its neighbours."""
        groups: dict[object, list[int]] = {}
        for i, chunk in enumerate(chunks):
            item = chunk.item
            kind = None if item is None else item.n_tokens * item.whole
            adapters = self._adapters.get(self._serials[chunk.slot], ())
            groups.setdefault(i if self._deterministic else (kind, adapters), []).append(i)
        if len(groups) <= 1:
            return self._decode_together(chunks, lost)
        outputs: dict[int, tuple[StepOutput, int]] = {}
        emptied: list[int] = []
        for members in groups.values():
            output = self._decode_together([chunks[i] for i in members], ())
            if output.no_room and outputs:  # the others continue, these are retried
                output = replace(output, no_room=False)
            elif output.error:
                # Only theirs: what the failed decode left in their slots is useless.
                for i in members:
                    self._faults[chunks[i].slot] = output.error
                    self._sequences.clear(chunks[i].slot)
                    emptied.append(chunks[i].slot)
                output = replace(output, error=None)
            elif output.no_room:
                return replace(
                    output, tokens=[()] * len(chunks), resident=[c.start for c in chunks], lost=lost
                )
            outputs.update((i, (output, place)) for place, i in enumerate(members))
        return replace(
            merged([outputs[i] for i in range(len(chunks))], lost, tuple(self._faults.items())),
            emptied=tuple(emptied),
        )

    def _decode_together(self, chunks: Sequence[Chunk], lost: Sequence[int]) -> StepOutput:
        if not chunks:
            return StepOutput((), (), lost=lost)
        start = time.perf_counter()
        if self._lora:
            self._use_adapters(self._adapters.get(self._serials[chunks[0].slot], ()))
        if chunks[0].item is not None:
            return self._decode_media(chunks, chunks[0].item.whole, lost)
        rows = self._rows.fill(chunks)
        for chunk in chunks:
            if (
                chunk.sample
                and (sampler := self._samplers.get(self._serials[chunk.slot])) is not None
            ):
                sampler.prepare()
        decode_start = time.perf_counter()
        code = self._decode(self._context, self._rows.batch)
        if code == 0:
            self._synchronize(self._context)
            seconds = time.perf_counter() - decode_start
            samplers = [self._samplers.get(self._serials[c.slot]) for c in chunks]
            return self._selector.select(
                chunks, rows, self._rows.output, samplers, self._patience, lost, seconds
            )
        return self._failed(code, chunks, lost, time.perf_counter() - start)

    def _decode_media(
        self, chunks: Sequence[Chunk], whole: bool, lost: Sequence[int]
    ) -> StepOutput:
        """Cells of images and sounds, of any number of requests; ``whole`` ones see all of
        themselves, not only what came before."""
        start = time.perf_counter()
        if self._media_rows is None:
            self._media_rows = MediaRows(self.max_batch_tokens)
        self._media_rows.fill(chunks)
        if whole:
            C.llama_set_causal_attn(self._context, False)
        try:
            code = self._decode(self._context, self._media_rows.batch)
            self._synchronize(self._context)
        finally:
            if whole:
                C.llama_set_causal_attn(self._context, True)
        seconds = time.perf_counter() - start
        if code:
            return self._failed(code, chunks, lost, seconds)
        return StepOutput(
            [()] * len(chunks),
            [c.start + len(c.tokens) for c in chunks],
            faults=tuple(self._faults.items()),
            lost=lost,
            backend_s=seconds,
        )

    def _failed(
        self, code: int, chunks: Sequence[Chunk], lost: Sequence[int], seconds: float
    ) -> StepOutput:
        """What an interrupted or failed decode leaves."""
        nothing: list[tuple[int, ...]] = [()] * len(chunks)
        if code == 2:
            return StepOutput(
                nothing,
                [self._sequences.keep_whole(c) for c in chunks],
                interrupted=True,
                lost=lost,
                backend_s=seconds,
            )
        if code == 1:
            return StepOutput(
                nothing, [c.start for c in chunks], no_room=True, lost=lost, backend_s=seconds
            )
        error = "; ".join(library.log.errors(2)) or f"llama_decode returned {code}"
        return StepOutput(nothing, [0] * len(chunks), error=error, lost=lost, backend_s=seconds)

    def _apply(self, op: SlotOp) -> None:
        match op:
            case Open():
                self._open(op)
            case Close():
                self._adapters.pop(op.serial, None)
                sampler = self._samplers.pop(op.serial, None)
                if sampler is not None:
                    sampler.close()
            case _:
                self._sequences.apply(op)

    def _use_adapters(self, adapters: Adapters) -> None:
        handles = (C.llama_adapter_lora_p_ctypes * len(adapters))(
            *(self._lora[name] for name, _ in adapters)
        )
        scales = (ctypes.c_float * len(adapters))(*(scale for _, scale in adapters))
        C.llama_set_adapters_lora(self._context, handles, len(adapters), scales)

    def _open(self, op: Open) -> None:
        self._serials[op.slot] = op.serial
        self._faults.pop(op.slot, None)
        if op.serial in self._samplers:  # it was preempted, and continues as it was
            return
        try:
            if op.adapters:
                self._adapters[op.serial] = tuple(op.adapters)
            assert op.constraint is None or isinstance(op.constraint, Constraint)
            self._samplers[op.serial] = (
                op.sampler
                if isinstance(op.sampler, Sampler)
                else self.sampler(op.sampling, op.history, op.constraint)
            )
        except Exception as error:  # caused by its own parameters: the others continue
            self._faults[op.slot] = repr(error)

    def sampler(
        self,
        sampling: SamplingParams,
        history: Sequence[int],
        constraint: Constraint | None,
        num_drawn: int = 0,
    ) -> Sampler:
        """What chooses the tokens of one request, the last ``num_drawn`` of ``history`` chosen
        before. Any thread, since it takes up to a tenth of a second. Raises
        `InvalidRequestError`."""
        return Sampler(sampling, self._model.vocab, history, constraint, self._chains, num_drawn)

    def logits(self, tokens: list[int]) -> np.ndarray:
        """Teacher-forced logits of a token list in slot 0: float32, shape (len(tokens), n_vocab).
        For tests and perplexity, only on an idle engine."""
        self._sequences.clear(0)
        out = []
        for at in range(0, len(tokens), self.max_batch_tokens):
            part = tokens[at : at + self.max_batch_tokens]
            self._rows.fill((Chunk(0, at, part, True, draft=len(part) - 1),))
            if self._decode(self._context, self._rows.batch):
                raise RuntimeError("llama_decode failed")
            out.append(self._selector.logits(len(part)).copy())
        self._sequences.clear(0)
        return np.concatenate(out)

    def interrupt(self) -> None:
        self._interrupt[0] = b"\x01"

    def clear_interrupt(self) -> None:
        self._interrupt[0] = b"\x00"

    def close(self) -> None:
        for sampler in self._samplers.values():
            sampler.close()
        self._samplers.clear()
        self._store.close()
        if self._context:
            C.llama_free(self._context)
            self._context = None
