"""What libmtmd's own helper computes for a prompt with images and sounds: one sequence, nothing
cached, pictures encoded and decoded where they stand."""

from __future__ import annotations

import ctypes
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from llmkit.backend.library import C
from llmkit.backend.media import Projector
from llmkit.backend.model import LlamaModel
from llmkit.chat.template import ChatTemplate
from llmkit.media.pictures import pixels
from llmkit.media.sounds import samples
from llmkit.protocol import GenerationRequest, Media, Message

mtmd: Any = import_module("llama_cpp.mtmd_cpp")  # after llmkit's own import of the package
CLOSE = 0.3  # logits nearer than this may change places with the shape of a batch
MARK = mtmd.mtmd_default_marker().decode()


class Reference:
    """A model and its projector, without llmkit's engine."""

    def __init__(self, model: Path, projector: Path, n_ctx: int = 1024) -> None:
        self._model = LlamaModel(model, n_gpu_layers=0)
        self._projector = Projector(projector, self._model, threads=1)
        params = C.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = n_ctx
        params.n_seq_max, params.n_threads, params.n_threads_batch = 1, 1, 1
        params.swa_full = True
        self._n_ctx = n_ctx
        self._context = C.llama_init_from_model(self._model.handle, params)
        self._memory = C.llama_get_memory(self._context)

    def check(self, request: GenerationRequest, tokens: tuple[int, ...], template: str) -> None:
        """That an answer is the helper's, but for choices that are as good as equal."""
        position = self._read(request, template)
        one = (C.llama_token * 1)()
        for i, token in enumerate(tokens):
            logits = np.ctypeslib.as_array(
                C.llama_get_logits_ith(self._context, -1), (self._model.vocab.n_tokens,)
            )
            if request.sampling.ignore_eos:
                logits[self._model.vocab.end_ids] = -np.inf
            assert logits.max() - logits[token] < CLOSE, (
                f"token {i} of {len(tokens)} is {logits.max() - logits[token]:.3f} below the best"
            )
            one[0] = token
            batch = C.llama_batch_get_one(one, 1)
            places = (C.llama_pos * 1)(position + i)
            batch.pos = places
            assert C.llama_decode(self._context, batch) == 0

    def _read(self, request: GenerationRequest, template: str) -> int:
        """Compute a request's prompt. Returns the next position."""
        bitmaps: list[Any] = []
        kept: list[np.ndarray] = []

        def mark(media: Media) -> str:
            data = request.media[media.digest]
            if media.kind == "image":
                kept.append(np.ascontiguousarray(pixels(data)))
                height, width, _ = kept[-1].shape
                at = kept[-1].ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
                bitmaps.append(mtmd.mtmd_bitmap_init(width, height, at))
            else:
                kept.append(samples(data, self._projector.sample_rate))
                at = kept[-1].ctypes.data_as(ctypes.POINTER(ctypes.c_float))
                bitmaps.append(mtmd.mtmd_bitmap_init_from_audio(len(kept[-1]), at))
            return MARK

        vocab = self._model.vocab
        said = [
            Message(m.role, "".join(p if isinstance(p, str) else mark(p) for p in m.parts))
            for m in request.messages or ()
        ]
        bos = vocab.token_text(vocab.bos)
        text = ChatTemplate(template, bos=bos).render(said).encode()
        asked = mtmd.mtmd_input_text(text, len(text), True, True)
        chunks = mtmd.mtmd_input_chunks_init()
        array = (mtmd.mtmd_bitmap_p_ctypes * len(bitmaps))(*bitmaps)
        handle = self._projector.handle
        assert not mtmd.mtmd_tokenize(handle, chunks, ctypes.byref(asked), array, len(bitmaps))
        C.llama_memory_clear(self._memory, True)
        end = C.llama_pos()
        sizes = (0, 0, self._n_ctx, True, ctypes.byref(end))
        assert not mtmd.mtmd_helper_eval_chunks(handle, self._context, chunks, *sizes)
        mtmd.mtmd_input_chunks_free(chunks)
        for bitmap in bitmaps:
            mtmd.mtmd_bitmap_free(bitmap)
        return int(end.value)

    def close(self) -> None:
        C.llama_free(self._context)
        self._projector.close()
        self._model.close()
