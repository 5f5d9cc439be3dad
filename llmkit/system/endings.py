"""How child processes end: their status in words, and the last of what they said.

Standard library only.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections import deque
from collections.abc import Iterable
from typing import IO

from llmkit.system.text import printable

__all__ = ["LastWords", "ended", "reason_in", "signal_name"]

MAX_LINES, MAX_LINE, MAX_REASON = 20, 64 << 10, 300
# Of a line that says why. What ended the process often says more after it, a backtrace say.
MARKS = ("ASSERT", "terminate called", "what():", "rror")


def signal_name(number: int) -> str:
    """
    >>> signal_name(11), signal_name(40)
    ('SIGSEGV', 'signal 40')
    """
    try:
        return signal.Signals(number).name
    except ValueError:  # most real-time signals have no name
        return f"signal {number}"


def ended(status: int | None) -> str:
    """How a process ended, after its name; ``status`` as `subprocess` has it, None if it lives.

    >>> ended(3), ended(-9)
    ('ended with exit status 3', 'was ended by SIGKILL, perhaps because memory ran out')
    """
    if status is None:
        return "does not answer any more"
    if status >= 0:
        return f"ended with exit status {status}"
    name = signal_name(-status)
    return f"was ended by {name}" + ", perhaps because memory ran out" * (name == "SIGKILL")


def reason_in(lines: Iterable[str]) -> str:
    """The line that says best why a process ended, safe to print; empty if it said nothing.

    >>> reason_in(["ggml.c:7: GGML_ASSERT(n > 0) failed", "libggml.so(+0x1f2)", ""])
    'ggml.c:7: GGML_ASSERT(n > 0) failed'
    """
    said = [line.strip() for line in lines if line.strip()]
    telling = [line for line in said if any(mark in line for mark in MARKS)]
    last = (telling or said)[-1:]
    return printable(last[0])[:MAX_REASON] if last else ""


class LastWords:
    """Passes a child's standard error on to ours but for empty lines, on a thread, and keeps its
    last lines."""

    def __init__(self, pipe: IO[bytes]) -> None:
        self._lines: deque[str] = deque(maxlen=MAX_LINES)
        self._thread = threading.Thread(
            target=self._read, args=(pipe,), name="llmkit-words", daemon=True
        )
        self._thread.start()

    def last(self, count: int = MAX_LINES) -> list[str]:
        """At most so many lines that are not empty, safe to print."""
        return [line for line in list(self._lines) if line.strip()][-count:]

    @property
    def reason(self) -> str:
        """As `reason_in` has it."""
        return reason_in(self.last())

    def forget(self) -> None:
        """What was said so far is of something else."""
        self._lines.clear()

    def wait(self, timeout_s: float) -> None:
        """Wait until all was read that a process said before it ended."""
        self._thread.join(timeout_s)

    def _read(self, pipe: IO[bytes]) -> None:
        is_heard = True
        with contextlib.suppress(ValueError, OSError), pipe:
            while raw := pipe.readline(MAX_LINE):
                line = printable(raw.decode("utf-8", "replace").rstrip())
                self._lines.append(line)
                if line.strip() and is_heard:
                    try:
                        print(line, file=sys.stderr, flush=True)
                    except (OSError, ValueError):  # ours is gone; theirs must not fill
                        is_heard = False
