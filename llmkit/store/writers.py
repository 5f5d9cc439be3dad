"""Which process writes something, and whether it is gone. Standard library only."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import platform
import secrets
from pathlib import Path

from llmkit.system.process import life_of, process_start_time

__all__ = ["ABANDONED_S", "LEASE_S", "is_gone", "new_writer"]

LEASE_S = 60.0  # without a renewal, a process on another machine counts as gone
ABANDONED_S = 600.0  # also one on this machine that is alive: it has forgotten


def new_writer() -> str:
    """A name for a writer in this process: the machine, the process, and which one there."""
    return f"{_place()}:{os.getpid()}:{process_start_time(os.getpid()) or 0}:{secrets.token_hex(4)}"


def is_gone(writer: str, renewed_at: float, now: float) -> bool:
    """Whether a writer will write no more. Of this machine's that is known at once."""
    silent_s = now - renewed_at
    place, pid, start, _ = writer.split(":")
    if place != _place():
        return silent_s > LEASE_S
    return silent_s > ABANDONED_S or life_of(int(pid), float(start)) == "gone"


@functools.cache
def _place() -> str:
    """Where this process's number is valid: machine, boot and namespace."""
    boot = namespace = ""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    with contextlib.suppress(OSError):
        namespace = os.readlink("/proc/self/ns/pid")
    return hashlib.sha256(f"{platform.node()} {boot} {namespace}".encode()).hexdigest()[:16]
