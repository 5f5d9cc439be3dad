"""What callers used, by day (UTC) and model, and how much of it counts for budgets and quotas.

Requests are counted in memory and written by one thread every few seconds, so no request waits for
a disk. Any thread may use it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from datetime import date

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from llmkit.errors import StoreError
from llmkit.store.database import Database
from llmkit.store.keys import KeyStore
from llmkit.store.records import Spending
from llmkit.store.rolling import HalfHourCounts, RollingTotals, add_half_hours, read_half_hours
from llmkit.store.tables import Usage

__all__ = ["UsageStore", "UsageWriter"]

logger = logging.getLogger("llmkit.gateway")

FLUSH_S = 2.0
READ_S = 10.0  # between looks at what others wrote, while there is nothing to write
COUNTS = ("requests", "prompt_tokens", "cached_tokens", "completion_tokens", "seconds")
MAX_NAME = 255

Entries = dict[str, dict[tuple[date, str], Spending]]  # by caller, then by day and model
Totals = dict[str, dict[date, int]]  # tokens of each caller, by day


class UsageStore:
    """The table of usage. Raises `StoreError`."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def add(self, entries: Entries, half_hours: HalfHourCounts | None = None) -> None:
        """Add to what is there, all or nothing."""
        with self._database.writing() as session:
            if half_hours:
                add_half_hours(session, half_hours)
            for caller, spent in sorted(entries.items()):  # in order: two writers never lock up
                for (day, model), spending in sorted(spent.items()):
                    _add(session, caller[:MAX_NAME], day, model[:MAX_NAME], spending)

    def tokens(self, since: date) -> Totals:
        """The tokens of each caller in each day from ``since`` on."""
        query = (
            sa.select(
                Usage.caller, Usage.day, sa.func.sum(Usage.prompt_tokens + Usage.completion_tokens)
            )
            .where(Usage.day >= since)
            .group_by(Usage.caller, Usage.day)
        )
        found: Totals = {}
        with self._database.reading() as session:
            for caller, day, tokens in session.execute(query):
                found.setdefault(caller, {})[day] = int(tokens)
        return found

    def half_hours(self, first: int) -> HalfHourCounts:
        """The tokens of each caller in each half hour from number ``first`` on."""
        with self._database.reading() as session:
            return read_half_hours(session, first)

    def rows(self, since: date, caller: str | None = None) -> list[tuple[str, date, str, Spending]]:
        """Caller, day, model and spending, newest day first; of all callers, or of one."""
        columns = [getattr(Usage, name) for name in COUNTS]
        query = (
            sa.select(Usage.caller, Usage.day, Usage.model, *columns)
            .where(Usage.day >= since)
            .order_by(Usage.day.desc(), Usage.caller, Usage.model)
        )
        if caller is not None:
            query = query.where(Usage.caller == caller[:MAX_NAME])
        with self._database.reading() as session:
            return [(who, day, model, Spending(*counts))
                    for who, day, model, *counts in session.execute(query)]  # fmt: skip


def _add(session: Session, caller: str, day: date, model: str, spending: Spending) -> None:
    dialect = session.get_bind().dialect.name
    insert = postgresql.insert if dialect == "postgresql" else sqlite.insert
    counts = {name: getattr(spending, name) for name in COUNTS}
    statement = insert(Usage).values(caller=caller, day=day, model=model, **counts)
    session.execute(
        statement.on_conflict_do_update(
            index_elements=["caller", "day", "model"],
            set_={name: getattr(Usage, name) + statement.excluded[name] for name in COUNTS},
        )
    )


