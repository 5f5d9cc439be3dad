"""`ImageProcess`: a model that draws, in a child process; an `ImageGenerator`.

A cancelled image ends the process, which gives all memory back at once, and so does a crash, which
harms nobody else; the next image starts another. One thread at a time.
"""

from __future__ import annotations

import base64
import contextlib
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from typing import Any

from llmkit.bridge.child import Child
from llmkit.errors import EngineError, InvalidRequestError, LLMKitError, ModelLoadError
from llmkit.models.image_files import ImageModel
from llmkit.models.memory import free_ram
from llmkit.protocol.images import (
    MAX_SIDE,
    MIN_SIDE,
    SIDE,
    Drawing,
    ImageLines,
    Picture,
    Step,
)
from llmkit.runtime import image_child
from llmkit.system.endings import LastWords, ended

__all__ = ["PROCESS_BYTES", "ImageProcess"]

LOOK_S = 0.1
END_S = 1.0
PROCESS_BYTES = 150 << 20  # of the process, without a model
# Variables of the environment that the child gets: it needs no key or token. By the start of their
# names, in capitals.
KEPT = (
    *("PATH", "HOME", "USERPROFILE", "LANG", "LC_", "TZ", "TMP", "TEMP", "SYSTEMROOT", "WINDIR"),
    *("LD_LIBRARY_PATH", "DYLD_", "PYTHON", "VIRTUAL_ENV", "CONDA_PREFIX"),
    *("CUDA_", "NVIDIA_", "GGML_", "HIP_", "HSA_", "ROCR_", "VK_", "OMP_", "GOMP_", "KMP_"),
)
AGAIN = "The next request starts it again."


def _is_kept(name: str) -> bool:
    return name.upper().startswith(KEPT)


