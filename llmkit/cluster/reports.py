"""What an engine tells whoever started it: a line of JSON a second, in a pipe. POSIX only.

The pipe is also how an engine notices that its starter is gone, however that ended: nobody reads
any more. Its own thread; the starter's side is `llmkit.cluster.child`.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import stat
import threading
from collections.abc import Callable, Mapping
from typing import Any

from llmkit.errors import InvalidRequestError
from llmkit.protocol.client import EngineClient

__all__ = ["EVERY_S", "Reports", "report_of"]

EVERY_S = 1.0
CLOSED = select.POLLERR | select.POLLHUP | select.POLLNVAL if hasattr(select, "poll") else 0


class Reports:
    """Writes what ``read`` returns into the pipe ``fd``, and calls ``on_lost`` when nobody reads.

    ``read`` may be set later: while a model loads, only the reader is watched. Raises
    `InvalidRequestError` for what is not a pipe.
    """

    def __init__(
        self,
        fd: int,
        on_lost: Callable[[], object],
        read: Callable[[], Mapping[str, Any]] | None = None,
    ) -> None:
        try:
            is_pipe = stat.S_ISFIFO(os.fstat(fd).st_mode)
        except (OSError, OverflowError):
            is_pipe = False
        if not is_pipe:
            raise InvalidRequestError(
                f"--report-fd takes the number of an open pipe, which {fd} is not.", "report_fd"
            )
        os.set_inheritable(fd, False)
        os.set_blocking(fd, False)  # a starter that does not read must not stop the thread
        self._fd, self._on_lost, self._read = fd, on_lost, read
        threading.Thread(target=self._run, name="llmkit-reports", daemon=True).start()

    def begin(self, read: Callable[[], Mapping[str, Any]]) -> None:
        """From now on report this; the first line says that the engine is ready."""
        self._read = read

    def _run(self) -> None:
        poll = select.poll()
        poll.register(self._fd, 0)  # errors are always told
        with contextlib.suppress(OSError):
            while True:
                read = self._read
                if read is not None:
                    self._write(json.dumps(dict(read())) + "\n")
                # Before the first line sooner, for a starter that waits for it.
                if any(event & CLOSED for _, event in poll.poll(1000 * EVERY_S if read else 50)):
                    break
        self._on_lost()

    def _write(self, line: str) -> None:
        with contextlib.suppress(BlockingIOError):  # the starter is busy: it gets the next one
            os.write(self._fd, line.encode())


def report_of(engine: EngineClient) -> dict[str, Any]:
    """What a starter wants to know of an engine: its state, and its queue."""
    stats = engine.stats()
    return {
        "state": engine.state.phase,
        "running": stats.num_running,
        "waiting": stats.num_waiting,
    }
