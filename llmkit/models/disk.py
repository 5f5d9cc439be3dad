"""Room on disks: asked before a large file is written, so that it need not end half-way."""

from __future__ import annotations

import errno
from pathlib import Path

from llmkit.models.names import gigabytes
from llmkit.system.resources import free_disk
from llmkit.system.text import printable

__all__ = ["is_full", "lack_of_room"]

MIN_MARGIN, MARGIN = 64 << 20, 0.02  # what stays free: for the rest of the machine


def lack_of_room(folder: Path, need: int) -> str:
    """Why ``need`` bytes do not fit on a folder's disk; empty if they do, with a margin."""
    folder, free = free_disk(folder)
    margin = max(MIN_MARGIN, int(need * MARGIN))
    if need + margin <= free or not need:
        return ""
    return (
        f"the disk of {printable(str(folder))} has {gigabytes(free)} free, and "
        f"{gigabytes(need + margin)} are needed"
    )


def is_full(error: OSError) -> bool:
    """Whether a write failed for want of room: the disk's, the quota's or the file's."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
