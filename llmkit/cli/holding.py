"""What `llmkit engine` runs: a model, until standard input ends."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from typing import Any

from llmkit.cluster.reports import Reports, report_of
from llmkit.errors import EngineGoneError
from llmkit.loading import load

__all__ = ["hold"]

LOOK_S = 0.5
UNHELD = (
    b"llmkit: standard input has ended, and with it the engine, before its model was loaded; keep "
    b"it open: an engine ends with whoever started it.\n"
)


def hold(model: str, options: dict[str, Any], report_fd: int | None = None) -> int:
    """Load a model and keep it; say how it is in the pipe ``report_fd``. Raises what `llmkit.load`
    raises, and `EngineGoneError` when its engine ends."""
    ended, loaded = threading.Event(), threading.Event()
    reports = None if report_fd is None else Reports(report_fd, lambda: os._exit(1))

    def watch() -> None:
        # Whoever started this process holds the other end, also while the model loads. Not through
        # Python's buffer: its lock would abort an interpreter that ends for another reason.
        with contextlib.suppress(OSError):
            while os.read(0, 4096):
                pass
        ended.set()
        if not loaded.is_set():
            if reports is None:  # whoever reads reports knows how it began
                with contextlib.suppress(OSError):
                    os.write(2, UNHELD)
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    with load(model, **options) as llm:
        loaded.set()
        # No cell is busy here: with Python's default the engine finishes its step undisturbed.
        sys.setswitchinterval(0.005)
        print(f"loaded {llm!r}", flush=True)
        if reports is not None:
            reports.begin(lambda: report_of(llm.engine))
        while not ended.wait(LOOK_S):
            if llm.closed:
                raise EngineGoneError(llm.engine.state.reason or "the engine has ended")
    return 0
