"""Fixtures: a conversation store on SQLite and on a real PostgreSQL, and its clock."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from postgres_server import PROGRAMS, postgres_server

from llmkit.store.conversations import ConversationStore
from llmkit.store.database import Database, open_database
from llmkit.store.tables import Table


@pytest.fixture(scope="module")
def server() -> Iterator[Callable[[], str]]:
    """The URL of a PostgreSQL that is started when it is first asked for."""
    with ExitStack() as stack:
        known: list[str] = []

        def url() -> str:
            if not PROGRAMS:
                pytest.skip("PostgreSQL is not installed")
            if not known:
                known.append(stack.enter_context(postgres_server()))
            return known[0]

        yield url


@pytest.fixture(params=["sqlite", "postgresql"])
def opened(
    request: pytest.FixtureRequest, tmp_path: Path, server: Callable[[], str]
) -> Iterator[Database]:
    is_file = request.param == "sqlite"
    found = open_database(f"sqlite:///{tmp_path}/llmkit.db" if is_file else server())
    with found.writing() as session:
        for table in reversed(Table.metadata.sorted_tables):
            session.execute(sa.delete(table))
    yield found
    found.close()


class Clock:
    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        self.now += 0.001
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(opened: Database, clock: Clock) -> ConversationStore:
    return ConversationStore(opened, now=clock)


def texts(messages: Any) -> list[str]:
    return [m.content for m in messages]
