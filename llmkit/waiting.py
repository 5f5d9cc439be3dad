"""Waits that the stop button does not cut short: what must be finished is finished first, then the KeyboardInterrupt comes.

`threading.Thread.join` is no such wait: a thread whose join was interrupted counts as ended, though it runs.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

__all__ = ["uninterrupted", "wait_through"]


def wait_through(event: threading.Event) -> None:
    """Until the event is set; raises a KeyboardInterrupt that came meanwhile."""
    stopped: KeyboardInterrupt | None = None
    while not event.is_set():
        try:
            event.wait()
        except KeyboardInterrupt as error:
            stopped = error
    if stopped is not None:
        raise stopped


def uninterrupted(work: Callable[[], object]) -> None:
    """Run ``work`` to its end on a thread of its own; raises what it raises, and after it a KeyboardInterrupt that came meanwhile."""
    claimed, ended = threading.Lock(), threading.Event()
    failures: list[BaseException] = []

    def run() -> None:
        if not claimed.acquire(blocking=False):
            return
        try:
            work()
        except BaseException as error:
            failures.append(error)
        finally:
            ended.set()

    stopped: KeyboardInterrupt | None = None
    try:
        threading.Thread(target=run, name="llmkit-finish").start()
    except KeyboardInterrupt as error:  # whether the thread has been started is not to be known
        stopped = error
        run()
    except RuntimeError:  # the interpreter is ending and starts no threads any more
        run()
    wait_through(ended)
    if failures:
        raise failures[0]
    if stopped is not None:
        raise stopped
