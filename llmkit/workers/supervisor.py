"""Keeps a worker process alive: restarts it with growing delays, and gives up on a crash loop.

It has its own thread; ``state`` and ``pid`` may be read by any.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmkit.bridge import connection as files
from llmkit.bridge.child import Child
from llmkit.errors import LLMKitError, ModelLoadError
from llmkit.protocol import READY, EngineState
from llmkit.system.endings import LastWords, ended
from llmkit.system.process import life_of, process_start_time
from llmkit.workers import engine

__all__ = ["STOPPED_S", "Supervisor"]

FIRST_DELAY_S, MAX_DELAY_S = 0.5, 30.0
MAX_CRASHES = 5  # in a row
HEALTHY_S = 60.0  # a process that was ready for longer has not crashed in a row
END_S = 15.0
LOOK_S = 0.2
STOPPED_S = 60.0
LAST_LINES = 5  # of its log, shown when it is given up


class _StoppedError(ModelLoadError):
    """The worker was killed since it was stopped, which says nothing of its model."""


class Supervisor:
    """A worker for a task of `llmkit.workers.engine`.

    A first load that fails is an error, not a crash: ``check`` raises it. ``on_ready`` is called
    after each successful load. A worker whose process has been stopped (SIGSTOP) for ``stopped_s``
    is killed, and started again, also while it loads; one that a debugger holds is not.
    """

    def __init__(
        self,
        task: dict[str, Any],
        *,
        on_ready: Callable[[], None] = lambda: None,
        stopped_s: float = STOPPED_S,
    ) -> None:
        self._task, self._on_ready, self._stopped_s = task, on_ready, stopped_s
        self._name = str(task.get("name") or task["file"])
        self._state = EngineState("loading", f"The model {self._name!r} is being loaded.", 0.0)
        self._child: Child | None = None
        self._failure: LLMKitError | None = None
        self.restarts = 0
        self._words: LastWords | None = None
        self._connection: files.Connection | None = None
        self._started: float | None = None  # when its process did
        self._num_stopped = 0  # looks in a row at which that was stopped
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="llmkit-supervisor", daemon=True)
        self._thread.start()

    @property
    def state(self) -> EngineState:
        return self._state

    @property
    def pid(self) -> int | None:
        """Process id of the running worker."""
        child = self._child
        return None if child is None else child.pid

    @property
    def failure(self) -> LLMKitError | None:
        """Why the worker was given up."""
        return self._failure

    def check(self) -> None:
        """Raises the reason if the worker was given up."""
        if self._failure is not None:
            raise self._failure

    def close(self) -> None:
        """End the worker."""
        self._stopping.set()
        self._thread.join(END_S + 5)

    def kill(self) -> None:
        """End the worker at once; idle prefixes are not saved."""
        self._stopping.set()
        child = self._child
        if child is not None:
            child.kill()

    def _run(self) -> None:
        try:
            self._keep_alive()
        except Exception as error:  # this thread must not end in silence
            self._give_up(ModelLoadError(f"the supervisor failed: {error!r:.300}"))

    def _keep_alive(self) -> None:
        was_ready, num_crashes, delay = False, 0, FIRST_DELAY_S
        while not self._stopping.is_set():
            self._ready_at: float | None = None
            try:
                self._live()
                return  # it was told to
            except LLMKitError as error:
                failure = error
            except Exception as error:  # such as no process can be started
                failure = ModelLoadError(f"the model's process could not be started: {error}")
            was_ready = was_ready or self._ready_at is not None
            if not (was_ready or isinstance(failure, _StoppedError)):
                return self._give_up(failure)
            if self._ready_at is not None and time.monotonic() - self._ready_at > HEALTHY_S:
                num_crashes, delay = 0, FIRST_DELAY_S
            num_crashes += 1
            if num_crashes == MAX_CRASHES:
                message = (
                    f"the engine process of {self._name!r} has ended {MAX_CRASHES} times; "
                    f"the last time: {failure}"
                )
                last = self._words.last(LAST_LINES) if self._words is not None else []
                message += "".join(f"\n  {line:.500}" for line in last)
                return self._give_up(ModelLoadError(message))
            told = (
                f"The engine process of {self._name!r} has ended ({failure}) "
                "and is being started again."
            )
            self._state = EngineState("loading", told)
            self.restarts += 1  # last: whoever sees the count can read the reason
            _say(f"llmkit: {told}")
            self._stopping.wait(delay)
            delay = min(2 * delay, MAX_DELAY_S)

    def _give_up(self, error: LLMKitError) -> None:
        self._failure = error
        self._state = EngineState("gone", str(error))

    def _live(self) -> None:
        """Run one process to its end. Raises the reason, unless it was told to end."""
        child = self._child = Child(engine.TARGET, self._task, errors=subprocess.PIPE)
        assert child.stderr is not None
        self._words = LastWords(child.stderr)
        self._started, self._num_stopped = None, 0
        try:
            self._await_ready(child, self._words)
            self._watch(child, self._words)
        finally:
            child.end(END_S)
            if self._connection is not None:  # one that was killed left its file and socket
                files.remove(self._connection)
            self._child = self._connection = None

    def _watch(self, child: Child, words: LastWords) -> None:
        """Until it is told to end. Raises the reason if it ends before."""
        while not self._stopping.wait(LOOK_S):
            if child.status is not None:
                raise ModelLoadError(self._why(child, words))
            self._look(child)

    def _look(self, child: Child) -> None:
        """Called each ``LOOK_S``. Kills a worker that has been stopped for long, and raises that.

        Looks in a row are counted, not time, which runs on while we are stopped ourselves.
        """
        if self._started is None:
            with contextlib.suppress(OSError):
                self._started = process_start_time(child.pid)
        is_stopped = self._started is not None and life_of(child.pid, self._started) == "stopped"
        self._num_stopped = self._num_stopped + 1 if is_stopped else 0
        if self._num_stopped * LOOK_S >= self._stopped_s:
            child.kill()
            raise _StoppedError(
                f"it was stopped (SIGSTOP) for {self._stopped_s:.0f} s, and was killed"
            )

    def _await_ready(self, child: Child, words: LastWords) -> None:
        told = self._state.reason
        while not self._stopping.is_set():
            try:
                line = child.read(LOOK_S)
            except EOFError:
                child.wait(1)
                raise ModelLoadError(self._why(child, words)) from None
            if line is None:
                self._look(child)
                continue
            if line.failure is not None:
                error = line.failure.error()
                raise error if isinstance(error, LLMKitError) else ModelLoadError(str(error))
            if line.progress is not None:
                self._state = EngineState("loading", told, line.progress)
            if line.ready is not None:
                with contextlib.suppress(OSError):
                    self._connection = files.read(Path(line.ready.get("path", "")))
                self._state, self._ready_at = READY, time.monotonic()
                with contextlib.suppress(Exception):  # whoever listened may be gone
                    self._on_ready()
                return

    def _why(self, child: Child, words: LastWords) -> str:
        words.wait(1)
        return f"it {ended(child.status)}{f': {words.reason}' if words.reason else ''}"


def _say(line: str) -> None:
    """On standard error, which may be gone."""
    with contextlib.suppress(OSError, ValueError):
        print(line, file=sys.stderr, flush=True)
