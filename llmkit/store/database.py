"""Opens the database, brings it to this version, and says clearly what is wrong with it.

SQLite in one file by default, PostgreSQL by URL. Any thread may use a `Database`. Imports
SQLAlchemy: whatever must start quickly imports this late.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import sqlite3
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import sqlalchemy as sa
from sqlalchemy.engine import URL, Connection, Engine
from sqlalchemy.orm import Session

from llmkit.errors import InvalidRequestError, StoreError
from llmkit.settings.values import masked
from llmkit.store.migrations import HEAD, VERSION_TABLE
from llmkit.store.place import default_path
from llmkit.system.reporting import report

__all__ = ["Database", "open_database"]

BUSY_S, MIGRATION_S = 10.0, 120.0
LEAST_BYTES = 1 << 20  # free, that SQLite can work with
ADVISORY_LOCK = 0x6C6C6D6B  # of PostgreSQL, while the tables are made
# Of PostgreSQL's client, unless the URL says otherwise: when a server counts as gone.
PATIENCE = {
    "connect_timeout": round(BUSY_S),
    "tcp_user_timeout": round(BUSY_S * 1000),
    "keepalives": 1,
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 3,
}
EXAMPLES = "sqlite:////path/to/llmkit.db or postgresql://user@host/name"
# What SQLite and PostgreSQL say, and what to do about it.
CAUSES = {
    "disk is full": "its disk is full; free some space and try again",
    "no space left": "its disk is full; free some space and try again",
    "disk i/o": "its disk reported an error; look at the system's log",
    "readonly": "it may not be written; check the owner and permissions of file and folder",
    "unable to open": "it may not be opened; check the owner and permissions of file and folder",
    "locked": "another program holds it; try again, or end that program",
    "not a database": "it is damaged, or no database; move it away or restore a backup",
    "malformed": "it is damaged; move it away or restore a backup",
    "statement timeout": "it took too long to answer; try again, or look at its load and locks",
    "no such table": "tables are missing; move it away or restore a backup",
}


class Database:
    """An open database of this version.

    ``place`` names it in messages, without a password. Raises `StoreError` whenever it cannot be
    read or written; then nothing was changed.
    """

    def __init__(self, engine: Engine, place: str) -> None:
        self.engine, self.place = engine, place
        self._writing = engine.execution_options(writes=True)
        self._relaxed = engine.execution_options(writes=True, relaxed=True)

    @contextlib.contextmanager
    def reading(self) -> Iterator[Session]:
        """A session to read with."""
        with self._explained(), Session(self.engine) as session:
            yield session

    @contextlib.contextmanager
    def writing(self, *, relaxed: bool = False) -> Iterator[Session]:
        """A session to write with: at its end all of it is on disk, or nothing. One at a time.

        With ``relaxed`` it does not wait for the disk: nothing is lost if the process is killed,
        but after a power failure the last seconds may be missing.
        """
        engine = self._relaxed if relaxed else self._writing
        with self._explained(), Session(engine) as session, session.begin():
            yield session

    @contextlib.contextmanager
    def connected(self, *, writes: bool = False, relaxed: bool = False) -> Iterator[Connection]:
        """`reading`, or with ``writes`` `writing`, without the cost of a session: one transaction,
        so all that is read was there at one moment (SQLite)."""
        engine = self.engine
        if writes:
            engine = self._relaxed if relaxed else self._writing
        with self._explained(), engine.begin() as connection:
            yield connection

    def upgrade(self) -> None:
        """Bring the tables to this version; others that start now wait for it."""
        with self._explained():
            with self.engine.connect() as connection:
                version = self._version(connection)
            if version == HEAD:
                return
            with self._writing.begin() as connection:
                if connection.dialect.name == "postgresql":
                    connection.exec_driver_sql("SET LOCAL statement_timeout = 0")
                    connection.execute(sa.select(sa.func.pg_advisory_xact_lock(ADVISORY_LOCK)))
                version = self._version(connection)
                if version != HEAD:
                    _migrate(connection, version, self.place)

    def _version(self, connection: Connection) -> str | None:
        if not sa.inspect(connection).has_table(VERSION_TABLE):
            return None
        query = sa.select(sa.column("version_num", sa.String)).select_from(sa.table(VERSION_TABLE))
        return connection.execute(query).scalar()

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (sa.exc.DBAPIError, sa.exc.TimeoutError, sqlite3.Error) as error:
            raise explained(error, self.place) from None

    def close(self) -> None:
        self.engine.dispose()


def explained(error: Exception, place: str) -> StoreError:
    """The driver's error, with what to do."""
    cause = str(getattr(error, "orig", None) or error).strip().partition("\n")[0]
    words = cause.lower()
    if "disk i/o" in words and _is_full(place):  # it had no room for its index
        words = "disk is full"
    advice = next((text for known, text in CAUSES.items() if known in words), "")
    return StoreError(
        f"the database {place} cannot be used: {advice} ({cause})."
        if advice
        else f"the database {place} cannot be used: {cause}"
    )


