"""Opens untrusted files: regular files only, since a pipe or device could block.

Standard library only.
"""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

__all__ = ["open_plain", "read_json", "shallow_json"]

MAX_JSON_DEPTH, MAX_BRACKETS = 64, 200_000


def open_plain(path: Path | str, *, follow: bool = True) -> BinaryIO:
    """Open a regular file for reading.

    Raises `OSError`, also for any other kind of file, and with ``follow=False`` for a symlink.
    """
    flags = (
        os.O_RDONLY
        | getattr(os, "O_NONBLOCK", 0)
        | getattr(os, "O_CLOEXEC", 0)
        | getattr(os, "O_BINARY", 0)
    )
    descriptor = os.open(path, flags | (0 if follow else getattr(os, "O_NOFOLLOW", 0)))
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(f"{path} is not a regular file")
        return open(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def shallow_json(data: bytes) -> Any:
    """Parse JSON of limited depth. Raises `ValueError` for anything else."""
    try:
        text = data.decode("utf-8")
        deepest = depth = 0
        quoted = escaped = False
        brackets = text.count("[") + text.count("{")
        if brackets > MAX_BRACKETS:
            raise ValueError(f"JSON with {brackets} lists and objects")
        if brackets > MAX_JSON_DEPTH:
            for c in text:
                if quoted:
                    escaped, quoted = c == "\\" and not escaped, c != '"' or escaped
                elif c == '"':
                    quoted = True
                elif c in "[{":
                    depth += 1
                    deepest = max(deepest, depth)
                elif c in "]}":
                    depth -= 1
        if deepest > MAX_JSON_DEPTH:
            raise ValueError(f"JSON nested {deepest} levels deep")
        return json.loads(text)
    except RecursionError:
        raise ValueError("JSON nested too deeply") from None


def read_json(path: Path, most: int) -> Any:
    """Read JSON from a regular file of at most ``most`` bytes. Raises `OSError`, `ValueError`."""
    with open_plain(path) as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise ValueError(f"{path.name} is longer than {most} bytes")
    return shallow_json(data)
