"""The weights of a GGUF file in llama.cpp, and what the file says about itself."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmkit.backend import library
from llmkit.backend.amx import amx_is_broken
from llmkit.backend.library import C
from llmkit.backend.placement import Placement
from llmkit.errors import ModelLoadError
from llmkit.system.waiting import wait_through

if TYPE_CHECKING:
    from llmkit.backend.vocab import Vocab

__all__ = ["LlamaModel", "Loading"]

VOCAB_TYPE_NONE = 0


class Loading:
    """A file on its way into memory, on a thread of its own, once there was a `start`.

    What becomes of it is a `LlamaModel`. ``placement`` spreads it over several GPUs.
    """

    def __init__(
        self, path: Path, *, n_gpu_layers: int = -1, placement: Placement | None = None
    ) -> None:
        library.start()
        library.log.clear()
        self.path = path
        self.on_gpu = n_gpu_layers != 0 and library.gpu_backend()
        self._cancelled, self._ended, self._loaded = threading.Event(), threading.Event(), 0.0

        @C.llama_progress_callback  # type: ignore[untyped-decorator]
        def progress(share: float, _: Any) -> bool:
            self._loaded = share
            return not self._cancelled.is_set()

        self._params = C.llama_model_default_params()
        self._params.n_gpu_layers = n_gpu_layers
        if amx_is_broken():
            # AMX's layout of weights is one of the CPU's extra buffer types; so are those that are
            # repacked for AVX-512, which only a build without AMX keeps.
            self._params.use_extra_bufts = False
        (placement or Placement()).apply(self._params, int(C.llama_max_devices()))
        self._params.progress_callback = progress
        self._handle: Any = None
        self._claimed = threading.Lock()

    def start(self) -> None:
        """Begin; once, and whatever happens from here on, ``wait`` or ``cancel``."""
        # The stop button reaches the waiting thread. This one is not joined, see
        # `llmkit.system.waiting`.
        threading.Thread(target=self._run, name="llmkit-load", daemon=True).start()

    def _run(self) -> None:
        if not self._claimed.acquire(blocking=False):
            return
        try:
            self._handle = C.llama_model_load_from_file(os.fsencode(self.path), self._params)
        finally:
            self._ended.set()

    def wait(self, on_progress: Callable[[float], None]) -> Any:
        """llama.cpp's handle, which is the caller's to free once it is ``taken``; None if the load
        failed.

        ``on_progress`` is called ten times a second. A KeyboardInterrupt cancels the load.
        """
        try:
            while not self._ended.wait(0.1):
                on_progress(self._loaded)
        except KeyboardInterrupt:
            self.cancel()
            raise KeyboardInterrupt("loading was stopped") from None
        return self._handle

    def taken(self) -> None:
        """Somebody else frees the handle from now on."""
        self._handle = None

    def cancel(self) -> None:
        """End the load, and free what it has loaded. Frees nothing once the handle is ``taken``."""
        self._cancelled.set()
        if self._claimed.acquire(blocking=False):  # it has not begun, and never will
            self._ended.set()
        else:
            with contextlib.suppress(KeyboardInterrupt):
                wait_through(self._ended)
        if self._handle:
            C.llama_model_free(self._handle)
            self._handle = None
        _return_free_memory()


class LlamaModel:
    """The weights of one file, read-only once loaded; contexts share them.

    ``placement`` spreads it over several GPUs; ``loading``, if there is one, has begun to load just
    this. ``on_progress`` receives the share loaded (0 to 1) ten times a second, on the caller's
    thread. Raises `ModelLoadError` with llama.cpp's last error lines. A KeyboardInterrupt cancels
    the load.
    """

    def __init__(
        self,
        path: Path,
        *,
        n_gpu_layers: int = -1,
        placement: Placement | None = None,
        on_progress: Callable[[float], None] = lambda _: None,
        loading: Loading | None = None,
    ) -> None:
        is_begun = loading is not None
        loading = loading or Loading(path, n_gpu_layers=n_gpu_layers, placement=placement)
        self.path, self.on_gpu = loading.path, loading.on_gpu
        self.device_bytes: dict[str, int] = {}
        self.gpu_bytes: dict[str, int] = {}
        self.vocab: Vocab
        self.handle: Any = None
        try:
            if not is_begun:
                loading.start()
            from llmkit.backend.vocab import Vocab  # with numpy, while the file is read

            self.handle = loading.wait(on_progress)
            loading.taken()
        except BaseException:
            loading.cancel()
            raise
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
    def n_embd(self) -> int:
        return int(C.llama_model_n_embd(self.handle))

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
