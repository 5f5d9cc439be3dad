"""The thread that encodes images and sounds, beside the engine's."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import cast

import numpy as np

from llmkit.backend.media import Prepared, Projector
from llmkit.engine.encoding import Encoded
from llmkit.engine.media import Item

__all__ = ["MediaEncoder", "Source"]


class Source:
    """An image or sound of a request. ``read`` decodes its file; that is done again only when what
    was ``prepared`` of it has been encoded, and is wanted once more."""

    def __init__(
        self, kind: str, read: Callable[[], np.ndarray], prepared: Prepared | None = None
    ) -> None:
        self._kind = kind
        self._read = read
        self._prepared = prepared
        self._left: set[int] = set()

    def chunk(self, projector: Projector, ordinal: int) -> object:
        """The libmtmd chunk of one of its items, which lives until ``encoded``."""
        if self._prepared is None:
            self._prepared = projector.prepare(self._kind, self._read())[1]
        return self._prepared.chunks[ordinal]

    def encoded(self, ordinal: int) -> None:
        """Drop what was prepared, once all of it is encoded."""
        if self._prepared is not None:
            self._left = self._left or set(range(len(self._prepared.chunks)))
            self._left.discard(ordinal)
            if not self._left:
                self._prepared = None


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
        self._ended.set()

    def _encode(self, item: Item) -> object:
        source, ordinal = cast("tuple[Source, int]", item.source)
        chunk = source.chunk(self._projector, ordinal)
        with self._turns:
            embeddings = self._projector.encode(chunk)
        source.encoded(ordinal)
        return embeddings

    def close(self, timeout: float) -> bool:
        """Stop the thread. False if it is still encoding after so many seconds: the projector must
        not be freed then."""
        self._closed = True
        self._queue.put(None)
        return self._ended.wait(timeout)