class UsageWriter:
    """Counts usage in memory and writes it down, on a thread of its own.

    What other gateways wrote into the same database counts as well, some seconds later. While the
    database cannot be written, nothing is forgotten, and that is said once. ``today`` gives the day
    (UTC), ``now`` seconds since the epoch: with it tokens are counted in rolling windows too.
    Raises `StoreError` if the database cannot be read at the start.
    """

    def __init__(
        self,
        usage: UsageStore,
        keys: KeyStore,
        today: Callable[[], date],
        every_s: float = FLUSH_S,
        now: Callable[[], float] | None = None,
    ) -> None:
        self._usage, self._keys = usage, keys
        self._now = now
        self._rolling = None if now is None else RollingTotals()
        self._today, self._every_s = today, every_s
        self._lock = threading.Lock()
        self._new: Entries = {}  # not yet being written
        self._moving: Entries = {}  # being written
        self._used: dict[str, float] = {}  # when keys were last used
        self._written = usage.tokens(today().replace(day=1))
        self._read_half_hours()
        self._flushing = threading.Lock()
        self._read_at = time.monotonic()
        self._has_failed = False
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="llmkit-usage", daemon=True)
        self._thread.start()

    def add(self, caller: str, model: str, spending: Spending) -> None:
        """Count a request of today."""
        key = (self._today(), model)
        with self._lock:
            self._new.setdefault(caller, {}).setdefault(key, Spending()).add(spending)
            if self._rolling is not None and self._now is not None:
                self._rolling.count(caller[:MAX_NAME], self._now(), spending.total_tokens)

    def in_window(self, caller: str, limit: int) -> tuple[int, float]:
        """A caller's tokens of the last 24 hours, and after how many seconds they are fewer than
        ``limit``; nothing without ``now``."""
        if self._rolling is None or self._now is None:
            return 0, 0.0
        with self._lock:
            return self._rolling.standing(caller[:MAX_NAME], self._now(), limit)

    def rows(self, since: date, caller: str | None = None) -> list[tuple[str, date, str, Spending]]:
        """As `UsageStore.rows`, with what was not written yet. Waits for the disk."""
        with self._lock:
            parts = (self._new, self._moving)
            is_new = any(part if caller is None else part.get(caller) for part in parts)
        if is_new:  # waits for what is being written
            self.flush()
        return self._usage.rows(since, caller)

    def note_use(self, sha256: str, time: float) -> None:
        """Note when a key was used, by `KeyRecord.sha256`."""
        with self._lock:
            self._used[sha256] = time

    def tokens(self, caller: str, day: date) -> tuple[int, int]:
        """A caller's tokens of this day, and of its month."""
        with self._lock:
            counts = list(self._written.get(caller, {}).items())
            for entries in (self._moving, self._new):
                if caller in entries:
                    counts += [(d, s.total_tokens) for (d, _), s in entries[caller].items()]
        month = (day.year, day.month)
        return (
            sum(number for d, number in counts if d == day),
            sum(number for d, number in counts if (d.year, d.month) == month),
        )

    def flush(self) -> bool:
        """Write what is new and read what others wrote. False if that failed; nothing is lost."""
        with self._flushing:
            return self._flush()

    def _flush(self) -> bool:
        rolling = self._rolling
        with self._lock:
            self._moving, self._new = self._new, {}
            used, self._used = self._used, {}
            half_hours = None if rolling is None else rolling.take()
        try:
            if self._moving:
                if half_hours is None:
                    self._usage.add(self._moving)
                else:
                    self._usage.add(self._moving, half_hours)
                with self._lock:
                    _merge(self._written, self._moving)
                    self._moving = {}
                    if rolling is not None:
                        rolling.written()
            if used:
                self._keys.note_use(used)
                used = {}
            written = self._usage.tokens(self._today().replace(day=1))
            self._read_half_hours()
        except Exception as error:  # whatever it is, nothing is lost and the thread goes on
            self._take_back(used)
            if not self._has_failed:
                logger.error(
                    "usage is only in memory until this is mended: %s",
                    error,
                    exc_info=not isinstance(error, StoreError),
                )
            self._has_failed = True
            return False
        with self._lock:
            self._written, self._read_at = written, time.monotonic()
        if self._has_failed:
            logger.warning("usage is written down again")
        self._has_failed = False
        return True

    def _take_back(self, used: dict[str, float]) -> None:
        with self._lock:
            for caller, spent in self._moving.items():
                ours = self._new.setdefault(caller, {})
                for key, spending in spent.items():
                    ours.setdefault(key, Spending()).add(spending)
            self._moving = {}
            self._used = used | self._used
            if self._rolling is not None:
                self._rolling.take_back()

    def _read_half_hours(self) -> None:
        if self._rolling is None or self._now is None:
            return
        found = self._usage.half_hours(RollingTotals.first(self._now()))
        with self._lock:
            self._rolling.read(found)

    def _run(self) -> None:
        while not self._end.wait(self._every_s):
            if self._new or self._used or time.monotonic() - self._read_at >= READ_S:
                self.flush()

    def close(self) -> None:
        """Write the rest, and end the thread."""
        self._end.set()
        self._thread.join()
        if not self.flush():
            tokens = sum(s.total_tokens for spent in self._new.values() for s in spent.values())
            logger.error("the usage of the last requests (%d tokens) was not written down", tokens)


def _merge(totals: Totals, entries: Entries) -> None:
    for caller, spent in entries.items():
        days = totals.setdefault(caller, {})
        for (day, _), spending in spent.items():
            days[day] = days.get(day, 0) + spending.total_tokens
