"""An engine as a child process: started, watched, drained. Threads of its own; knows no Ray.

Its reports come through a pipe whose other end the engine watches (`llmkit.cluster.reports`), so
that it ends with this process, also with one that was killed. Standard library only: the process
may run in another environment than the engine.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from llmkit.errors import EngineGoneError
from llmkit.system.endings import LastWords, ended

__all__ = ["EngineChild"]

SILENT_S = 60.0  # an engine that is busy may be late, but not so late
LAST_LINES = 5
KILL_S = 5.0


class EngineChild:
    """Runs ``command``, a `llmkit engine …`, with ``--report-fd``.

    Its own session: Ctrl-C in a terminal is for whoever started it, who drains it then.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str] | None = None):
        reading, writing = os.pipe()
        try:
            self._process = subprocess.Popen(
                [*command, "--report-fd", str(writing)],
                stdin=subprocess.PIPE,  # open as long as this process lives
                stderr=subprocess.PIPE,
                env={**os.environ, **(environment or {})},
                pass_fds=(writing,),
                start_new_session=True,
            )
        except OSError as error:
            os.close(reading)
            raise EngineGoneError(
                f"{command[0]} cannot be started: {error.strerror or error}"
            ) from None
        finally:
            os.close(writing)
        self._report: dict[str, Any] = {}
        self._heard = time.monotonic()
        assert self._process.stderr is not None
        self._words = LastWords(self._process.stderr)
        self._reader = threading.Thread(
            target=self._hear, args=(reading,), name="llmkit-engine", daemon=True
        )
        self._reader.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def report(self) -> Mapping[str, Any]:
        """What it said last; empty until it is ready."""
        return self._report

    @property
    def ready(self) -> bool:
        """Whether its model is loaded. Raises `EngineGoneError` if it has ended or is stuck."""
        self.check()
        return bool(self._report)

    @property
    def ended(self) -> bool:
        if self._process.poll() is None:
            return False
        assert self._process.stdin is not None
        self._process.stdin.close()
        return True

    def check(self) -> None:
        """Raises `EngineGoneError`, with the reason, if it has ended, or reports no more."""
        if self.ended:
            self._hear_out()
            raise EngineGoneError(self._why())
        if self._report and time.monotonic() - self._heard > SILENT_S:
            raise EngineGoneError(f"the engine has not reported for {SILENT_S:.0f} s")

    def drain(self) -> None:
        """Ask it to take nothing new, and to end when it has finished what runs."""
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """End it at once, and wait for that."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(KILL_S)
        if self.ended:
            self._hear_out()

    def _hear_out(self) -> None:
        """What it said before it ended may not have been read yet."""
        self._reader.join(1)
        self._words.wait(1)

    def _hear(self, fd: int) -> None:
        with contextlib.suppress(OSError, ValueError), open(fd, "rb") as pipe:
            for line in pipe:
                self._report, self._heard = json.loads(line), time.monotonic()

    def _why(self) -> str:
        told = f"the engine {ended(self._process.poll())}"
        return told + "".join(f"\n  {line:.500}" for line in self._words.last(LAST_LINES))
