"""A context of llama.cpp: the sequences of one model, computed in batches. The engine thread is the only caller of a runner, but for ``interrupt``."""

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
from llmkit.backend.grammar import Constraint, Late, Patience
from llmkit.backend.library import C, num_threads, short, strlen
from llmkit.backend.model import LlamaModel
from llmkit.backend.outputs import merged, with_gaps
from llmkit.backend.rows import Rows
from llmkit.backend.sampler import ChainCache, Sampler, score
from llmkit.backend.state import StateStore, fingerprint
from llmkit.engine.batch import Batch, Chunk, Close, Drop, Fork, Open, Park, Restore, Score, Shift, SlotOp, StepOutput, Truncate
from llmkit.errors import InvalidRequestError, ModelLoadError
from llmkit.sampling import SamplingParams
from llmkit.waiting import deferred

__all__ = ["LlamaRunner"]

Adapters = tuple[tuple[str, float], ...]
MASK_GRACE_S = 0.02  # a step waits so long for masks, all of its requests together
KV_TYPES = {"f16": 1, "q8_0": 8, "q4_0": 2}


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
        # ggml's flash attention works on tiles of 64 queries; smaller chunks cost up to twice as much a token (9.6 ms instead of 5.4 at 2,500 tokens).
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
        # A sliding-window cache would accept a truncation and answer wrongly after it; the full one is right, for more memory.
        params.swa_full = model.has_sliding_window
        params.no_perf = True
        self._interrupt = ctypes.create_string_buffer(2)
        params.abort_callback = strlen()
        params.abort_callback_data = ctypes.addressof(self._interrupt)
        library.log.clear()
        self._context: Any = None
        try:
            with deferred():  # seconds for a large cache
                self._context = C.llama_init_from_model(model.handle, params)
        except KeyboardInterrupt:
            C.llama_free(self._context)
            raise
        if not self._context:
            raise ModelLoadError(f"llama.cpp could not make a context of {n_slots} x {n_ctx} tokens: " + "; ".join(library.log.errors()))
        self.device_bytes = model.device_bytes | library.log.device_bytes()
        self._memory = C.llama_get_memory(self._context)
        if not self._memory:
            C.llama_free(self._context)
            raise ModelLoadError("this model keeps no context memory: it is no text generation model.")
        self._n_vocab = model.vocab.n_tokens
        self._samplers: dict[int, Sampler] = {}
        self._chains = ChainCache(model.vocab)
        self._adapters: dict[int, Adapters] = {}
        self._lora = {path.stem: self._load_adapter(path) for path in lora}
        self._serials = [0] * n_slots
        self._faults: dict[int, str] = {}
        self._broken: set[int] = set()
        self._fork_now = False
        self._rows = Rows(self.max_batch_tokens)
        self._seq_rm, self._seq_cp = short("llama_memory_seq_rm"), short("llama_memory_seq_cp")
        self._pos_max = short("llama_memory_seq_pos_max")
        self._logits = short("llama_get_logits")
        self._decode = C.llama_decode
        self._synchronize = C.llama_synchronize
        marks = {"n_ctx": self.capacity or n_ctx, "unified": kv_unified, "kv_type": kv_type, "flash": flash_attention, "rope": rope_scaling}
        try:
            marks["lora"] = [fingerprint(path) for path in lora] if prefix_dir else []
            mark = fingerprint(model.path, library=library.VERSION, **marks) if prefix_dir else ""
            self._store = StateStore(self._context, mark, prefix_dir, max_disk_bytes, locks)
        except BaseException:
            C.llama_free(self._context)
            raise
        self.saves, self.host_tokens = prefix_dir is not None, host_tokens

    def _load_adapter(self, path: Path) -> Any:
        """It lives as long as the model, which frees it. Raises `ModelLoadError`."""
        library.log.clear()
        handle = C.llama_adapter_lora_init(self._model.handle, os.fsencode(path))
        if not handle:
            C.llama_free(self._context)
            raise ModelLoadError(f"llama.cpp could not load the adapter {path}: " + "; ".join(library.log.errors()))
        return handle

    @property
    def can_shift(self) -> bool:
        """Whether tokens can move to other positions: not with every kind of position encoding."""
        return bool(C.llama_memory_can_shift(self._memory)) and self.can_truncate

    def set_threads(self, count: int) -> None:
        """Compute with so many threads from the next step on."""
        C.llama_set_n_threads(self._context, count, count)

    def saved(self) -> list[tuple[int, list[int], str]]:
        return self._store.found()

    def execute(self, batch: Batch) -> StepOutput:
        self._patience = Patience(MASK_GRACE_S)  # of the whole step, however many decodes it takes
        self._broken.clear()
        # llama.cpp copies between streams at the next decode, but reads and writes states at once: beside those, a fork is such a copy too.
        self._fork_now = any(isinstance(op, Park | Restore) for op in batch.ops)
        for op in batch.ops:
            self._apply(op)
        lost, self._store.lost = tuple(self._store.lost), []
        if not batch.chunks:
            return StepOutput((), (), lost=lost, broken=tuple(self._broken))
        if self._broken:
            whole = [c for c in batch.chunks if c.slot not in self._broken]
            return replace(with_gaps(batch.chunks, self._step(whole, lost), self._broken), broken=tuple(self._broken))
        return self._step(batch.chunks, lost)

    def _step(self, chunks: Sequence[Chunk], lost: Sequence[int]) -> StepOutput:
        """Chunks with other adapters go into another decode; in a deterministic engine each goes alone, since its arithmetic depends on what is beside it."""
        groups: dict[object, list[int]] = {}
        for i, chunk in enumerate(chunks):
            groups.setdefault(i if self._deterministic else self._adapters.get(self._serials[chunk.slot], ()), []).append(i)
        if len(groups) <= 1:
            return self._decode_together(chunks, lost)
        outputs: dict[int, tuple[StepOutput, int]] = {}
        emptied: list[int] = []
        for members in groups.values():
            output = self._decode_together([chunks[i] for i in members], ())
            if output.no_room and outputs:  # the others go on, these are tried again
                output = replace(output, no_room=False)
            elif output.error:  # theirs alone: what the failed decode left in their slots is of no use
                for i in members:
                    self._faults[chunks[i].slot] = output.error
                    self._seq_rm(self._memory, chunks[i].slot, -1, -1)
                    emptied.append(chunks[i].slot)
                output = replace(output, error=None)
            elif output.no_room:
                return replace(output, tokens=[()] * len(chunks), resident=[c.start for c in chunks], lost=lost)
            outputs.update((i, (output, place)) for place, i in enumerate(members))
        return replace(merged([outputs[i] for i in range(len(chunks))], lost, tuple(self._faults.items())), emptied=tuple(emptied))

    def _decode_together(self, chunks: Sequence[Chunk], lost: Sequence[int]) -> StepOutput:
        if not chunks:
            return StepOutput((), (), lost=lost)
        start = time.perf_counter()
        if self._lora:
            self._use_adapters(self._adapters.get(self._serials[chunks[0].slot], ()))
        rows = self._rows.fill(chunks)
        for chunk in chunks:
            if chunk.sample and (sampler := self._samplers.get(self._serials[chunk.slot])) is not None:
                sampler.prepare()
        decode_start = time.perf_counter()
        code = self._decode(self._context, self._rows.batch)
        if code == 0:
            self._synchronize(self._context)
            seconds = time.perf_counter() - decode_start
            return self._choose(chunks, rows, lost, seconds)
        seconds = time.perf_counter() - start
        nothing: list[tuple[int, ...]] = [()] * len(chunks)
        if code == 2:
            return StepOutput(nothing, [self._resident(c) for c in chunks], interrupted=True, lost=lost, backend_s=seconds)
        if code == 1:
            return StepOutput(nothing, [c.start for c in chunks], no_room=True, lost=lost, backend_s=seconds)
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
            case Fork():
                # Between split streams only whole copies exist; the rest is cut off afterwards.
                self._seq_rm(self._memory, op.target, -1, -1)
                if op.source in self._broken or (self._fork_now and not self._store.copy(op.source, op.target)):
                    self._broken.add(op.target)
                    return
                if not self._fork_now:
                    self._seq_cp(self._memory, op.source, op.target, -1, -1)
                self._seq_rm(self._memory, op.target, op.length, -1)
            case Park() if op.slot in self._broken:  # there is nothing to copy
                self._store.lost.append(op.key)
            case Park():
                self._store.park(op.key, op.slot, op.tokens, op.salt, op.save)
            case Restore():
                self._seq_rm(self._memory, op.slot, -1, -1)
                if self._store.restore(op.key, op.slot):
                    self._seq_rm(self._memory, op.slot, op.length, -1)
                else:
                    self._seq_rm(self._memory, op.slot, -1, -1)
                    self._broken.add(op.slot)
            case Drop():
                self._store.drop(op.key)
            case Shift():
                self._seq_rm(self._memory, op.slot, op.keep, op.keep + op.discard)
                C.llama_memory_seq_add(self._memory, op.slot, op.keep + op.discard, -1, -op.discard)
            case Truncate():
                if not self._seq_rm(self._memory, op.slot, op.length or -1, -1):
                    raise RuntimeError(f"llama.cpp could not cut sequence {op.slot} back to {op.length} tokens")

    def _use_adapters(self, adapters: Adapters) -> None:
        handles = (C.llama_adapter_lora_p_ctypes * len(adapters))(*(self._lora[name] for name, _ in adapters))
        scales = (ctypes.c_float * len(adapters))(*(scale for _, scale in adapters))
        C.llama_set_adapters_lora(self._context, handles, len(adapters), scales)

    def _open(self, op: Open) -> None:
        self._serials[op.slot] = op.serial
        self._faults.pop(op.slot, None)
        if op.serial in self._samplers:  # it was preempted, and goes on as it was
            return
        try:
            if op.adapters:
                self._adapters[op.serial] = tuple(op.adapters)
            assert op.constraint is None or isinstance(op.constraint, Constraint)
            self._samplers[op.serial] = op.sampler if isinstance(op.sampler, Sampler) else self.sampler(op.sampling, op.history, op.constraint)
        except Exception as error:  # this request's own parameters: the others go on
            self._faults[op.slot] = repr(error)

    def sampler(self, sampling: SamplingParams, history: Sequence[int], constraint: Constraint | None) -> Sampler:
        """What chooses the tokens of one request. Any thread, since it takes up to a tenth of a second. Raises `InvalidRequestError`."""
        return Sampler(sampling, self._model.vocab, history, constraint, self._chains)

    def _choose(self, chunks: Sequence[Chunk], rows: list[int], lost: Sequence[int], seconds: float) -> StepOutput:
        """Sample, check drafts and score, from the logits of a decode that is whole."""
        output = self._rows.output
        n_outputs = int(output.sum())
        resident = [c.start + len(c.tokens) for c in chunks]
        if not n_outputs:
            return StepOutput([()] * len(chunks), resident, faults=tuple(self._faults.items()), lost=lost, backend_s=seconds)
        logits = np.ctypeslib.as_array(self._logits(self._context), (n_outputs, self._n_vocab))
        place = np.cumsum(output, dtype=np.int32) - 1  # of a batch row among the outputs
        tokens: list[tuple[int, ...]] = []
        scores: list[Sequence[Score]] = []
        prompt_scores: list[Sequence[Score]] = []
        forced: list[Sequence[int]] = []
        late: list[int] = []
        refused: list[int] = []
        patience = self._patience
        for i, (chunk, row) in enumerate(zip(chunks, rows, strict=True)):
            sampler = self._samplers.get(self._serials[chunk.slot])
            num_top = sampler.prompt_logprobs if sampler is not None else 0
            prompt_scores.append([score(logits[place[row + j]], target, num_top) for j, target in enumerate(chunk.targets)])
            if not chunk.sample or sampler is None:
                tokens.append(())
                scores.append(())
                forced.append(())
                continue
            try:
                chosen, marks = self._verify(sampler, chunk, row, logits, place, patience)
            except Late:  # nothing is chosen; the token that asks is computed again when its mask is there
                late.append(chunk.slot)
                chosen, marks = [], []
            except Exception as error:  # a grammar that failed ends its own request only
                self._faults[chunk.slot] = str(error)
                if isinstance(error, InvalidRequestError):
                    refused.append(chunk.slot)
                chosen, marks = [], []
            seconds += sampler.c_seconds
            sampler.c_seconds = 0.0
            if chunk.slot in late and not chosen:
                resident[i] = self._take_back(chunk)
            elif len(chosen) < 1 + chunk.draft:
                resident[i] = chunk.start + len(chunk.tokens) - (1 + chunk.draft - len(chosen))
                self._seq_rm(self._memory, chunk.slot, resident[i], -1)
            tokens.append(tuple(chosen))
            scores.append(marks)
            forced.append(() if chunk.slot in self._faults else sampler.forced)
        return StepOutput(
            tokens,
            resident,
            faults=tuple(self._faults.items()),
            lost=lost,
            late=tuple(late),
            refused=tuple(refused),
            scores=scores,
            prompt_scores=prompt_scores,
            forced=forced,
            backend_s=seconds,
        )

    def _take_back(self, chunk: Chunk) -> int:
        """The last token of a chunk, and what was guessed after it, are to be computed again. Returns how many tokens stay."""
        if not self.can_truncate:  # only all of it can be taken back
            self._seq_rm(self._memory, chunk.slot, -1, -1)
            return 0
        keep = chunk.start + len(chunk.tokens) - chunk.draft - 1
        self._seq_rm(self._memory, chunk.slot, keep or -1, -1)
        return keep

    def _verify(self, sampler: Sampler, chunk: Chunk, row: int, logits: np.ndarray, place: np.ndarray, patience: Patience) -> tuple[list[int], list[Score]]:
        """Choose tokens as long as each is the one that was guessed. Each choice is a fresh one from the model's own distribution, so that distribution is what
        comes out, guesses or not."""
        chosen: list[int] = []
        marks: list[Score] = []
        first = row + len(chunk.tokens) - 1 - chunk.draft
        for j in range(1 + chunk.draft):
            try:
                token, mark = sampler.choose(self._context, first + j, logits[place[first + j]], patience)
            except Late:
                if not chosen:
                    raise
                break  # what was chosen so far stands
            chosen.append(token)
            if mark is not None:
                marks.append(mark)
            if j < chunk.draft and token != chunk.tokens[len(chunk.tokens) - chunk.draft + j]:
                break
        return chosen, marks

    def _resident(self, chunk: Chunk) -> int:
        """After an interrupt: how many tokens of the slot are whole. The last one of a sampling chunk is given up, since its logits are lost."""
        if self._deterministic or chunk.targets:  # chunks begin at fixed places, or their scores are lost
            self._seq_rm(self._memory, chunk.slot, chunk.start or -1, -1)
            return chunk.start
        if not self.can_truncate:  # its state may be half updated, and says nothing of it
            self._seq_rm(self._memory, chunk.slot, -1, -1)
            return 0
        length = int(self._pos_max(self._memory, chunk.slot)) + 1
        keep = min(length, chunk.start + len(chunk.tokens) - chunk.draft - chunk.sample)
        if keep < length:
            self._seq_rm(self._memory, chunk.slot, keep, -1)
        return keep

    def logits(self, tokens: list[int]) -> np.ndarray:
        """Teacher-forced logits of a token list in slot 0: float32, shape (len(tokens), n_vocab). For tests and perplexity, on an idle engine only."""
        self._seq_rm(self._memory, 0, -1, -1)
        out = []
        for at in range(0, len(tokens), self.max_batch_tokens):
            part = tokens[at : at + self.max_batch_tokens]
            self._rows.fill((Chunk(0, at, part, True, draft=len(part) - 1),))
            if self._decode(self._context, self._rows.batch):
                raise RuntimeError("llama_decode failed")
            out.append(np.ctypeslib.as_array(self._logits(self._context), (len(part), self._n_vocab)).copy())
        self._seq_rm(self._memory, 0, -1, -1)
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
