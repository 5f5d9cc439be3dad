"""Python's thread switch interval, shortened while models are loaded. Any thread."""

from __future__ import annotations

import sys
import threading

__all__ = ["Switching", "switching"]

# A busy cell yields the interpreter only after another thread has waited this long. With Python's
# 5 ms the engine would wait longer than it computes.
SWITCH_INTERVAL_S = 0.0002


class Switching:
    """The first loaded model shortens the interval; the last one to go restores it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_loaded = 0
        self._before = 0.0

    def quicken(self) -> None:
        with self._lock:
            self._num_loaded += 1
            if self._num_loaded == 1:
                self._before = sys.getswitchinterval()
                sys.setswitchinterval(min(self._before, SWITCH_INTERVAL_S))

    def relax(self) -> None:
        with self._lock:
            self._num_loaded -= 1
            # An interval that someone else has set in the meantime stays.
            if (
                not self._num_loaded
                and abs(sys.getswitchinterval() - min(self._before, SWITCH_INTERVAL_S)) < 1e-5
            ):
                sys.setswitchinterval(self._before)


switching = Switching()
