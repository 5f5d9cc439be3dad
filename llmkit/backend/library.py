"""llama.cpp as a library: loaded once, its log kept instead of printed, its short calls made
without releasing the GIL.

Only `llmkit.backend` imports llama_cpp, and always through this module.
"""

from __future__ import annotations

import ctypes
import os
import re
import sys
import threading
from collections import deque
from functools import cache
from importlib import import_module, util
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

from llmkit.backend.openmp import short_spins
from llmkit.system.resources import usable_cores

_package_lock = threading.RLock()


class _Package(ModuleType):
    """llama-cpp-python without its own classes, which take twice as long to import as its bindings
    and need numpy and jinja2: they come with the first name that somebody asks for."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__version__":  # whoever asks this looks at any module
            raise AttributeError(name)
        with _package_lock:
            if self.__class__ is not _Package:  # another thread was first
                return getattr(self, name)
            if "_is_running" in self.__dict__:  # the package asks itself
                raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
            spec = self.__spec__
            assert spec is not None and spec.loader is not None
            self.__dict__["_is_running"] = True
            try:
                spec.loader.exec_module(self)
            finally:
                del self.__dict__["_is_running"]
            self.__class__ = ModuleType  # type: ignore[assignment]
            if start.cache_info().currsize:
                keep_log()  # it has set its own
            return getattr(self, name)


def _bindings() -> Any:
    if "llama_cpp" in sys.modules:
        return import_module("llama_cpp.llama_cpp")
    spec = util.find_spec("llama_cpp")
    if spec is None:
        raise ModuleNotFoundError("No module named 'llama_cpp'", name="llama_cpp")
    package = util.module_from_spec(spec)
    package.__class__ = _Package
    sys.modules["llama_cpp"] = package
    try:
        return import_module("llama_cpp.llama_cpp")
    except BaseException:
        del sys.modules["llama_cpp"]
        raise


if TYPE_CHECKING:
    import llama_cpp.llama_cpp as C
else:
    with short_spins():
        C = _bindings()

__all__ = [
    "C",
    "Device",
    "Log",
    "backends",
    "build",
    "devices",
    "gpu_backend",
    "gpus",
    "keep_log",
    "log",
    "num_threads",
    "short",
    "start",
    "strlen",
    "version",
]

LOG_LEVEL_ERROR = 3
GPU, INTEGRATED_GPU = 1, 2
BUFFER = re.compile(r"\b(\S+) +(model|KV|RS|compute|output) buffer size *= *([\d.]+) MiB")
BUFFER_KINDS = {
    "model": "weights",
    "KV": "kv",
    "RS": "kv",
    "compute": "compute",
    "output": "compute",
}


@cache
def version() -> str:
    """Version of llama-cpp-python."""
    from importlib import metadata

    return metadata.version("llama-cpp-python")


def build() -> str:
    """What tells this build of llama.cpp from others."""
    file = os.stat(C._lib._name)
    return f"{file.st_size} {file.st_mtime_ns}"


def num_threads() -> int:
    """Cores this process may use: affinity and cgroup quota, at least 1."""
    return usable_cores()


class Log:
    """The last lines that llama.cpp logged; thread-safe."""

    def __init__(self, size: int = 200) -> None:
        self._lines: deque[tuple[int, str]] = deque(maxlen=size)
        self._lock = threading.Lock()
        self._open = False
        self._device_bytes: dict[tuple[str, str], int] = {}  # by device and kind

    def add(self, level: int, text: str) -> None:
        with self._lock:
            if self._open and self._lines:
                last, line = self._lines[-1]
                self._lines[-1] = (last, line + text.rstrip("\n"))
            else:
                self._lines.append((level, text.rstrip("\n")))
            self._open = not text.endswith("\n")
            match = None if self._open else BUFFER.search(self._lines[-1][1])
            if match and not match[1].startswith(("CPU", "AMX")) and not match[1].endswith("_Host"):
                where = match[1].replace("_Split", " (by rows)"), BUFFER_KINDS[match[2]]
                self._device_bytes[where] = self._device_bytes.get(where, 0) + int(
                    float(match[3]) * (1 << 20)
                )

    def clear(self) -> None:
        with self._lock:
            self._lines.clear()
            self._device_bytes.clear()

    def device_bytes(self) -> dict[str, int]:
        """GPU buffers that llama.cpp has reported since ``clear``: bytes of "weights", "kv" and
        "compute"."""
        return self._sums(1)

    def gpu_bytes(self) -> dict[str, int]:
        """The same by GPU: bytes of "CUDA0" and so on."""
        return self._sums(0)

    def _sums(self, part: int) -> dict[str, int]:
        sums: dict[str, int] = {}
        with self._lock:
            for where, size in self._device_bytes.items():
                sums[where[part]] = sums.get(where[part], 0) + size
        return sums

    def errors(self, count: int = 4) -> list[str]:
        """The latest error lines, oldest first; any lines if none is an error."""
        with self._lock:
            lines = [text for level, text in self._lines if level == LOG_LEVEL_ERROR] or [
                text for _, text in self._lines
            ]
        return [line for line in lines if line.strip()][-count:]


log = Log()


@C.llama_log_callback  # type: ignore[untyped-decorator]
def _keep_log(level: int, text: bytes, _: Any) -> None:
    log.add(level, text.decode("utf-8", "replace"))


def keep_log() -> None:
    """Have llama.cpp log to ``log``, also after another callback took its place."""
    C.llama_log_set(_keep_log, ctypes.c_void_p(0))


@cache
def start() -> None:
    """Initialise the backend; later calls do nothing."""
    keep_log()
    with short_spins():
        if not _ggml("ggml_backend_dev_count", ctypes.c_size_t)():
            # A build with one library per type of CPU, selected here. Wheels differ in its folder.
            beside = Path(str(C._lib._name)).parent
            for folder in (beside, beside.parents[1] / "bin"):
                if any(folder.glob("*ggml-cpu*")):
                    _ggml("ggml_backend_load_all_from_path", None)(os.fsencode(folder))
                    break
        C.llama_backend_init()


def _ggml(name: str, result: Any) -> Any:
    """A function of the very ggml that llama.cpp uses: a wheel may hold a second copy, which does
    not know this one's devices."""
    function = getattr(C._lib, name, None)
    if function is None:  # Windows searches one library only
        from llama_cpp._ggml import libggml

        function = getattr(libggml, name, None) or getattr(
            ctypes.CDLL(str(libggml._name).replace("ggml.", "ggml-base.")), name
        )
    function.restype = result
    return function


