"""Builds of llama.cpp whose code for Intel's matrix unit (AMX) ends the process with SIGILL.

GCC 11 before 11.5, 12 before 12.4 and 13 before 13.3 do not see that `ldtilecfg` reads the whole
tile configuration, and drop ggml's stores to it: no tile has a row, and the first one used faults
(GCC's PR 114098).
Debian 12 has such a GCC: what is compiled there for a server with AMX crashes at the first prompt.
Such a build computes without AMX.
"""

from __future__ import annotations

import contextlib
import mmap
import re
import sys
from functools import cache
from pathlib import Path

from llmkit.backend import library
from llmkit.system.resources import cpu_features

__all__ = ["amx_is_broken", "miscompiles_amx"]

MENDED = {11: 5, 12: 4, 13: 3}  # GCC's minor release by its major one
COMPILER = re.compile(rb"GCC: \([^)\0]{0,200}\) (\d+)\.(\d+)")


@cache
def amx_is_broken() -> bool:
    """Whether the llama.cpp in use would run such code here."""
    if sys.platform != "linux" or "amx_int8" not in cpu_features():
        return False
    if b"AMX_INT8 = 1" not in library.C.llama_print_system_info():
        return False
    folder = Path(str(library.C._lib._name)).parent
    return any(miscompiles_amx(file) for file in folder.glob("*ggml-cpu*"))


def miscompiles_amx(file: Path) -> bool:
    """Whether the newest GCC that a library names as its compiler is one of these; False if it
    names none, or clang too: the files of the C library that are linked in name a GCC."""
    with (
        contextlib.suppress(OSError, ValueError),  # unreadable, or empty
        file.open("rb") as opened,
        mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content,
    ):
        releases = [(int(m[1]), int(m[2])) for m in COMPILER.finditer(content)]
        if releases and content.find(b"clang version") < 0:
            major, minor = max(releases)
            return minor < MENDED.get(major, 0)
    return False
