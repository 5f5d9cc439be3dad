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

    SQLite counts the commits of other connections (``PRAGMA data_version``). A file that was
    replaced, by a backup say, counts as changed, and all connections to the old one are let go:
    they would go on reading it. Where that can't be asked the answer is always yes.
    """

    def __init__(self, database: Database) -> None:
        self._engine = database.engine
        self._path = Path(database.place) if self._engine.dialect.name == "sqlite" else None
        self._connection: sa.PoolProxiedConnection | None = None
        self._seen: int | None = None  # the number of commits
        self._file = self._look()
        self._lock = threading.Lock()

    def changed(self) -> bool:
        if self._path is None:
            return True
        with self._lock:
            try:
                if (file := self._look()) != self._file or file is None:
                    self._file = file
                    self._let_go()
                    return True
                if self._connection is None:
                    self._connection = self._engine.raw_connection()
                    self._connection.detach()  # never another's, who would see no change of its own
                cursor = self._connection.cursor()
                commits: int = cursor.execute("PRAGMA data_version").fetchone()[0]
            except Exception:  # whatever it is, the query that follows says it better
                self._let_go()
                return True
            changed, self._seen = commits != self._seen, commits
            return changed

    def _look(self) -> tuple[int, int] | None:
        """Which file it is; None if there is none."""
        try:
            status = os.stat(self._path or "")
        except OSError:
            return None
        return status.st_dev, status.st_ino

    def _let_go(self) -> None:
        self._engine.dispose()
        self._drop()

    def _drop(self) -> None:
        connection, self._connection, self._seen = self._connection, None, None
        if connection is not None:
            with contextlib.suppress(Exception):
                connection.close()

    def close(self) -> None:
        with self._lock:
            self._drop()
