"""Rows of the device check's table, and what the driver says."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MIB = 1 << 20


Row = dict[str, Any]


class Skipped(Exception):
    """A check that cannot run here, and why."""


def row(what: str, expected: str, measured: str, ok: bool | None) -> Row:
    """One line of the table; ``ok`` None means reported only."""
    return {"what": what, "expected": expected, "measured": measured, "ok": ok}


def skipped(what: str, expected: str, why: str) -> Row:
    return {**row(what, expected, why, None), "skipped": True}


def smi(fields: str) -> list[str] | None:
    """What nvidia-smi says of the first GPU; None without one."""
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits", "-i", "0"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return [f.strip() for f in said.stdout.split(",")] if said.returncode == 0 else None


def driver_used() -> int:
    """Bytes of VRAM in use, by the driver. Raises `Skipped` without a GPU."""
    found = smi("memory.used")
    if not found:
        raise Skipped("no GPU")
    return int(found[0]) * MIB


def driver_settled(most: int, seconds: float = 5.0) -> int:
    """The driver's number once it is at most ``most``, or when the time is over."""
    end = time.monotonic() + seconds
    while (used := driver_used()) > most and time.monotonic() < end:
        time.sleep(0.1)
    return used


def mib(count: float) -> str:
    return f"{count / MIB:,.0f} MiB"
