"""Watches the keys of the database, on a thread: a revoked one is known within half a second."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence

from llmkit.errors import StoreError
from llmkit.store.keys import KeyStore
from llmkit.store.records import KeyRecord

__all__ = ["KeyWatch"]

logger = logging.getLogger("llmkit.gateway")

POLL_S = 0.4


class KeyWatch:
    """The ``records`` of all keys as they are now; once started, ``on_change`` hears of others.

    While the database cannot be read, the last known keys count, and that is said once. Raises
    `StoreError` if it cannot be read at the start.
    """

    def __init__(self, store: KeyStore, every_s: float = POLL_S) -> None:
        self._store, self._every_s = store, every_s
        self._notice = store.notice()
        self._version = store.version()
        self.records: Sequence[KeyRecord] = store.all()
        self._has_failed = False
        self._end = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, on_change: Callable[[Sequence[KeyRecord]], None]) -> None:
        """Call ``on_change`` on the thread whenever any process has changed a key."""
        self._thread = threading.Thread(
            target=self._run, args=(on_change,), name="llmkit-keys", daemon=True
        )
        self._thread.start()

    def _run(self, on_change: Callable[[Sequence[KeyRecord]], None]) -> None:
        while not self._end.wait(self._every_s):
            if not self._notice.changed() and not self._has_failed:
                continue
            try:
                version = self._store.version()
                if version != self._version:
                    self.records = self._store.all()
                    on_change(self.records)
                    self._version = version
                if self._has_failed:
                    self._has_failed = False
                    logger.warning("the keys can be read again")
            except Exception as error:  # whatever it is, the thread goes on and tries again
                if not self._has_failed:
                    self._has_failed = True
                    logger.error(
                        "keys stay as they were until this is mended: %s",
                        error,
                        exc_info=not isinstance(error, StoreError),
                    )

    def close(self) -> None:
        self._end.set()
        if self._thread is not None:
            self._thread.join()
        self._notice.close()
