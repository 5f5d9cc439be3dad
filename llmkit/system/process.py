"""Processes by pid and start time, and the path by which another one finds this package.

Standard library, and psutil where there is no /proc.
"""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import Literal

__all__ = ["Life", "kernel_id", "life_of", "process_start_time", "python_path"]

Life = Literal["alive", "stopped", "gone"]


def process_start_time(pid: int) -> float | None:
    """When a process started, in the system's own unit; None if there is none (or a zombie).

    Raises `OSError` if that cannot be determined, for want of a descriptor, say.
    """
    return _look_at(pid)[0]


def life_of(pid: int, start_time: float) -> Life:
    """What has become of a process; "gone" only when that is certain."""
    try:
        started, is_stopped = _look_at(pid)
    except OSError:
        return "alive"
    if started != start_time:
        return "gone"
    return "stopped" if is_stopped else "alive"


def _look_at(pid: int) -> tuple[float | None, bool]:
    """When a process started, and whether it is stopped."""
    if sys.platform == "linux":
        try:
            fields = Path(f"/proc/{pid}/stat").read_bytes().rsplit(b")", 1)[1].decode().split()
        except (FileNotFoundError, ProcessLookupError, IndexError):
            return None, False
        return (None, False) if fields[0] in "ZX" else (float(fields[19]), fields[0] in "Tt")
    import psutil

    try:
        process = psutil.Process(pid)
        return float(process.create_time()), process.status() == psutil.STATUS_STOPPED
    except psutil.NoSuchProcess:
        return None, False
    except psutil.Error as error:
        raise OSError(f"process {pid} cannot be examined: {error}") from error


def python_path() -> str:
    """A PYTHONPATH that finds this llmkit, even if it is not installed."""
    here = str(Path(__file__).resolve().parents[2])
    known = os.environ.get("PYTHONPATH", "")
    with contextlib.suppress(ValueError):
        known.split(os.pathsep).index(here)
        return known
    return f"{known}{os.pathsep}{here}" if known else here


def kernel_id() -> str | None:
    """The id of this Jupyter kernel; None elsewhere. Never loads ipykernel."""
    if "ipykernel.kernelapp" not in sys.modules:
        return None
    from ipykernel.kernelapp import IPKernelApp  # type: ignore[import-untyped,unused-ignore]

    if not IPKernelApp.initialized():
        return None
    stem = Path(IPKernelApp.instance().connection_file).stem
    return stem.removeprefix("kernel-") if stem.startswith("kernel-") else None
