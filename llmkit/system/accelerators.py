"""Which accelerators this machine has, as its system says: no driver's library is loaded.

Standard library only. ``root`` is another place for ``/``, for tests.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

__all__ = ["Accelerator", "Maker", "accelerators"]

Maker = Literal["nvidia", "apple", "amd", "intel"]
VENDORS: dict[str, Maker] = {"0x10de": "nvidia", "0x1002": "amd", "0x8086": "intel"}
NAMES = {
    "nvidia": "an NVIDIA GPU",
    "apple": "Apple's GPU",
    "amd": "an AMD GPU",
    "intel": "an Intel GPU",
}


@dataclass(frozen=True, slots=True)
class Accelerator:
    """A GPU that the system knows, whether or not a program can use it."""

    maker: Maker
    name: str


def accelerators(root: Path = Path("/")) -> list[Accelerator]:
    """All GPUs of this machine; empty where the system does not say."""
    if sys.platform == "darwin" and platform.machine() == "arm64":
        return [Accelerator("apple", NAMES["apple"])]
    found = _nvidia(root)
    with contextlib.suppress(OSError):
        for card in sorted((root / "sys/class/drm").glob("card[0-9]*")):
            if not re.fullmatch(r"card\d+", card.name):
                continue  # card0-HDMI-A-1 is a socket of card0
            with contextlib.suppress(OSError):
                maker = VENDORS.get((card / "device/vendor").read_text().strip())
                if maker is not None and maker != "nvidia":
                    found.append(Accelerator(maker, NAMES[maker]))
    return found


def _nvidia(root: Path) -> list[Accelerator]:
    names = []
    with contextlib.suppress(OSError):
        for file in sorted((root / "proc/driver/nvidia/gpus").glob("*/information")):
            model = re.search(r"^Model:\s*(.+)$", file.read_text(errors="replace"), re.MULTILINE)
            names.append(model[1].strip() if model else NAMES["nvidia"])
    # A container may see the driver without the list, and WSL has another driver.
    others = ("proc/driver/nvidia/version", "dev/nvidia0", "usr/lib/wsl/lib/libcuda.so.1")
    if not names and any(os.path.exists(root / place) for place in others):
        names.append(NAMES["nvidia"])
    return [Accelerator("nvidia", name) for name in names]
