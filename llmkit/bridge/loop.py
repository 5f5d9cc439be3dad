"""One thread and one ZMQ context for all engines that a process is connected to.

Lines come and go; the thread ends when the last one has gone, and the next one starts another. A
forked child begins with none.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import os
import selectors
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Protocol

import zmq

from llmkit.bridge.waker import Waker

__all__ = ["Line", "Loop", "loop_for"]

logger = logging.getLogger("llmkit.bridge")

MAX_SOCKETS = 16_384  # three for each engine of another host


class Line(Protocol):
    """What a loop drives. All methods are called on its thread, and none may block."""

    def open(self, context: zmq.Context[zmq.Socket[bytes]]) -> Sequence[zmq.Socket[bytes]]:
        """Connect. Returns the sockets to watch."""
        ...

    def work(self) -> bool:
        """Read all there is, and send what was posted. False: it is over."""
        ...

    def tick(self) -> float:
        """What is to be done now and then. Returns the seconds until the next time."""
        ...

    def shut(self, failure: Exception | None) -> None:
        """Close the sockets; ``failure`` is what ended it, if it was nothing expected."""
        ...


class Loop:
    """Drives lines until none is left."""

    def __init__(self) -> None:
        self._waker = Waker()
        self._lock = threading.Lock()
        self._new: list[Line] = []
        self._posted: deque[Line] = deque()
        self._sockets: dict[Line, Sequence[zmq.Socket[bytes]]] = {}
        self._due: list[tuple[float, int, Line]] = []
        self._count = itertools.count()
        self._ended = False
        self._thread = threading.Thread(target=self._run, name="llmkit-bridge-client", daemon=True)

    @property
    def is_here(self) -> bool:
        """Whether the caller runs on the loop's thread."""
        return threading.current_thread() is self._thread

    def add(self, line: Line) -> bool:
        """Begin to drive it; False if the loop has ended. Any thread."""
        with self._lock:
            if self._ended:
                return False
            self._new.append(line)
            if self._thread.ident is None:
                self._thread.start()
        self._waker()
        return True

    def post(self, line: Line) -> None:
        """Have its ``work`` called soon. Any thread."""
        self._posted.append(line)
        self._waker()

    def _run(self) -> None:
        failure: Exception | None = None
        try:
            with zmq.Context() as context, selectors.DefaultSelector() as selector:
                context.set(zmq.MAX_SOCKETS, MAX_SOCKETS)
                selector.register(self._waker.fileno, selectors.EVENT_READ)
                try:
                    while self._begin(context, selector):
                        self._turn(selector)
                except Exception as error:
                    failure = error
                    raise
                finally:
                    self._end(failure)
        except Exception as error:  # no descriptor is free, say
            logger.exception("the connections to engines failed")
            failure = error
        finally:  # whatever happens, nobody may wait forever
            self._end(failure)
            self._waker.close()

    def _begin(
        self, context: zmq.Context[zmq.Socket[bytes]], selector: selectors.BaseSelector
    ) -> bool:
        """Open what is new. False: no line is left, and no other will come."""
        with self._lock:
            new, self._new = self._new, []
            if not new and not self._sockets:
                self._ended = True
                return False
        for line in new:
            self._sockets[line] = ()
            try:
                self._sockets[line] = line.open(context)
                for sock in self._sockets[line]:
                    selector.register(sock.FD, selectors.EVENT_READ, line)
            except Exception as error:
                self._close(line, selector, error)
            else:
                heapq.heappush(self._due, (0.0, next(self._count), line))
                self._posted.append(line)  # a descriptor tells only of what is new from now on
        return True

    def _turn(self, selector: selectors.BaseSelector) -> None:
        """Wait for something to do, and do it."""
        touched: dict[Line, None] = {}
        wait = None if not self._due else max(0.0, self._due[0][0] - time.monotonic())
        for key, _ in selector.select(0 if self._posted else wait):
            if key.data is None:
                self._waker.clear()
            else:
                touched[key.data] = None
        while self._posted:
            touched[self._posted.popleft()] = None
        now = time.monotonic()
        while self._due and self._due[0][0] <= now:
            _, _, line = heapq.heappop(self._due)
            if line not in self._sockets:
                continue
            touched[line] = None
            try:
                again = now + line.tick()
            except Exception as error:
                self._close(line, selector, error)
                continue
            heapq.heappush(self._due, (again, next(self._count), line))
        for line in touched:
            if line not in self._sockets:
                continue
            try:
                if not line.work():
                    self._close(line, selector, None)
            except Exception as error:  # one engine's fault must not end all streams
                self._close(line, selector, error)

    def _close(
        self, line: Line, selector: selectors.BaseSelector, failure: Exception | None
    ) -> None:
        registered = [k for k in selector.get_map().values() if k.data is line]
        for key in registered:
            selector.unregister(key.fd)
        del self._sockets[line]
        self._shut(line, failure)

    def _end(self, failure: Exception | None) -> None:
        with self._lock:
            self._ended = True
            lines = [*self._sockets, *self._new]
            self._sockets, self._new = {}, []
        for line in lines:
            self._shut(line, failure)

    @staticmethod
    def _shut(line: Line, failure: Exception | None) -> None:
        if failure is not None:
            logger.error("the connection to an engine failed", exc_info=failure)
        try:
            line.shut(failure)
        except Exception:
            logger.exception("a connection could not be closed")


_lock = threading.Lock()
_loop: Loop | None = None


def loop_for(line: Line) -> Loop:
    """The loop of this process, which drives ``line`` from now on."""
    global _loop
    with _lock:
        if _loop is None or not _loop.add(line):
            _loop = Loop()
            _loop.add(line)
        return _loop


def _begin_again() -> None:
    """In a forked child: there is no such thread, and the lock may be held by nobody."""
    global _loop, _lock
    _loop, _lock = None, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_again)
