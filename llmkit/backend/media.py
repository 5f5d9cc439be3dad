"""Images and sounds to embeddings: llama.cpp's libmtmd, one projector file for one model.

``parts`` and ``prepare`` run on any thread, also while something is encoded; ``encode`` on one.
Files of people are decoded elsewhere: what comes here are pixels and samples.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llmkit.backend import library
from llmkit.backend.library import C
from llmkit.backend.model import LlamaModel
from llmkit.backend.state import fingerprint
from llmkit.errors import InvalidRequestError, ModelLoadError
from llmkit.system.waiting import deferred

__all__ = ["Embeddings", "Part", "Prepared", "Projector"]

TEXT = 0
LARGE = 16_000  # pixels: the side of a picture that takes as many tokens as any
USUAL_SIDE = 560  # pixels, of a picture whose projector does not say
FLOAT_BYTES, CHANNELS = 4, 3
ASPECTS = (1, 1.25, 4 / 3, 1.5, 1.75, 2, 3, 4, 8)
# fmt: off
FUNCTIONS = (
    "bitmap_free", "bitmap_init", "bitmap_init_from_audio", "context_params_default",
    "decode_use_mrope", "decode_use_non_causal", "encode_chunk", "free", "get_audio_sample_rate",
    "get_output_embd", "helper_image_get_decoder_pos", "helper_log_set", "init_from_file",
    "input_chunk_copy", "input_chunk_free", "input_chunk_get_n_pos", "input_chunk_get_n_tokens",
    "input_chunk_get_tokens_image", "input_chunk_get_tokens_text", "input_chunk_get_type",
    "input_chunks_free", "input_chunks_get", "input_chunks_init", "input_chunks_size", "log_set",
    "support_audio", "support_vision", "tokenize_from_parts",
)
# fmt: on


class Part(NamedTuple):
    """What an image or a sound is in a prompt, one after the other: the ``tokens`` of a text, or
    ``n_tokens`` cells that take ``n_positions`` positions, ``whole`` if they are computed at
    once."""

    tokens: tuple[int, ...] = ()
    n_tokens: int = 0
    n_positions: int = 0
    whole: bool = False


@dataclass(frozen=True, slots=True)
class Embeddings:
    """Of the cells of an item: float32, shape (n_tokens, width). ``places``: where each stands
    beside the item's first position, int32 of shape (1, n_tokens), or (4, n_tokens) where positions
    have more than one dimension."""

    rows: np.ndarray
    places: np.ndarray


class Prepared:
    """An image or sound, ready to be encoded: libmtmd's chunks with cells, in order."""

    def __init__(self, mtmd: Any, chunks: list[Any]) -> None:
        self._mtmd = mtmd
        self.chunks = chunks

    def __del__(self) -> None:
        for chunk in self.chunks:
            self._mtmd.mtmd_input_chunk_free(chunk)


