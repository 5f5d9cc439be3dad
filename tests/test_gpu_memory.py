"""The memory of GPUs, as their drivers tell it."""

from __future__ import annotations

import queue
import shutil
import subprocess
from pathlib import Path

import pytest

from llmkit.system import gpu_memory
from llmkit.system.gpu_memory import GpuMemory, Gpus

NVML = """
#include <string.h>
typedef struct { unsigned long long total, free, used; } memory;
typedef struct { unsigned gpu, memory; } rates;
int nvmlInit_v2(void) { return 0; }
int nvmlDeviceGetCount_v2(unsigned *n) { *n = 3; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned i, void **h) {
    *h = (void *)(long)(i + 1);
    return i == 2;
}
int nvmlDeviceGetMemoryInfo(void *h, memory *m) {
    m->total = 80ull << 30;
    m->used = (unsigned long long)(long)h << 30;
    m->free = m->total - m->used;
    return 0;
}
int nvmlDeviceGetName(void *h, char *name, unsigned size) {
    strncpy(name, "NVIDIA H100", size);
    return 0;
}
int nvmlDeviceGetUtilizationRates(void *h, rates *r) { r->gpu = 25; return (long)h == 2; }
"""


def test_nvidias_memory(tmp_path: Path) -> None:
    """Against a library of NVML's interface; the third GPU is lost, the second has no rates."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    assert compiler, "llama.cpp needs a compiler anyway"
    source, library = tmp_path / "nvml.c", tmp_path / "nvml.so"
    source.write_text(NVML)
    subprocess.run([compiler, "-shared", "-fPIC", source, "-o", library], check=True)
    gpus = Gpus(str(library), tmp_path)
    gpus.wait(30)
    assert gpus.read() == [
        GpuMemory("nvidia0", "NVIDIA H100", 1 << 30, 80 << 30, 0.25),
        GpuMemory("nvidia1", "NVIDIA H100", 2 << 30, 80 << 30, None),
    ]


def test_amds_memory_and_none(tmp_path: Path) -> None:
    device = tmp_path / "sys/class/drm/card1/device"
    device.mkdir(parents=True)
    (tmp_path / "sys/class/drm/card1-DP-1").mkdir()
    assert seen("no-such-library.so", tmp_path) == []
    (device / "mem_info_vram_used").write_text("1048576\n")
    (device / "mem_info_vram_total").write_text("17163091968\n")
    (device / "gpu_busy_percent").write_text("7\n")
    (device / "product_name").write_text("Instinct MI300X\n")
    assert seen("no-such-library.so", tmp_path) == [
        GpuMemory("card1", "Instinct MI300X", 1048576, 17163091968, 0.07)
    ]


def seen(library: str, root: Path) -> list[GpuMemory]:
    gpus = Gpus(library, root)
    gpus.wait(30)
    return gpus.read()


def test_a_slow_driver_holds_up_no_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = (GpuMemory("nvidia0", "x", used, 8) for used in (1, 2))
    looks: queue.SimpleQueue[GpuMemory] = queue.SimpleQueue()
    monkeypatch.setattr(Gpus, "_nvidia", lambda _: [looks.get()])
    gpus = Gpus("no-such-library.so", tmp_path)
    assert gpus.read() == [], "not yet seen"
    looks.put(one)
    gpus.wait(30)
    assert gpus.read() == gpus.read() == [one] and looks.empty()
    monkeypatch.setattr(gpu_memory, "FRESH_S", 0.0)
    assert gpus.read() == [one], "the driver hangs: what was seen last"
    monkeypatch.setattr(gpu_memory, "LOST_S", 0.0)
    assert gpus.read() == gpus.read() == []
    monkeypatch.setattr(gpu_memory, "LOST_S", 60.0)
    looks.put(two)
    gpus.wait(30)
    monkeypatch.setattr(gpu_memory, "FRESH_S", 60.0)
    assert gpus.read() == [two]
