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

Life = Literal["alive", "stopped", "traced", "gone"]
STATES: dict[str, Life] = {"T": "stopped", "t": "traced"}  # of proc_pid_stat(5)


def process_start_time(pid: int) -> float | None:
    """When a process started, in the system's own unit; None if there is none (or a zombie).

    Raises `OSError` if that cannot be determined, for want of a descriptor, say.
    """
    return _look_at(pid)[0]


def life_of(pid: int, start_time: float) -> Life:
    """What has become of a process; "gone" only when that is certain.

    "stopped" is by SIGSTOP, "traced" held by a debugger or by what writes its core: that lets it go
    again. Only Linux tells the two apart; elsewhere both may be "stopped".
    """
    try:
        started, life = _look_at(pid)
    except OSError:
        return "alive"
    return life if started == start_time else "gone"


def _look_at(pid: int) -> tuple[float | None, Life]:
    """When a process started (None: there is none), and what it does."""
    if sys.platform == "linux":
        try:
            fields = Path(f"/proc/{pid}/stat").read_bytes().rsplit(b")", 1)[1].decode().split()
        except (FileNotFoundError, ProcessLookupError, IndexError):
            return None, "gone"
        state = fields[0]
        return (None, "gone") if state in "ZX" else (float(fields[19]), STATES.get(state, "alive"))
    import psutil

    try:
        process = psutil.Process(pid)
        is_stopped = process.status() == psutil.STATUS_STOPPED
        return float(process.create_time()), "stopped" if is_stopped else "alive"
    except psutil.NoSuchProcess:
        return None, "gone"
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