class Projector:
    """A projector file (mmproj), loaded for a model that must outlive it.

    ``inputs``: what it takes, of "image" and "audio"; ``width``: numbers in an embedding;
    ``largest_whole``: tokens of the largest image that must be computed at once (0: none must).
    ``identity`` is another for other weights; ``side`` of its usual picture, in pixels, is in its
    header. Raises `ModelLoadError`.
    """

    def __init__(
        self, path: Path, model: LlamaModel, *, threads: int, use_gpu: bool = False, side: int = 0
    ) -> None:
        self._mtmd = mtmd = _bindings()
        self.handle: Any = None
        mtmd.mtmd_log_set(library._keep_log, None)
        mtmd.mtmd_helper_log_set(library._keep_log, None)
        params = mtmd.mtmd_context_params_default()
        params.use_gpu, params.n_threads = use_gpu, threads
        params.print_timings, params.warmup = False, True  # its memory is taken now
        library.log.clear()
        with deferred():
            self.handle = mtmd.mtmd_init_from_file(os.fsencode(path), model.handle, params)
        if not self.handle:
            raise ModelLoadError(
                f"llama.cpp could not load the projector {path}: "
                + "; ".join(library.log.errors(2))
            )
        self.path = path
        self.device_bytes, self.gpu_bytes = library.log.device_bytes(), library.log.gpu_bytes()
        self.width = int(C.llama_model_n_embd_inp(model.handle))
        self.sample_rate = int(mtmd.mtmd_get_audio_sample_rate(self.handle))
        self._uses_mrope = bool(mtmd.mtmd_decode_use_mrope(self.handle))
        takes = {"image": mtmd.mtmd_support_vision, "audio": mtmd.mtmd_support_audio}
        self.inputs = tuple(kind for kind, ask in takes.items() if ask(self.handle))
        try:
            self.identity = fingerprint(path)
            self.largest_whole = self._largest_whole() if "image" in self.inputs else 0
            self._token_bytes = self._pixels_per_token(side or USUAL_SIDE) * CHANNELS * FLOAT_BYTES
        except BaseException:
            self.close()
            raise

    def _largest_whole(self) -> int:
        sides = [(LARGE, int(LARGE / a)) for a in ASPECTS]
        shapes = [(h, w, 3) for a, b in sides for h, w in ((a, b), (b, a))]
        return max(p.n_tokens * p.whole for shape in shapes for p in self.parts("image", shape))

    def _pixels_per_token(self, side: int) -> float:
        """Of a scaled picture, or of a tile of one; about, since libmtmd does not say."""
        if "image" not in self.inputs:
            return 0.0
        largest = max(part.n_tokens for part in self.parts("image", (side, side, 3)))
        return side * side / max(largest, 1)

    def prepared_bytes(self, content: np.ndarray, parts: Sequence[Part]) -> int:
        """About what `prepare` keeps of an image or a sound with these parts."""
        if content.ndim == 1:
            return content.nbytes
        return round(self._token_bytes * sum(part.n_tokens for part in parts))

    def parts(self, kind: str, shape: tuple[int, ...]) -> list[Part]:
        """How an image or sound of this shape stands in a prompt; costs nothing.

        Raises `InvalidRequestError`.
        """
        return self._tokenized(self._bitmap(kind, shape, None))[0]

    def prepare(self, kind: str, content: np.ndarray) -> tuple[list[Part], Prepared]:
        """The same of an image, uint8 of shape (height, width, 3), or of a sound, float32 of shape
        (n,) at ``sample_rate``, scaled and cut as the encoder wants it."""
        wanted = np.uint8 if kind == "image" else np.float32
        content = np.ascontiguousarray(content, wanted)
        return self._tokenized(self._bitmap(kind, content.shape, content))

    def _bitmap(self, kind: str, shape: tuple[int, ...], content: np.ndarray | None) -> Any:
        at = ctypes.c_void_p() if content is None else ctypes.c_void_p(content.ctypes.data)
        if kind == "image":
            pixels = ctypes.cast(at, ctypes.POINTER(ctypes.c_uint8))
            return self._mtmd.mtmd_bitmap_init(shape[1], shape[0], pixels)
        samples = ctypes.cast(at, ctypes.POINTER(ctypes.c_float))
        return self._mtmd.mtmd_bitmap_init_from_audio(shape[0], samples)

    def _tokenized(self, bitmap: Any) -> tuple[list[Part], Prepared]:
        m = self._mtmd
        part = m.mtmd_input_part()
        part.bitmap = bitmap
        pointers = (ctypes.POINTER(m.mtmd_input_part) * 1)(ctypes.pointer(part))
        chunks = m.mtmd_input_chunks_init()
        try:
            if m.mtmd_tokenize_from_parts(self.handle, chunks, pointers, 1, False):
                raise InvalidRequestError(
                    "the model cannot take this image or sound: "
                    + "; ".join(library.log.errors(1)),
                    "messages",
                )
            found = [
                m.mtmd_input_chunks_get(chunks, i) for i in range(m.mtmd_input_chunks_size(chunks))
            ]
            copies = [
                m.mtmd_input_chunk_copy(chunk)
                for chunk in found
                if m.mtmd_input_chunk_get_type(chunk) != TEXT
            ]
            return [self._part(chunk) for chunk in found], Prepared(m, copies)
        finally:
            m.mtmd_input_chunks_free(chunks)
            m.mtmd_bitmap_free(bitmap)

    def _part(self, chunk: Any) -> Part:
        m = self._mtmd
        if m.mtmd_input_chunk_get_type(chunk) == TEXT:
            count = ctypes.c_size_t()
            tokens = m.mtmd_input_chunk_get_tokens_text(chunk, ctypes.byref(count))
            return Part(tuple(tokens[: count.value]))
        return Part(
            n_tokens=int(m.mtmd_input_chunk_get_n_tokens(chunk)),
            n_positions=int(m.mtmd_input_chunk_get_n_pos(chunk)),
            whole=bool(m.mtmd_decode_use_non_causal(self.handle, chunk)),
        )

    def encode(self, chunk: Any) -> Embeddings:
        """The embeddings of a prepared chunk. It takes long, and nothing can interrupt it. Raises
        RuntimeError."""
        m = self._mtmd
        n_tokens = int(m.mtmd_input_chunk_get_n_tokens(chunk))
        code = m.mtmd_encode_chunk(self.handle, chunk)
        if code:
            raise RuntimeError("; ".join(library.log.errors(2)) or f"the encoder returned {code}")
        rows = np.ctypeslib.as_array(
            ctypes.cast(m.mtmd_get_output_embd(self.handle), ctypes.POINTER(ctypes.c_float)),
            (n_tokens, self.width),
        )
        return Embeddings(rows.copy(), self._places(chunk, n_tokens))

    def _places(self, chunk: Any, n_tokens: int) -> np.ndarray:
        line = np.arange(n_tokens, dtype=np.int32)
        if not self._uses_mrope:
            return line[None]
        image = self._mtmd.mtmd_input_chunk_get_tokens_image(chunk)
        if not image:  # a sound, whose last dimension is unused
            return np.stack([line, line, line, np.zeros_like(line)])
        grid = (self._mtmd.mtmd_decoder_pos * n_tokens)()
        self._mtmd.mtmd_helper_image_get_decoder_pos(image, 0, grid)
        t, x, y, z = np.frombuffer(grid, np.uint32).reshape(n_tokens, 4).astype(np.int32).T
        return np.stack([t, y, x, z])

    def close(self) -> None:
        """Free it; nothing may be encoded any more, and the model must still be there."""
        if self.handle:
            self._mtmd.mtmd_free(self.handle)
            self.handle = None


def _bindings() -> Any:
    """libmtmd, or the parts of it that are used here. Raises `ModelLoadError` without it."""
    try:
        mtmd = import_module("llama_cpp.mtmd_cpp")
    except Exception as error:  # a build without it, or one that does not fit its library
        raise ModelLoadError(
            f"this build of llama-cpp-python reads no images or sounds ({error!s:.200}); "
            'install one with libmtmd, or load the model with projector="none".'
        ) from error
    missing = [name for name in FUNCTIONS if not hasattr(mtmd, f"mtmd_{name}")]
    if missing:
        raise ModelLoadError(
            f"llama-cpp-python {library.version()} has no mtmd_{missing[0]}; llmkit needs another "
            'version of it for images and sounds. projector="none" loads the text model alone.'
        )
    return mtmd