@cache
def _pydll() -> ctypes.PyDLL:
    return ctypes.PyDLL(C._lib._name)


def short(name: str) -> Any:
    """A libllama function for calls of microseconds: it keeps the GIL, so no busy thread can take
    it in between.

    Argument and result types are those of the ordinary binding.
    """
    typed = getattr(C._lib, name)
    function = getattr(_pydll(), name)
    function.argtypes, function.restype = typed.argtypes, typed.restype
    return function


class Device(NamedTuple):
    """A device that ggml can compute on; memory in bytes."""

    name: str
    description: str
    is_gpu: bool
    free_bytes: int
    total_bytes: int
    is_integrated: bool = False


def devices() -> list[Device]:
    """All devices of this build: the CPU, and GPUs (CUDA, Metal, Vulkan or ROCm)."""
    start()
    get = _ggml("ggml_backend_dev_get", ctypes.c_void_p)
    get.argtypes = [ctypes.c_size_t]
    name_of, description_of = (
        _ggml(f"ggml_backend_dev_{what}", ctypes.c_char_p) for what in ("name", "description")
    )
    type_of, memory_of = (
        _ggml("ggml_backend_dev_type", ctypes.c_int),
        _ggml("ggml_backend_dev_memory", None),
    )
    result = []
    for i in range(_ggml("ggml_backend_dev_count", ctypes.c_size_t)()):
        device = ctypes.c_void_p(get(i))
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        memory_of(device, ctypes.byref(free), ctypes.byref(total))
        result.append(
            Device(
                name_of(device).decode(),
                description_of(device).decode(),
                type_of(device) in (GPU, INTEGRATED_GPU),
                free.value,
                total.value,
                type_of(device) == INTEGRATED_GPU,
            )
        )
    return result


def gpus() -> list[Device]:
    """The GPUs that models are put on, in llama.cpp's order: those of this build that the system
    lets it see (``CUDA_VISIBLE_DEVICES``). An integrated one counts only where it is alone."""
    found = [device for device in devices() if device.is_gpu]
    return [device for device in found if not device.is_integrated] or found[:1]


def backends() -> list[str]:
    """The backends of this build, such as "CUDA" and "CPU", whether or not they have a device."""
    start()
    get = _ggml("ggml_backend_reg_get", ctypes.c_void_p)
    get.argtypes = [ctypes.c_size_t]
    name_of = _ggml("ggml_backend_reg_name", ctypes.c_char_p)
    count = _ggml("ggml_backend_reg_count", ctypes.c_size_t)()
    return [name_of(ctypes.c_void_p(get(i))).decode() for i in range(count)]


def gpu_backend() -> bool:
    """Whether this build of llama.cpp can use a GPU at all."""
    return bool(C.llama_supports_gpu_offload())


def strlen() -> Any:
    """libc's strlen as an abort callback over a two-byte flag: true when the flag is set. ggml
    calls it hundreds of times per decode, where a Python function would need the GIL each time
    (beside a busy cell that costs a second per token)."""
    libc = ctypes.CDLL(None) if sys.platform != "win32" else ctypes.cdll.msvcrt
    return ctypes.cast(libc.strlen, C.ggml_abort_callback)
