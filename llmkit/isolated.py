"""A model in a child process: ``llmkit.load(..., isolated=True)``. Its crash is not ours, its Python is not ours, and it never outlives us.

The child is told what to load in the first line of its standard input and answers with one line; then the bridge carries everything. It ends when its standard
input does, which is when we close it or are gone.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from llmkit.bridge import connection as files
from llmkit.bridge import messages
from llmkit.bridge.client import BridgeClient
from llmkit.errors import ModelLoadError
from llmkit.models.registry import ModelSpec
from llmkit.options import EngineOptions

__all__ = ["IsolatedEngine", "child"]

END_S = 5.0


class IsolatedEngine(BridgeClient):
    """An `EngineClient` for a model in a process of its own; ``close()`` ends that process.

    Raises what `llmkit.load` documents. A KeyboardInterrupt ends the load. ``share=False``: nobody else finds the model.
    """

    def __init__(
        self, spec: ModelSpec, options: EngineOptions, *, name: str | None = None, force: bool = False, kernel_id: str | None = None, share: bool = True
    ) -> None:
        self._owner = os.getpid()
        # A session of its own: the stop button signals the kernel's whole process group.
        command = [sys.executable, "-c", "from llmkit.isolated import child; child()"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True)
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
            raise ModelLoadError(f"the process that was to hold the model ended with status {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise messages.error_from(answer["error"])
        return answer

    def close(self) -> None:
        super().close()
        if self._owner == os.getpid():  # a forked child only lets go
            self._end(END_S)

    def _end(self, patience_s: float) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        try:
            self._process.wait(patience_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def child() -> None:
    """What the child process runs."""
    from llmkit.bridge.server import BridgeServer
    from llmkit.local import open_model

    wanted = json.loads(sys.stdin.readline())
    answers, sys.stdout = sys.stdout, sys.stderr  # whatever else prints is no answer
    try:
        engine = open_model(
            ModelSpec(wanted["name_of_file"], Path(wanted["path"])), EngineOptions(**wanted["options"]), name=wanted["name"], force=wanted["force"]
        )
        server = BridgeServer(engine, wanted["kernel_id"])
    except Exception as error:
        print(json.dumps({"error": messages.error_to(error)}), file=answers, flush=True)
        return
    sys.setswitchinterval(0.005)  # no cell is busy here: Python's own interval lets the engine finish its step undisturbed
    print(json.dumps({"path": str(server.connection.path)}), file=answers, flush=True)
    sys.stdin.read()
    server.close()
    engine.close()
