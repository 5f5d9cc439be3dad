"""The thread that encodes images and sounds, beside the engine's."""

from __future__ import annotations

import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import cast

import numpy as np

from llmkit.backend.media import Prepared, Projector
from llmkit.engine.encoding import Encoded
from llmkit.engine.media import Item

__all__ = ["MediaEncoder", "Preparations", "Source"]


class Preparations:
    """What is ready to be encoded, by a key: the latest, within ``max_bytes`` unless one alone is
    larger. Any thread."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._kept: OrderedDict[bytes, tuple[Prepared, int, set[int]]] = OrderedDict()
        self._lock = threading.Lock()
        self.num_bytes = 0

    def add(self, key: bytes, prepared: Prepared, num_bytes: int) -> None:
        with self._lock:
            self._drop(key)
            self._kept[key] = prepared, num_bytes, set(range(len(prepared.chunks)))
            self.num_bytes += num_bytes
            while self.num_bytes > self._max_bytes and len(self._kept) > 1:
                self._drop(next(iter(self._kept)))

    def get(self, key: bytes) -> Prepared | None:
        with self._lock:
            if key not in self._kept:
                return None
            self._kept.move_to_end(key)
            return self._kept[key][0]

    def encoded(self, key: bytes, ordinal: int) -> None:
        """Drop what was prepared, once all of it is encoded."""
        with self._lock:
            left = self._kept[key][2] if key in self._kept else {ordinal}
            left.discard(ordinal)
            if not left:
                self._drop(key)

    def _drop(self, key: bytes) -> None:
        if key in self._kept:
            self.num_bytes -= self._kept.pop(key)[1]


@dataclass(frozen=True, slots=True)
class Source:
    """An image or sound of a request. ``read`` decodes its file again, where what was prepared of
    it is not kept, or was encoded and is wanted once more."""

    kind: str
    key: bytes
    read: Callable[[], np.ndarray]
    kept: Preparations

    def prepared(self, projector: Projector) -> Prepared:
        found = self.kept.get(self.key)
        if found is None:
            content = self.read()
            parts, found = projector.prepare(self.kind, content)
            self.kept.add(self.key, found, projector.prepared_bytes(content, parts))
        return found


class MediaEncoder:
    """Implements `Encoder` over a `Projector`. The ``source`` of an item is a `Source` and which
    of its items this is. ``turns`` is held while it encodes."""

    def __init__(
        self, projector: Projector, turns: AbstractContextManager[None] | None = None
    ) -> None:
        self._projector = projector
        self._turns = turns or nullcontext()
        self._queue: queue.SimpleQueue[tuple[Item, Callable[[Encoded], None]] | None] = (
            queue.SimpleQueue()
        )
        self._closed = False
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._then: Callable[[], None] | None = None  # when it has ended
        threading.Thread(target=self._run, name="llmkit-encoder", daemon=True).start()

    def encode(self, item: Item, done: Callable[[Encoded], None]) -> None:
        self._queue.put((item, done))

    def _run(self) -> None:
        while (message := self._queue.get()) is not None and not self._closed:
            item, done = message
            began = time.perf_counter()
            result: object
            try:
                result = self._encode(item)
            except Exception as error:  # ends the requests that want it
                result = error
            done(Encoded(item, result, time.perf_counter() - began))
            del message, item, done, result
        with self._lock:
            self._ended.set()
            then = self._then
        if then is not None:
            then()

    def _encode(self, item: Item) -> object:
        source, ordinal = cast("tuple[Source, int]", item.source)
        prepared = source.prepared(self._projector)
        with self._turns:
            embeddings = self._projector.encode(prepared.chunks[ordinal])
        source.kept.encoded(source.key, ordinal)
        return embeddings

    def close(self, timeout: float, then: Callable[[], None]) -> bool:
        """Stop the thread, and do ``then`` when nothing is encoded any more. False if something
        still is after so many seconds: ``then`` is left to the encoder's thread."""
        self._closed = True
        self._queue.put(None)
        self._ended.wait(timeout)
        with self._lock:
            if not self._ended.is_set():
                self._then = then
                return False
        then()
        return True
