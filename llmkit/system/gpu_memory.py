"""How much memory the GPUs of this machine have and use: NVIDIA's by NVML, AMD's by sysfs.

Any thread; drivers are asked on one of their own, since they may take seconds. NVML comes with the
driver and is loaded only where it is installed; it neither computes nor takes GPU memory.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import math
import re
import threading
import time
from dataclasses import dataclass
from pathlib import Path

__all__ = ["GpuMemory", "Gpus"]

NVML = "libnvidia-ml.so.1"
MAX_DEVICES = 64
FRESH_S, LOST_S, WAIT_S = 2.0, 60.0, 0.05

logger = logging.getLogger("llmkit.gpus")


@dataclass(frozen=True, slots=True)
class GpuMemory:
    """One GPU: ``device`` as its driver counts it, memory in bytes; ``busy`` is a share of time."""

    device: str
    name: str
    used_bytes: int
    total_bytes: int
    busy: float | None = None


class Gpus:
    """The memory of all GPUs, as it was seen last: a slow driver holds up no reader.

    ``library`` and ``root`` are others than the system's, for tests.
    """

    def __init__(self, library: str = NVML, root: Path = Path("/")) -> None:
        self._library, self._root = library, root
        self._nvml: ctypes.CDLL | None = None
        self._seen: list[GpuMemory] | None = None
        self._at = -math.inf
        self._changed = threading.Condition()
        self._looks = False
        with self._changed:
            self._look()

    def wait(self, timeout_s: float) -> None:
        """Wait until a look that has begun is done."""
        with self._changed:
            self._changed.wait_for(lambda: not self._looks, timeout_s)

    def read(self) -> list[GpuMemory]:
        """All GPUs as they were seen last; has them looked at again if that is seconds ago.

        Empty where there are none, or their driver has not answered for a minute. After a minute
        without a reader this waits for the look, for 50 ms at most.
        """
        with self._changed:
            age = time.monotonic() - self._at
            if age > FRESH_S and not self._looks:
                self._look()
                if age > LOST_S:
                    self._changed.wait_for(lambda: not self._looks, WAIT_S)
            is_lost = time.monotonic() - self._at > LOST_S
            return [] if is_lost else list(self._seen or ())

    def _look(self) -> None:
        """Look at all GPUs, on a thread that ends then."""
        threading.Thread(target=self._run, name="llmkit-gpus", daemon=True).start()
        self._looks = True

    def _run(self) -> None:
        found = []
        try:
            if self._seen is None:
                self._start(self._library)
            found = [*self._nvidia(), *self._amd()]
        except Exception:
            logger.exception("the memory of the GPUs cannot be read")
        with self._changed:
            self._seen, self._at, self._looks = found, time.monotonic(), False
            self._changed.notify_all()

    def _start(self, library: str) -> None:
        with contextlib.suppress(OSError, AttributeError):
            nvml = ctypes.CDLL(library)
            if nvml.nvmlInit_v2() == 0:
                self._nvml = nvml

    def _nvidia(self) -> list[GpuMemory]:
        nvml, found, count = self._nvml, [], ctypes.c_uint()
        if nvml is None or nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)):
            return []
        for i in range(min(count.value, MAX_DEVICES)):
            handle, memory, rates = ctypes.c_void_p(), _Memory(), _Rates()
            name = ctypes.create_string_buffer(96)
            if nvml.nvmlDeviceGetHandleByIndex_v2(i, ctypes.byref(handle)) or (
                nvml.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory))
            ):
                continue
            nvml.nvmlDeviceGetName(handle, name, len(name))
            has_rates = not nvml.nvmlDeviceGetUtilizationRates(handle, ctypes.byref(rates))
            found.append(
                GpuMemory(
                    f"nvidia{i}",
                    name.value.decode("utf-8", "replace"),
                    memory.used,
                    memory.total,
                    rates.gpu / 100 if has_rates else None,
                )
            )
        return found

    def _amd(self) -> list[GpuMemory]:
        found = []
        with contextlib.suppress(OSError):
            cards = (self._root / "sys/class/drm").glob("card[0-9]*")
            for card in sorted(c for c in cards if re.fullmatch(r"card\d+", c.name)):
                device = card / "device"
                with contextlib.suppress(OSError, ValueError):
                    used = int((device / "mem_info_vram_used").read_text())
                    total = int((device / "mem_info_vram_total").read_text())
                    busy = _text(device / "gpu_busy_percent")
                    found.append(
                        GpuMemory(
                            card.name,
                            _text(device / "product_name") or "AMD GPU",
                            used,
                            total,
                            int(busy) / 100 if busy.isdecimal() else None,
                        )
                    )
        return found


class _Memory(ctypes.Structure):
    _fields_ = (
        ("total", ctypes.c_ulonglong),
        ("free", ctypes.c_ulonglong),
        ("used", ctypes.c_ulonglong),
    )


class _Rates(ctypes.Structure):
    _fields_ = (("gpu", ctypes.c_uint), ("memory", ctypes.c_uint))


def _text(file: Path) -> str:
    try:
        return file.read_text(errors="replace").strip()[:96]
    except OSError:
        return ""
