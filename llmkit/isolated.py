"""A model in a child process: ``llmkit.load(..., isolated=True)``. It crashes alone, has its own GIL, and exits when we do.

The child is told what to load in the first line of its standard input and answers with one line; then the bridge carries everything. It ends when its standard
input does, which is when we close it or are gone.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import Any

from llmkit.bridge import connection as files
from llmkit.bridge import messages
from llmkit.bridge.client import BridgeClient
from llmkit.errors import LLMKitError, ModelLoadError
from llmkit.machine import python_path
from llmkit.models.registry import ModelSpec
from llmkit.options import EngineOptions

__all__ = ["IsolatedEngine", "child"]

END_S = 15.0  # requests end, idle prefixes go to disk
# Answers have a descriptor of their own: whatever prints to standard output, Python or C, now or at start-up, is no answer and blocks nobody.
CHILD = "import os; answers = os.dup(1); os.dup2(2, 1); from llmkit.isolated import child; child(answers)"
END = "end\n"

_owners: weakref.WeakSet[IsolatedEngine] = weakref.WeakSet()


def _let_go() -> None:
    """In a forked child: the model must not live as long as we do."""
    for engine in list(_owners):
        engine.close_pipes()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


class IsolatedEngine(BridgeClient):
    """An `EngineClient` for a model in a process of its own; ``close()`` ends that process.

    Raises what `llmkit.load` documents. A KeyboardInterrupt ends the load. ``share=False``: nobody else finds the model.
    """

    def __init__(
        self, spec: ModelSpec, options: EngineOptions, *, name: str | None = None, force: bool = False, kernel_id: str | None = None, share: bool = True
    ) -> None:
        self._owner = os.getpid()
        # A session of its own: the stop button signals the kernel's whole process group.
        command = [sys.executable, "-P", "-c", CHILD]
        environment = {**os.environ, "PYTHONPATH": python_path()}
        self._process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True)
        _owners.add(self)
        wanted = {"name_of_file": spec.name, "path": str(spec.path), "options": options.as_dict(), "name": name, "force": force, "kernel_id": kernel_id}
        try:
            answer = self._ask(wanted)
            found = files.read(Path(answer["path"]))
            if found is None:
                raise ModelLoadError(f"the connection file {answer['path']} of the model's process cannot be trusted: is the runtime folder yours alone?")
            if not share:
                found.path.unlink(missing_ok=True)
        except BaseException:
            self._end(0)
            raise
        super().__init__(found)

    def _ask(self, wanted: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        line = ""
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(wanted) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        if not line:
            raise ModelLoadError(f"the process that was to hold the model ended with status {self._process.wait()}: it crashed, or was killed.")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            with contextlib.suppress(subprocess.TimeoutExpired):  # whoever waits for it kills it
                self._process.wait(END_S)
            raise messages.error_from(answer["error"])
        return answer

    def close(self) -> None:
        super().close()
        if self._owner == os.getpid():  # a forked child only lets go
            self._end(END_S)

    def close_pipes(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()

    def _end(self, patience_s: float) -> None:
        with contextlib.suppress(OSError, ValueError):
            assert self._process.stdin is not None
            self._process.stdin.write(END)
            self._process.stdin.flush()
        self.close_pipes()
        try:
            self._process.wait(patience_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def child(answers_fd: int) -> None:
    """What the child process runs."""
    from llmkit.bridge.server import BridgeServer
    from llmkit.local import open_model

    wanted = json.loads(sys.stdin.readline())
    answers = os.fdopen(answers_fd, "w")
    ended, loaded = threading.Event(), threading.Event()

    def watch() -> None:
        sys.stdin.readline()  # the word to end, or the end of who could say it
        ended.set()
        if not loaded.is_set():  # a load may take hours, and is not ours to finish any more
            os._exit(1)

    threading.Thread(target=watch, name="llmkit-owner", daemon=True).start()
    try:
        engine = open_model(
            ModelSpec(wanted["name_of_file"], Path(wanted["path"])), EngineOptions(**wanted["options"]), name=wanted["name"], force=wanted["force"]
        )
        server = BridgeServer(engine, wanted["kernel_id"])
    except Exception as error:
        told = error if isinstance(error, LLMKitError) else ModelLoadError(f"the model could not be loaded: {error!r}")
        print(json.dumps({"error": messages.error_to(told)}), file=answers, flush=True)
        return
    sys.setswitchinterval(0.005)  # no cell is busy here: Python's own interval lets the engine finish its step undisturbed
    loaded.set()
    print(json.dumps({"path": str(server.connection.path)}), file=answers, flush=True)
    ended.wait()
    server.close()
    engine.close()
