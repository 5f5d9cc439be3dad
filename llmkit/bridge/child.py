"""A child process of this package, and how to talk to it.

The owner writes the task, one line of JSON, to the child's standard input and keeps that open. When
it closes the child exits, so a child never outlives its owner, not even a killed one. The child
answers in lines of JSON (`Line`): progress, readiness, or failure; one that is asked for more when
it is ready answers with news. Anything else it prints, from Python or C, goes to its standard
error.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import queue
import select
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from typing import IO, Any

import msgspec

from llmkit.bridge.wire import Failure
from llmkit.errors import LLMKitError, ModelLoadError
from llmkit.system import collecting, prepared
from llmkit.system.endings import ended

__all__ = ["Child", "Line", "Owner", "code_of", "main", "prepare", "release"]

# Answers get a descriptor of their own: what a library prints to standard output is no answer, and
# must not block.
CODE = (
    "import os; answers = os.dup(1); os.dup2(2, 1); "
    "from llmkit.bridge.child import main; main(answers, {target!r})"
)
MAX_LINE = 1 << 25

_children: weakref.WeakSet[Child] = weakref.WeakSet()


def _let_go() -> None:
    """In a fork of the owner: do not keep the children alive."""
    for child in list(_children):
        child.close_input()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


def code_of(target: str) -> str:
    """What the process of a child of ``target`` runs."""
    return CODE.format(target=target)


def prepare(target: str) -> None:
    """Start the process of the next `Child` of ``target`` ahead of its task.

    It imports what it needs while its owner still reads settings. Only for children whose errors go
    to a pipe and whose environment is the owner's. One that nobody takes ends with its owner.
    """
    prepared.prepare(code_of(target))


def release(target: str) -> None:
    """End the process that was prepared for ``target``, if there is one."""
    prepared.release(code_of(target))


class Line(msgspec.Struct, omit_defaults=True):
    """A message from a child: the share of work done, its facts when ready, or its failure.

    ``news`` are of what it was asked; ``done``: there are no more of them.
    """

    progress: float | None = None
    ready: dict[str, Any] | None = None
    failure: Failure | None = None
    news: str | None = None
    done: bool = False


class Child:
    """A process that runs ``target`` ("module:function", called with an `Owner`) on a ``task``.

    It has its own session: ■ and Ctrl-C signal a whole process group, but only the owner ends it.
    ``kept`` says which of the owner's variables it gets; by default all.
    """

    def __init__(
        self,
        target: str,
        task: dict[str, Any],
        *,
        environment: dict[str, str] | None = None,
        errors: IO[Any] | int | None = None,
        kept: Callable[[str], bool] | None = None,
    ) -> None:
        self._pid = os.getpid()
        code = code_of(target)
        is_plain = errors == subprocess.PIPE and not environment and kept is None
        ready = prepared.take(code) if is_plain else None
        self._process = ready or prepared.start(
            code, errors, environment or {}, kept or (lambda _: True)
        )
        assert self._process.stdout is not None
        self._lines: queue.SimpleQueue[Line | None] = queue.SimpleQueue()
        threading.Thread(
            target=self._read_lines, args=(self._process.stdout,), name="llmkit-child", daemon=True
        ).start()
        _children.add(self)
        assert self._process.stdin is not None
        try:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.write(json.dumps(task).encode() + b"\n")
                self._process.stdin.flush()
        except BaseException:  # the stop button: a child that nobody holds would never end
            self.close_input()
            self.kill()
            raise

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def status(self) -> int | None:
        """The exit status; None while running."""
        return self._process.poll()

    @property
    def stderr(self) -> IO[bytes] | None:
        return self._process.stderr

    def read(self, timeout_s: float) -> Line | None:
        """The next line; None if there is none within the time. Raises `EOFError` when the child
        has said all that it will."""
        try:
            line = self._lines.get(timeout=max(0.0, timeout_s))
        except queue.Empty:
            return None
        if line is None:
            self._lines.put(None)
            raise EOFError
        return line

    def _read_lines(self, pipe: IO[bytes]) -> None:
        """On a thread of its own: a pipe cannot be waited for on every system."""
        with contextlib.suppress(OSError, ValueError), pipe:
            while raw := pipe.readline(MAX_LINE):
                try:
                    self._lines.put(msgspec.json.decode(raw, type=Line))
                except msgspec.DecodeError:  # something printed before the answers were set apart
                    with contextlib.suppress(OSError, ValueError):
                        print(raw.decode("utf-8", "replace").rstrip(), file=sys.stderr, flush=True)
        self._lines.put(None)

    def ready(self, on_progress: Callable[[float], None] = lambda _: None) -> dict[str, Any]:
        """Wait until it is ready; returns its facts.

        Raises the child's failure, or `ModelLoadError` if it ended without one.
        """
        while True:
            try:
                line = self.read(1.0)
            except EOFError:
                how = ended(self._process.wait())
                raise ModelLoadError(f"the model's process {how}.") from None
            if line is None:
                continue
            if line.failure is not None:
                raise line.failure.error()
            if line.progress is not None:
                on_progress(line.progress)
            if line.ready is not None:
                return line.ready

    def ask(self, question: dict[str, Any]) -> None:
        """Have a child that is ready do something more; it answers in lines. Raises `OSError`."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(question).encode() + b"\n")
        self._process.stdin.flush()

    def end(self, patience_s: float) -> None:
        """Tell it to end, and kill it after ``patience_s``. A fork of the owner only lets go."""
        if self._pid != os.getpid():
            return self.close_input()
        # A copy of the pipe may be open elsewhere, so closing it may not be enough.
        with contextlib.suppress(OSError, ValueError):
            assert self._process.stdin is not None
            self._process.stdin.write(b"end\n")
            self._process.stdin.flush()
        self.close_input()
        try:
            self._process.wait(patience_s)
        except subprocess.TimeoutExpired:
            self.kill()

    def wait(self, timeout_s: float) -> None:
        """Wait for its end, at most ``timeout_s``."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout_s)

    def kill(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()

    def close_input(self) -> None:
        if self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()


class Owner:
    """A child's view of its owner: the ``task``, the replies to it, and when to end."""

    def __init__(self, task: dict[str, Any], answers: IO[bytes]) -> None:
        self.task = task
        self._answers = answers
        self._ended, self._is_ready = threading.Event(), threading.Event()
        self._asked: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._told = 0.0
        threading.Thread(target=self._watch, name="llmkit-owner", daemon=True).start()

    def _watch(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            # Until it is told to end, or the owner is gone.
            while (line := sys.stdin.buffer.readline()) not in (b"end\n", b""):
                self._asked.put(json.loads(line))
        self._ended.set()
        self._asked.put(None)
        if not self._is_ready.is_set():  # a load may take hours: abandon it
            os._exit(1)

    def progress(self, share: float) -> None:
        """Report the share done; sent ten times a second at most."""
        now = time.monotonic()
        if now - self._told > 0.1 or share >= 1:
            self._told = now
            self._say(Line(progress=share))

    def ready(self, **facts: Any) -> None:
        """Report readiness. From now on the child is not killed but ends by itself."""
        self._is_ready.set()
        self._say(Line(ready=facts))

    def asked(self) -> dict[str, Any] | None:
        """The next question of `Child.ask`; waits for it. None when the owner wants an end."""
        return self._asked.get()

    def tell(self, news: str) -> None:
        """Answer a question, in part."""
        self._say(Line(news=news))

    def done(self) -> None:
        """The question is answered."""
        self._say(Line(done=True))

    def fail(self, error: Exception) -> None:
        known = isinstance(error, LLMKitError)
        self._say(
            Line(
                failure=Failure.of(
                    error
                    if known
                    else ModelLoadError(f"the model could not be loaded: {error!r:.500}")
                )
            )
        )

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until the owner wants an end; False on timeout."""
        return self._ended.wait(timeout_s)

    def _say(self, line: Line) -> None:
        with contextlib.suppress(OSError):  # the owner is gone, and we will be soon
            self._answers.write(msgspec.json.encode(line) + b"\n")
            self._answers.flush()


def main(answers_fd: int, target: str) -> None:
    """What the child process runs."""
    module, _, function = target.partition(":")
    collecting.pause()
    with contextlib.suppress(Exception):  # whatever it is, the task fails of it too, and says so
        for needed in getattr(importlib.import_module(module), "WARM_UP", ()):
            # Windows can only wait for sockets.
            if sys.platform != "win32" and select.select([0], [], [], 0)[0]:
                break
            importlib.import_module(needed)
    task = sys.stdin.buffer.readline()
    if not task:  # its owner ended before it had any
        os._exit(0)
    collecting.resume()
    owner = Owner(json.loads(task), os.fdopen(answers_fd, "wb"))
    status = 0
    try:
        getattr(importlib.import_module(module), function)(owner)
    except Exception as error:
        owner.fail(error)
        status = 1
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)  # a thread waits on standard input: the interpreter could not finalize
