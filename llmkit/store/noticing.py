"""Notices that a database was changed, for a fraction of what a query costs. Any thread."""

from __future__ import annotations

import contextlib
import os
import threading
from pathlib import Path

import sqlalchemy as sa

from llmkit.store.database import Database

__all__ = ["Notice"]


class Notice:
    """Whether anybody may have committed since the last look.

    SQLite counts the commits of other connections (``PRAGMA data_version``); a file that was
    replaced counts as changed. Where that can't be asked the answer is always yes.
    """

    def __init__(self, database: Database) -> None:
        self._engine = database.engine
        self._path = Path(database.place) if self._engine.dialect.name == "sqlite" else None
        self._connection: sa.PoolProxiedConnection | None = None
        self._seen: object = None
        self._lock = threading.Lock()

    def changed(self) -> bool:
        if self._path is None:
            return True
        with self._lock:
            try:
                if self._connection is None:
                    self._connection = self._engine.raw_connection()
                    self._connection.detach()  # never another's, who would see no change of its own
                status = os.stat(self._path)
                cursor = self._connection.cursor()
                (version,) = cursor.execute("PRAGMA data_version").fetchone()
                now = status.st_dev, status.st_ino, version
            except Exception:  # whatever it is, the query that follows says it better
                self._drop()
                return True
            changed, self._seen = now != self._seen, now
            return changed

    def _drop(self) -> None:
        connection, self._connection, self._seen = self._connection, None, None
        if connection is not None:
            with contextlib.suppress(Exception):
                connection.close()

    def close(self) -> None:
        with self._lock:
            self._drop()
