"""Waits that the stop button does not cut short: what must be finished is finished first, then the KeyboardInterrupt comes.

`threading.Thread.join` is no such wait: a thread whose join was interrupted counts as ended, though it runs.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator

__all__ = ["deferred", "uninterrupted", "wait_through"]


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """A KeyboardInterrupt that comes inside is raised at the end: for a C call whose result must not be lost. Only the main thread gets any."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    pressed: list[bool] = []
    signal.signal(signal.SIGINT, lambda *_: pressed.append(True))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if pressed:
        raise KeyboardInterrupt


def wait_through(event: threading.Event) -> None:
    """Until the event is set; raises a KeyboardInterrupt that came meanwhile."""
    stopped: KeyboardInterrupt | None = None
    while True:
        try:
            event.wait()
            break
        except KeyboardInterrupt as error:
            stopped = error
    if stopped is not None:
        raise stopped


def uninterrupted(work: Callable[[], object]) -> None:
    """Run ``work`` to its end on a thread of its own. Raises what it raises, or a KeyboardInterrupt that came meanwhile, with that as its cause."""
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
    try:
        wait_through(ended)
    except KeyboardInterrupt as error:
        stopped = error
    if stopped is not None:
        raise stopped from (failures[0] if failures else None)
    if failures:
        raise failures[0]
