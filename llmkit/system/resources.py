"""What this process may use: cores, memory, files, room on disk. Standard library only.

Containers and services are limited by control groups, of which a process may be in a nested one:
the tightest limit on the way to the root counts. ``root`` is another place for ``/``, for tests.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = [
    "FEATURES",
    "GroupMemory",
    "cpu_features",
    "cpu_name",
    "free_disk",
    "group_memory",
    "limits",
    "usable_cores",
]

SLASH = Path("/")
UNLIMITED = 1 << 60
# What speeds up llama.cpp, as Linux calls it and as ggml says that it was built with it.
FEATURES = {
    "avx": "AVX",
    "avx2": "AVX2",
    "f16c": "F16C",
    "fma": "FMA",
    "avx_vnni": "AVX_VNNI",
    "avx512f": "AVX512",
    "avx512_vnni": "AVX512_VNNI",
    "avx512_bf16": "AVX512_BF16",
    "amx_int8": "AMX_INT8",
    "asimd": "NEON",
    "asimddp": "DOTPROD",
    "i8mm": "MATMUL_INT8",
    "sve": "SVE",
}


@dataclass(frozen=True, slots=True)
class GroupMemory:
    """The limit of a control group, and what it has taken of it, in bytes."""

    limit: int
    used: int

    @property
    def free(self) -> int:
        return max(0, self.limit - self.used)


def usable_cores(root: Path = SLASH) -> int:
    """Cores that this process may use: affinity and quota, at least 1."""
    count = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    for folder, is_v2 in _groups(root, "cpu"):
        with contextlib.suppress(OSError, ValueError):
            if is_v2:
                quota, period = (folder / "cpu.max").read_text().split()
                if quota == "max":
                    continue
            else:
                quota = (folder / "cpu.cfs_quota_us").read_text()
                period = (folder / "cpu.cfs_period_us").read_text()
            if int(quota) > 0 and int(period) > 0:
                count = min(count, max(1, int(quota) // int(period)))
    return count


def group_memory(root: Path = SLASH) -> GroupMemory | None:
    """The tightest memory limit of the groups that this process is in; None without one."""
    found = []
    for folder, is_v2 in _groups(root, "memory"):
        names = (
            ("memory.max", "memory.current", "(?:in)?active_file")
            if is_v2
            else ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_(?:in)?active_file")
        )
        with contextlib.suppress(OSError, ValueError):
            text = (folder / names[0]).read_text().strip()
            if text == "max" or not 0 < int(text) < UNLIMITED:
                continue
            used = int((folder / names[1]).read_text())
            stat = (folder / "memory.stat").read_text()
            # Files in the cache make way when memory is wanted, as in the machine's own count.
            files = sum(map(int, re.findall(rf"^{names[2]} (\d+)$", stat, re.MULTILINE)))
            found.append(GroupMemory(int(text), max(0, used - files)))
    return min(found, key=lambda group: group.free, default=None)


def _groups(root: Path, controller: str) -> Iterator[tuple[Path, bool]]:
    """The folders of a controller from this process's group to the root; whether of version 2."""
    with contextlib.suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            number, controllers, path = line.split(":", 2)
            if number == "0":
                base, is_v2 = root / "sys/fs/cgroup", True
            elif controller in controllers.split(","):
                base, is_v2 = root / "sys/fs/cgroup" / controller, False
            else:
                continue
            # In a container the path may be the host's, which is not there.
            parts = [part for part in path.split("/") if part not in ("", "..")]
            for length in range(len(parts), -1, -1):
                yield base.joinpath(*parts[:length]), is_v2


def cpu_name(root: Path = SLASH) -> str:
    """The processor's name, as its maker has it."""
    with contextlib.suppress(OSError):
        text = (root / "proc/cpuinfo").read_text(errors="replace")
        name = re.search(r"^(?:model name|Model|Hardware)\s*:\s*(.+)$", text, re.MULTILINE)
        if name:
            return name[1].strip()
    return platform.processor() or platform.machine()


def cpu_features(root: Path = SLASH) -> list[str]:
    """Which of `FEATURES` the processor has; empty where the system does not say."""
    with contextlib.suppress(OSError):
        text = (root / "proc/cpuinfo").read_text(errors="replace")
        line = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
        has = set(line[1].split()) if line else set()
        return [name for name in FEATURES if name in has]
    return []


def limits() -> dict[str, tuple[int | None, int | None]]:
    """Soft and hard limits of this process; None is no limit. Empty on Windows."""
    if sys.platform == "win32":
        return {}
    import resource

    kinds = {"files": "RLIMIT_NOFILE", "processes": "RLIMIT_NPROC", "locked": "RLIMIT_MEMLOCK",
             "memory": "RLIMIT_AS"}  # fmt: skip
    found: dict[str, tuple[int | None, int | None]] = {}
    for name, constant in kinds.items():
        if hasattr(resource, constant):
            soft, hard = (
                None if value == resource.RLIM_INFINITY else value
                for value in resource.getrlimit(getattr(resource, constant))
            )
            found[name] = (soft, hard)
    return found


def free_disk(path: Path) -> tuple[Path, int]:
    """The nearest folder on the way to ``path`` that exists, and its free bytes for this user."""
    for folder in (path, *path.parents):
        if folder.is_dir():
            return folder, shutil.disk_usage(folder).free
    raise FileNotFoundError(f"{path} is on no disk that is here")
