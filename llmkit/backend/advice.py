"""What would be faster than the llama.cpp in use, and how to get it. Knows no llama.cpp.

`load` warns by it, `llmkit doctor` and an estimate say it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence

from llmkit.system.accelerators import Accelerator

__all__ = ["BACKENDS", "backend_of", "faster", "how_to_get"]

# What ggml calls its devices, without their number.
BACKENDS = {
    "CUDA": "cuda",
    "ROCm": "hip",
    "MUSA": "musa",
    "Metal": "metal",
    "MTL": "metal",
    "Vulkan": "vulkan",
    "SYCL": "sycl",
    "OpenCL": "opencl",
    "CANN": "cann",
}
FITTING = {  # by maker, the best first; any of them beats the CPU
    "nvidia": ("cuda", "vulkan"),
    "apple": ("metal",),
    "amd": ("hip", "vulkan"),
    "intel": ("sycl", "vulkan"),
}
BUILT = {"nvidia": "cuda", "apple": "metal", "amd": "vulkan", "intel": "vulkan"}
FLAGS = {"cuda": "-DGGML_CUDA=on", "metal": "-DGGML_METAL=on", "vulkan": "-DGGML_VULKAN=on"}


def backend_of(device: str) -> str:
    """Ours for a device or backend of ggml.

    >>> backend_of("CUDA0"), backend_of("CUDA"), backend_of("CPU")
    ('cuda', 'cuda', 'cpu')
    """
    return BACKENDS.get(re.sub(r"\d+$", "", device), "cpu")


def faster(
    built: Iterable[str],
    devices: Iterable[str],
    present: Sequence[Accelerator],
    *,
    sure: bool = False,
) -> str | None:
    """What would be faster than computing on these ``devices`` of ggml; None if nothing is known.

    ``built`` are the backends of this llama.cpp, in ggml's words. ``sure``: only what is faster on
    every machine, so not the small GPU inside a processor.
    """
    used, could = ({backend_of(name) for name in names} for names in (devices, built))
    for gpu in present:
        fitting = FITTING[gpu.maker]
        if (sure and gpu.maker == "intel") or not used.isdisjoint(fitting):
            continue
        if not could.isdisjoint(fitting):
            return f"this machine has {gpu.name}, but llama.cpp does not see it: {_hidden(gpu)}"
        return (
            f"this machine has {gpu.name}, but this llama.cpp is not built for it: "
            f"{how_to_get(BUILT[gpu.maker])}"
        )
    return None


def _hidden(gpu: Accelerator) -> str:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if gpu.maker == "nvidia" and visible is not None:
        return f"CUDA_VISIBLE_DEVICES={visible!r:.60} hides it"
    return "its driver does not work, or this account may not use it"


def how_to_get(backend: str) -> str:
    """The commands that build llama.cpp for a backend: in a checkout, and with pip."""
    return (
        f"run `make {backend}` in a checkout of llmkit, or\n"
        f'    CMAKE_ARGS="{FLAGS[backend]}" pip install --force-reinstall '
        "--no-cache-dir --no-deps llama-cpp-python"
    )
