"""The weights of a GGUF file in llama.cpp, and what the file says about itself."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmkit.backend import library
from llmkit.backend.library import C
from llmkit.backend.placement import Placement
from llmkit.backend.vocab import Vocab
from llmkit.errors import ModelLoadError
from llmkit.system.waiting import wait_through

__all__ = ["LlamaModel"]

VOCAB_TYPE_NONE = 0


class LlamaModel:
    """The weights of one file, read-only once loaded; contexts share them.

    ``placement`` spreads it over several GPUs.
    ``on_progress`` receives the share loaded (0 to 1) ten times a second, on the caller's thread.
    Raises `ModelLoadError` with llama.cpp's last error lines. A KeyboardInterrupt cancels the load.
    """

    def __init__(
        self,
        path: Path,
        *,
        n_gpu_layers: int = -1,
        placement: Placement | None = None,
        on_progress: Callable[[float], None] = lambda _: None,
    ) -> None:
        library.start()
        library.log.clear()
        cancelled, ended, loaded = threading.Event(), threading.Event(), [0.0]

        @C.llama_progress_callback  # type: ignore[untyped-decorator]
        def progress(share: float, _: Any) -> bool:
            loaded[0] = share
            return not cancelled.is_set()

        params = C.llama_model_default_params()
        params.n_gpu_layers = n_gpu_layers
        (placement or Placement()).apply(params, int(C.llama_max_devices()))
        params.progress_callback = progress
        self.handle: Any = None
        self.device_bytes: dict[str, int] = {}
        self.gpu_bytes: dict[str, int] = {}
        self.on_gpu = n_gpu_layers != 0 and library.gpu_backend()
        self.path = path
        self.vocab: Vocab

        def load() -> None:
            if not claimed.acquire(blocking=False):
                return
            try:
                self.handle = C.llama_model_load_from_file(os.fsencode(path), params)
            finally:
                ended.set()

        # In its own thread, so that the stop button reaches the waiting one. Not joined, see
        # `llmkit.system.waiting`.
        claimed = threading.Lock()
        try:
            threading.Thread(target=load, name="llmkit-load", daemon=True).start()
            while not ended.wait(0.1):
                on_progress(loaded[0])
        except KeyboardInterrupt:
            cancelled.set()
            if not claimed.acquire(blocking=False):  # the load has begun
                with contextlib.suppress(KeyboardInterrupt):
                    wait_through(ended)
            self.close()
            raise KeyboardInterrupt("loading was stopped") from None
        if not self.handle:
            raise ModelLoadError(
                f"llama.cpp could not load {path}: " + "; ".join(library.log.errors())
            )
        try:
            self.device_bytes = library.log.device_bytes()
            self.gpu_bytes = library.log.gpu_bytes()
            self.vocab = Vocab(self.handle)
        except BaseException:
            self.close()
            raise
        on_progress(1.0)

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
        plain = (
            C.llama_model_has_decoder(self.handle)
            and not C.llama_model_has_encoder(self.handle)
            and not C.llama_model_is_diffusion(self.handle)
        )
        return (
            bool(plain)
            and int(C.llama_vocab_type(C.llama_model_get_vocab(self.handle))) != VOCAB_TYPE_NONE
        )

    @property
    def is_recurrent(self) -> bool:
        """Recurrent or hybrid: its state cannot be truncated to an earlier position."""
        return bool(C.llama_model_is_recurrent(self.handle) or C.llama_model_is_hybrid(self.handle))

    @property
    def has_sliding_window(self) -> bool:
        return int(C.llama_model_n_swa(self.handle)) > 0

    def close(self) -> None:
        """Free the weights; only after all runners are closed."""
        if self.handle:
            C.llama_model_free(self.handle)
            self.handle = None
        _return_free_memory()


def _return_free_memory() -> None:
    """glibc keeps freed memory for reuse; a notebook user wants to see it returned."""
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError, OSError):
            ctypes.CDLL(None).malloc_trim(0)