def _is_full(place: str) -> bool:
    try:
        return shutil.disk_usage(Path(place).parent).free < LEAST_BYTES
    except (OSError, ValueError):  # it is no file
        return False


def _migrate(connection: Connection, version: str | None, place: str) -> None:
    from alembic import command
    from alembic.config import Config
    from alembic.script import ScriptDirectory

    logging.getLogger("alembic").setLevel(logging.WARNING)
    config = Config(attributes={"connection": connection})
    config.set_main_option("script_location", str(Path(__file__).with_name("migrations")))
    known = {step.revision for step in ScriptDirectory.from_config(config).walk_revisions()}
    if version is not None and version not in known:
        raise StoreError(
            f"the database {place} was written by a newer llmkit ({version:.60}; this one knows "
            f"{HEAD}). It was left as it is: update llmkit, or give another place as db_url."
        )
    command.upgrade(config, "head")


def open_database(url: str | None = None, *, create: bool = True) -> Database:
    """Open a database, and bring it to this version; ``create`` makes a file that is not there.

    Raises `InvalidRequestError` for a ``url`` that names none, and `StoreError`.
    """
    if url is None:
        path = default_path()
        if create:
            try:
                path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            except OSError as error:
                raise _cannot(path, error) from None
        database = _sqlite(path, create)
    else:
        parsed = _parse(url)
        database = (
            _sqlite(Path(parsed.database or "").absolute(), create)
            if parsed.get_backend_name() == "sqlite"
            else _postgresql(parsed)
        )
    try:
        database.upgrade()
    except BaseException:
        database.close()
        raise
    return database


def _parse(url: str) -> URL:
    try:
        parsed = sa.make_url(url)
    except (sa.exc.ArgumentError, ValueError):
        raise InvalidRequestError(f"db_url must be like {EXAMPLES}.", "db_url") from None
    if parsed.drivername not in ("sqlite", "postgresql", "postgresql+psycopg"):
        message = f"db_url begins with {parsed.drivername!r:.40}; it must be like {EXAMPLES}."
        raise InvalidRequestError(message, "db_url")
    if parsed.drivername == "sqlite" and (
        parsed.database in (None, "", ":memory:") or parsed.host or parsed.query
    ):
        message = (
            "db_url of SQLite names a file, with three slashes before a relative path and four "
            "before an absolute one, and no parameters: sqlite:////path/to/llmkit.db."
        )
        raise InvalidRequestError(message, "db_url")
    return parsed


