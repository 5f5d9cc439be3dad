"""The processes that a test's own process has started, and what holds up those that begin."""

from __future__ import annotations

import contextlib
from pathlib import Path

import psutil


def children(word: str) -> list[psutil.Process]:
    """Those with this word in their command line; one may end while it is looked at."""
    found = []
    for process in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            if word in " ".join(process.cmdline()):
                found.append(process)
    return found


def held_up(folder: Path) -> Path:
    """A file: while it is there, no Python process begins whose PYTHONPATH is this folder."""
    hold = folder / "hold"
    (folder / "sitecustomize.py").write_text(
        f"import os, time\nwhile os.path.exists({str(hold)!r}):\n    time.sleep(0.01)\n"
    )
    return hold