class ImageProcess:
    """Loads at once. Raises `ModelLoadError`, with the library's own words."""

    def __init__(
        self,
        model: ImageModel,
        *,
        threads: int | None = None,
        on_progress: Callable[[float], None] = lambda _: None,
        force: bool = False,
    ) -> None:
        self._model, self._threads, self._force = model, threads, force
        self._load_s = 0.0
        self._reads = False  # whether the process can read pictures
        self._refusal: str | None = None
        self._is_killed = False  # the latest process, by a signal, before it was ready
        self._child: Child | None = None
        self._words: LastWords | None = None
        self._facts: dict[str, Any] = {}
        self._start(on_progress, lambda: False, reads=False)

    @property
    def size(self) -> tuple[int, int]:
        return self._model.size

    @property
    def steps(self) -> int:
        return self._model.steps

    @property
    def facts(self) -> dict[str, Any]:
        device = "gpu" if self._facts.get("uses_gpu") else "cpu"
        return {
            "architecture": self._model.family,
            "weights_bytes": self._model.weights_bytes,
            "compute_bytes": self._model.buffer_bytes,
            "device": device,
        }

    @property
    def load_s(self) -> float:
        return self._load_s

    def check_room(self, width: int, height: int) -> None:
        """Any thread. Nothing is refused if it was loaded with ``force``, or is on a GPU."""
        if self._force or self._facts.get("uses_gpu"):
            return
        room = free_ram() + self._taken() - self._model.weights_bytes - PROCESS_BYTES
        need = self._model.buffer_of(width, height)
        if need <= room:
            return
        fits = [s for s in range(MIN_SIDE, MAX_SIDE, SIDE) if self._model.buffer_of(s, s) <= room]
        raise InvalidRequestError(
            f"size: {width}x{height} needs {need / 1e9:.1f} GB of memory besides the model, "
            f"{max(0, room) / 1e9:.1f} GB are free; "
            + (f"{fits[-1]}x{fits[-1]} fits." if fits else "no image fits: unload other models."),
            "size",
        )

    def _taken(self) -> int:
        """Bytes that the child has now, which are the next image's as well."""
        import psutil

        with contextlib.suppress(psutil.Error):
            if (pid := self.pid) is not None:
                return int(psutil.Process(pid).memory_info().rss)
        return 0

    @property
    def refusal(self) -> str | None:
        """Why it cannot start from a picture; None until that is known."""
        return self._refusal

    @property
    def pid(self) -> int | None:
        """Of the child; None while there is none."""
        child = self._child
        return None if child is None or child.status is not None else child.pid

    def images(
        self,
        prompt: str,
        options: Drawing,
        files: Mapping[str, bytes],
        is_over: Callable[[], bool] = lambda: False,
    ) -> Iterator[Step | Picture]:
        """Leaving the loop early ends the process as well. The first picture to start from loads
        the model again, with what reads pictures."""
        is_whole = False
        if options.image and self._refusal is not None:
            raise InvalidRequestError(self._refusal, "image")
        try:
            if self.pid is None or (options.image and not self._reads):
                self.check_room(options.width or 0, options.height or 0)
                self._start_for(options, is_over)
            child = self._child
            if child is None or self._words is None:  # nobody waits any longer
                return
            self._words.forget()
            self._ask(child, prompt, options, files)
            lines = ImageLines()
            for news in self._news(child, is_over):
                yield from lines.read(news)
            is_whole = not is_over()
        except (EngineError, InvalidRequestError):
            is_whole = self.pid is not None  # it said so itself, and lives
            raise
        finally:
            if not is_whole:
                self.close()

    def close(self) -> None:
        """End the process."""
        child, self._child = self._child, None
        if child is not None:
            child.close_input()
            child.kill()

    def _ask(self, child: Child, prompt: str, options: Drawing, files: Mapping[str, bytes]) -> None:
        sent = {digest: base64.b64encode(data).decode() for digest, data in files.items()}
        try:
            child.ask({"prompt": prompt, "drawing": asdict(options), "files": sent})
        except OSError:
            raise EngineError(f"{self._why(child)}. {AGAIN}") from None

    def _news(self, child: Child, is_over: Callable[[], bool]) -> Iterator[str]:
        while not is_over():
            try:
                line = child.read(LOOK_S)
            except EOFError:
                child.wait(END_S)
                raise EngineError(f"{self._why(child)}. {AGAIN}") from None
            if line is None:
                continue
            if line.failure is not None:
                raise line.failure.error()
            if line.news is not None:
                yield line.news
            if line.done:
                return

    def _start_for(self, options: Drawing, is_over: Callable[[], bool]) -> None:
        """Start a process that can do what is asked for. Raises `InvalidRequestError`, from then on
        at once, if the model has nothing that reads pictures."""
        reads = self._reads or bool(options.image)
        try:
            self._start(lambda _: None, is_over, reads=reads)
        except ModelLoadError as error:
            # A signal may have come for want of memory: another time it may work.
            if self._is_killed or reads == self._reads:
                raise
            self._refusal = (
                f"image: {self._model.path.stem!r} cannot start from a picture: {error} It can "
                "draw without one."
            )
            raise InvalidRequestError(self._refusal, "image") from error

    def _start(
        self, on_progress: Callable[[float], None], is_over: Callable[[], bool], *, reads: bool
    ) -> None:
        """Start a process and wait for the model; ends early once nobody waits for it."""
        self.close()
        model = self._model
        task = {
            "path": str(model.path),
            "is_whole": model.is_whole,
            "cfg_scale": model.cfg_scale,
            "parts": {name: str(path) for name, path in model.parts.items()},
            "threads": self._threads,
            "reads": reads,
        }
        begun, self._is_killed = time.monotonic(), False
        child = Child(image_child.TARGET, task, errors=subprocess.PIPE, kept=_is_kept)
        assert child.stderr is not None
        self._words = LastWords(child.stderr)
        try:
            self._await_ready(child, on_progress, is_over)
        except BaseException:  # the stop button too
            child.close_input()
            child.kill()
            raise
        if is_over():
            child.close_input()
            child.kill()
            return
        self._child, self._load_s, self._reads = child, time.monotonic() - begun, reads

    def _await_ready(
        self, child: Child, on_progress: Callable[[float], None], is_over: Callable[[], bool]
    ) -> None:
        while not is_over():
            try:
                line = child.read(LOOK_S)
            except EOFError:
                child.wait(END_S)
                self._is_killed = child.status is None or child.status < 0
                raise ModelLoadError(f"{self._why(child)}.") from None
            if line is None:
                continue
            if line.failure is not None:
                error = line.failure.error()
                raise error if isinstance(error, LLMKitError) else ModelLoadError(str(error))
            if line.progress is not None:
                on_progress(line.progress)
            if line.ready is not None:
                self._facts = line.ready
                return

    def _why(self, child: Child) -> str:
        reason = ""
        if self._words is not None:
            self._words.wait(END_S)
            reason = self._words.reason
        name = self._model.path.stem
        return f"the process that draws with {name!r} {ended(child.status)}" + (
            f": {reason}" if reason else ""
        )
