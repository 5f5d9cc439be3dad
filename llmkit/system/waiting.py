"""Waits that the stop button does not cut short: the KeyboardInterrupt is raised afterwards.

`threading.Thread.join` will not do: after an interrupted join a running thread counts as ended.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator

__all__ = ["deferred", "uninterrupted", "wait_through"]


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Postpones a KeyboardInterrupt to the end, for a C call whose result must not be lost.

    No effect outside the main thread, which alone gets any.
    """
    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    ):
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
    """Wait for the event, then raise a KeyboardInterrupt that came in the meantime."""
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
    """Run ``work`` to its end on its own thread.

    Raises what it raises, or a KeyboardInterrupt that came in the meantime, caused by that.
    """
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
    except KeyboardInterrupt as error:  # the thread may or may not have started
        stopped = error
        run()
    except RuntimeError:  # at interpreter exit no thread can be started
        run()
    try:
        wait_through(ended)
    except KeyboardInterrupt as error:
        stopped = error
    if stopped is not None:
        raise stopped from (failures[0] if failures else None)
    if failures:
        raise failures[0]
