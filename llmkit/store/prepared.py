"""Statements that every turn executes, compiled once.

For SQLite they go straight to the driver: SQLAlchemy takes several times as long as the database,
and a client waits for both.
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

from sqlalchemy.dialects import sqlite
from sqlalchemy.engine import Connection

__all__ = ["Prepared"]

Values = Mapping[str, Any]
Process = Callable[[Any], Any]
SQLITE = sqlite.dialect()


class Compiled(NamedTuple):
    """A statement in SQLite's words.

    ``parameters`` are in their order, each with what the driver is to get of its value; ``fixed``
    are the values of some. ``results`` are columns of which something else is made, by index.
    """

    sql: str
    parameters: list[tuple[str, Process | None]]
    fixed: dict[str, Any]
    row: Callable[[Sequence[Any]], Any]
    results: list[tuple[int, Process]]

    def bound(self, values: Values) -> list[Any]:
        """The parameters for the driver."""
        given = {**self.fixed, **values}
        return [
            given[n] if process is None else process(given[n]) for n, process in self.parameters
        ]

    def read(self, found: Sequence[Any]) -> Any:
        """A row of the driver's as a named tuple."""
        if self.results:
            found = [*found]
            for index, process in self.results:
                found[index] = process(found[index])
        return self.row(found)


class Prepared:
    """A statement of SQLAlchemy's. An INSERT or UPDATE without values sets ``columns``.

    ``values`` are those of its parameters and ``columns``, by name; none may be missing. All
    methods work within the transaction that the connection has begun, and raise what SQLAlchemy
    raises, or `sqlite3.Error`.
    """

    def __init__(self, statement: Any, columns: Sequence[str] | None = None) -> None:
        self._statement, self._columns = statement, columns

    @cached_property
    def _compiled(self) -> Compiled:
        compiled = self._statement.compile(dialect=SQLITE, column_keys=self._columns)
        columns = [*getattr(self._statement, "selected_columns", ())]
        names = [column.key for column in columns]
        row: Any = namedtuple("Row", names, rename=True)  # type: ignore[misc]
        return Compiled(
            str(compiled),
            [
                (name, compiled.binds[name].type.dialect_impl(SQLITE).bind_processor(SQLITE))
                for name in compiled.positiontup
            ],
            {
                name: bind.value
                for name, bind in compiled.binds.items()
                if bind.value is not None and not bind.required
            },
            row._make,
            [
                (index, process)
                for index, column in enumerate(columns)
                if (process := column.type.dialect_impl(SQLITE).result_processor(SQLITE, None))
            ],
        )

    def rows(self, connection: Connection, values: Values) -> Sequence[Any]:
        """The rows that it finds, as named tuples."""
        driver = _sqlite(connection)
        if driver is None:
            return connection.execute(self._statement, values).all()
        compiled = self._compiled
        found = driver.execute(compiled.sql, compiled.bound(values)).fetchall()
        return [compiled.read(row) for row in found]

    def first(self, connection: Connection, values: Values) -> Any:
        """The first row that it finds; None if there is none."""
        return next(iter(self.rows(connection, values)), None)

    def run(self, connection: Connection, values: Values) -> int:
        """How many rows it changed."""
        driver = _sqlite(connection)
        if driver is None:
            return connection.execute(self._statement, values).rowcount
        compiled = self._compiled
        return int(driver.execute(compiled.sql, compiled.bound(values)).rowcount)

    def run_all(self, connection: Connection, values: Sequence[Values]) -> None:
        """Run it with each of many ``values``."""
        driver = _sqlite(connection)
        if driver is None:
            connection.execute(self._statement, values)
        else:
            compiled = self._compiled
            driver.executemany(compiled.sql, [compiled.bound(each) for each in values])


def _sqlite(connection: Connection) -> Any:
    """The driver's connection if that is SQLite's."""
    if connection.dialect.name != SQLITE.name:
        return None
    return connection.connection.driver_connection
