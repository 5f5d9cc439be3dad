"""Tokens in windows that roll: by half hour, in the database and in memory.

Half an hour counts until all of it is 24 hours ago, so nobody uses more than a limit within any 24
hours. Whoever calls `RollingTotals` holds a lock.
"""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from llmkit.store.tables import HalfHours

__all__ = ["HalfHourCounts", "RollingTotals", "add_half_hours", "read_half_hours"]

HALF_HOUR_S, WINDOW_S = 1800, 86_400
HalfHourCounts = dict[str, dict[int, int]]  # tokens by caller, and by half hours since the epoch


def add_half_hours(session: Session, counts: HalfHourCounts) -> None:
    """Add to what is there, and drop what no window has any more."""
    dialect = session.get_bind().dialect.name
    insert = postgresql.insert if dialect == "postgresql" else sqlite.insert
    newest = 0
    for caller, numbers in sorted(counts.items()):  # in order: two writers never lock up
        for number, tokens in sorted(numbers.items()):
            newest = max(newest, number)
            statement = insert(HalfHours).values(caller=caller, number=number, tokens=tokens)
            session.execute(
                statement.on_conflict_do_update(
                    index_elements=["caller", "number"],
                    set_={"tokens": HalfHours.tokens + statement.excluded.tokens},
                )
            )
    oldest = newest - 2 * WINDOW_S // HALF_HOUR_S  # clocks of several gateways may differ
    session.execute(sa.delete(HalfHours).where(HalfHours.number < oldest))


def read_half_hours(session: Session, first: int) -> HalfHourCounts:
    """From number ``first`` on."""
    query = sa.select(HalfHours.caller, HalfHours.number, HalfHours.tokens)
    found: HalfHourCounts = {}
    for caller, number, tokens in session.execute(query.where(HalfHours.number >= first)):
        found.setdefault(caller, {})[number] = tokens
    return found


class RollingTotals:
    """What was written, what is being written, and what is new.

    >>> totals = RollingTotals()
    >>> totals.count("ann", 0.0, 70)
    >>> totals.count("ann", 3600.0, 50)
    >>> totals.standing("ann", 3600.0, 100)  # the first half hour leaves after 24.5 hours
    (120, 84600.0)
    """

    def __init__(self) -> None:
        self._written: HalfHourCounts = {}
        self._moving: HalfHourCounts = {}
        self._new: HalfHourCounts = {}

    @staticmethod
    def first(now: float) -> int:
        """The oldest half hour that counts."""
        return int(now - WINDOW_S) // HALF_HOUR_S

    def count(self, caller: str, now: float, tokens: int) -> None:
        _add(self._new, {caller: {int(now) // HALF_HOUR_S: tokens}})

    def standing(self, caller: str, now: float, limit: int) -> tuple[int, float]:
        """The tokens of the window, and after how many seconds they are fewer than ``limit``."""
        first = self.first(now)
        counts: dict[int, int] = {}
        for part in (self._written, self._moving, self._new):
            for number, tokens in part.get(caller, {}).items():
                if number >= first:
                    counts[number] = counts.get(number, 0) + tokens
        used = left = sum(counts.values())
        free_at = now
        for number in sorted(counts):
            if left < limit:
                break
            left -= counts[number]
            free_at = (number + 1) * HALF_HOUR_S + WINDOW_S
        return used, max(0.0, free_at - now)

    def take(self) -> HalfHourCounts:
        """What is new, to be written."""
        self._moving, self._new = self._new, {}
        return self._moving

    def written(self) -> None:
        """It is."""
        _add(self._written, self._moving)
        self._moving = {}

    def take_back(self) -> None:
        """It could not be."""
        _add(self._new, self._moving)
        self._moving = {}

    def read(self, counts: HalfHourCounts) -> None:
        """What the database has, of all gateways."""
        self._written = counts


def _add(totals: HalfHourCounts, counts: HalfHourCounts) -> None:
    for caller, numbers in counts.items():
        of_caller = totals.setdefault(caller, {})
        for number, tokens in numbers.items():
            of_caller[number] = of_caller.get(number, 0) + tokens