def _postgresql(url: URL) -> Database:
    """A server that is gone, or a network that swallows packets, is an error after ten seconds."""
    place = masked(url.render_as_string(hide_password=True))
    own = {name: value for name, value in PATIENCE.items() if name not in url.query}
    try:
        engine = sa.create_engine(
            url.set(drivername="postgresql+psycopg"),
            pool_pre_ping=True,
            connect_args={"application_name": "llmkit", **own},
        )
    except ImportError:
        message = "PostgreSQL needs a driver: pip install 'llmkit[postgres]'."
        raise InvalidRequestError(message, "db_url") from None

    @sa.event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        # Not when connecting: PgBouncer refuses that, and hands connections on after each commit.
        connection.exec_driver_sql(f"SET LOCAL statement_timeout = {round(BUSY_S * 1000)}")
        if connection.get_execution_options().get("relaxed"):
            connection.exec_driver_sql("SET LOCAL synchronous_commit = off")

    return Database(engine, place)


def _cannot(path: Path, error: OSError) -> StoreError:
    return StoreError(
        f"the database {path} cannot be opened ({error.strerror or error}); "
        "give another place as db_url."
    )


def _sqlite(path: Path, create: bool) -> Database:
    if not create and not path.exists():
        raise StoreError(f"there is no database {path}; `llmkit keys add` makes it.")
    try:
        _guard(path)
    except OSError as error:
        raise _cannot(path, error) from None

    def connect() -> sqlite3.Connection:
        # "rw": a file that was moved away is an error, not an empty database in its place.
        return sqlite3.connect(
            f"file:{quote(str(path))}?mode=rw", uri=True, timeout=BUSY_S, check_same_thread=False
        )

    engine = sa.create_engine("sqlite://", creator=connect, poolclass=sa.QueuePool)

    @sa.event.listens_for(engine, "connect")
    def set_up(connection: Any, _: object) -> None:
        connection.isolation_level = None  # else the driver begins transactions when it likes
        connection.execute("PRAGMA foreign_keys=ON")
        connection.create_function("llmkit_holds", 2, _holds, deterministic=True)

    @sa.event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        options = connection.get_execution_options()
        if options.get("writes"):  # FULL: committed means on disk
            level = "NORMAL" if options.get("relaxed") else "FULL"
            if connection.info.get("synchronous") != level:
                connection.exec_driver_sql(f"PRAGMA synchronous={level}")
                connection.info["synchronous"] = level
        driver: Any = connection.connection.driver_connection
        driver.execute("BEGIN IMMEDIATE" if options.get("writes") else "BEGIN")

    try:
        _use_wal(connect)
    except sqlite3.Error as error:
        raise explained(error, str(path)) from None
    return Database(engine, str(path))


def _holds(text: str | None, folded: str) -> bool:
    """Whether a text holds another, which is case-folded; SQLite itself folds ASCII only."""
    return text is not None and folded in text.casefold()


def _guard(path: Path) -> None:
    """Create the file for its owner alone; refuse one that everyone may write."""
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
    descriptor = os.open(path, flags, 0o600)
    try:
        status = os.fstat(descriptor)
    finally:
        os.close(descriptor)
    if not stat.S_ISREG(status.st_mode):
        raise OSError(f"{path} is not a regular file")
    if os.name != "posix":
        return
    if status.st_mode & 0o002:
        message = f"the database {path} is writable by everyone; run `chmod 600 {path}` first."
        raise StoreError(message)
    if status.st_mode & 0o004:
        report(f"the database {path} is readable by everyone: chmod 600 {path}")


def _use_wal(connect: Callable[[], sqlite3.Connection]) -> None:
    """Readers and the writer do not wait for each other. A property of the file.

    SQLite does not wait for the lock of this one change, so two that start at once would fail.
    """
    end = time.monotonic() + BUSY_S
    with contextlib.closing(connect()) as connection:
        while connection.execute("PRAGMA journal_mode").fetchone()[0] != "wal":
            try:
                connection.execute("PRAGMA journal_mode=WAL")
            except sqlite3.OperationalError as error:
                if "locked" not in str(error) or time.monotonic() > end:
                    raise
                time.sleep(0.02)
