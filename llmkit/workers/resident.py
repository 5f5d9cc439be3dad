"""How much memory processes have taken."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import psutil

__all__ = ["Resident", "resident", "total"]

PROC = Path("/proc")
# In files the kernel counts what it could drop and read again as free, weights that are mapped too.
OWN = re.compile(r"^Rss(?:Anon|Shmem):\s*(\d+) kB$", re.MULTILINE)


class Resident(NamedTuple):
    """Bytes: all that is resident, and the part of it that the system counts as used."""

    all_bytes: int
    used_bytes: int


def resident(pid: int, *, with_children: bool = False, proc: Path = PROC) -> Resident:
    """Of a process, and of its children; nothing if it has ended. Only Linux tells what is of
    files: elsewhere all counts as used."""
    try:
        process = psutil.Process(pid)
        children = process.children() if with_children else []
        whole = int(process.memory_info().rss)
    except psutil.Error:
        return Resident(0, 0)
    try:
        found = OWN.findall((proc / str(pid) / "status").read_text(errors="replace"))
    except OSError:
        found = []
    used = min(whole, 1024 * sum(map(int, found))) if found else whole
    return total([Resident(whole, used), *(resident(child.pid, proc=proc) for child in children)])


def total(each: Iterable[Resident]) -> Resident:
    """All together."""
    found = list(each)
    return Resident(sum(r.all_bytes for r in found), sum(r.used_bytes for r in found))
