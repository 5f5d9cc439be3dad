"""The processes that a test's own process has started."""

from __future__ import annotations

import contextlib

import psutil


def children(word: str) -> list[psutil.Process]:
    """Those with this word in their command line; one may end while it is looked at."""
    found = []
    for process in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            if word in " ".join(process.cmdline()):
                found.append(process)
    return found
