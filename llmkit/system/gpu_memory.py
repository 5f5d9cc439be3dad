"""How much memory the GPUs of this machine have and use: NVIDIA's by NVML, AMD's by sysfs.

Any thread. NVML comes with the driver and is loaded only where it is installed; it neither computes
nor takes GPU memory.
"""

from __future__ import annotations

import contextlib
import ctypes
import re
import threading
from dataclasses import dataclass
from pathlib import Path

__all__ = ["GpuMemory", "Gpus"]

NVML = "libnvidia-ml.so.1"
MAX_DEVICES = 64


@dataclass(frozen=True, slots=True)
class GpuMemory:
    """One GPU: ``device`` as its driver counts it, memory in bytes; ``busy`` is a share of time."""

    device: str
    name: str
    used_bytes: int
    total_bytes: int
    busy: float | None = None


class Gpus:
    """Reads the memory of all GPUs.

    NVML may take seconds to start, so a thread does that; until then its GPUs are missing.
    ``library`` and ``root`` are others than the system's, for tests.
    """

    def __init__(self, library: str = NVML, root: Path = Path("/")) -> None:
        self._root = root
        self._nvml: ctypes.CDLL | None = None
        self._starting = threading.Thread(
            target=self._start, args=(library,), name="llmkit-nvml", daemon=True
        )
        self._starting.start()

    def wait(self, timeout_s: float) -> None:
        """Wait until NVML has started, if there is one."""
        self._starting.join(timeout_s)

    def read(self) -> list[GpuMemory]:
        """All GPUs now; empty where there are none or their driver does not say."""
        return [*self._nvidia(), *self._amd()]

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
