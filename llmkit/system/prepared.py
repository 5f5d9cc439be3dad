"""Python processes that were started ahead of their task, and import what they need meanwhile.

The standard library alone, since this runs before anything else is imported.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import IO, Any

from llmkit.system.process import python_path

__all__ = ["prepare", "release", "start", "take"]

_prepared: dict[str, subprocess.Popen[bytes]] = {}  # by code


def start(
    code: str,
    errors: IO[Any] | int | None,
    environment: dict[str, str],
    kept: Callable[[str], bool] = lambda _: True,
) -> subprocess.Popen[bytes]:
    """A process that runs ``code`` with this package importable, in a session of its own.

    ``environment`` is added to those of this process's variables that are ``kept``, by name.
    """
    inherited = {name: value for name, value in os.environ.items() if kept(name)}
    return subprocess.Popen(
        [sys.executable, "-P", "-c", code],
        env={**inherited, "PYTHONPATH": python_path(), **environment},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=errors,
        start_new_session=True,
    )


def prepare(code: str) -> None:
    """Start a process that the next `take` of this ``code`` gets; its errors go to a pipe.

    One that nobody takes sees the end of its input when its owner ends.
    """
    if code not in _prepared:
        _prepared[code] = start(code, subprocess.PIPE, {})


def take(code: str) -> subprocess.Popen[bytes] | None:
    """The process prepared for ``code``, if it still runs."""
    process = _prepared.pop(code, None)
    if process is None or process.poll() is None:
        return process
    _close(process)
    return None


def release(code: str) -> None:
    """End the process that was prepared for ``code``, if there is one."""
    process = _prepared.pop(code, None)
    if process is not None:
        process.kill()
        process.wait()
        _close(process)


def _close(process: subprocess.Popen[bytes]) -> None:
    for pipe in (process.stdin, process.stdout, process.stderr):
        if pipe is not None:
            pipe.close()


def _let_go() -> None:
    """In a fork of the owner: do not keep them alive."""
    while _prepared:
        _, process = _prepared.popitem()
        _close(process)
        process.returncode = 0  # no child of this process


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)
