"""Statements that go straight to SQLite's driver: what SQLAlchemy makes of the same, one moment for
all that a reader sees, and nothing left out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from llmkit.protocol import Message
from llmkit.store import conversation_statements as statements
from llmkit.store.conversation_records import NewMessage
from llmkit.store.conversation_rows import message_values
from llmkit.store.conversations import ConversationStore
from llmkit.store.database import Database, open_database
from llmkit.store.prepared import Prepared

READING = [
    name
    for name, value in vars(statements).items()
    if isinstance(value, Prepared) and isinstance(value._statement, sa.Select)
]


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    opened = open_database(f"sqlite:///{tmp_path}/llmkit.db")
    yield opened
    opened.close()


@pytest.fixture
def asked(database: Database) -> dict[str, Any]:
    """The parameters of all statements that read, for a conversation with a running reply."""
    store = ConversationStore(database)
    known = store.create("ann", settings={"temperature": 0.5}, messages=[Message("system", "s")])
    said = store.begin_turn("ann", known.id, messages=[Message("user", "hi")], model="m")
    return {"conversation": known.id, "here": known.id, "message": said[-1].id, "most": 10}


@pytest.mark.parametrize("name", READING)
def test_reads_what_sqlalchemy_reads(database: Database, asked: dict[str, Any], name: str) -> None:
    prepared = getattr(statements, name)
    key = "conversation" if name in ("FIND", "FIND_LOCKED") else "message"
    values = {**asked, "of": asked[key]}
    with database.connected() as connection:
        ours = prepared.rows(connection, values)
        theirs = connection.execute(prepared._statement, values).all()
    assert [tuple(row) for row in ours] == [tuple(row) for row in theirs] and ours
    assert [row._fields for row in ours] == [row._fields for row in theirs]
    assert [[*map(type, row)] for row in ours] == [[*map(type, row)] for row in theirs]


@pytest.mark.parametrize("name", ["SAVE_USE", "FILL_REPLY", "LEASE", "USE"])
def test_a_value_that_is_missing_is_an_error(database: Database, name: str) -> None:
    with pytest.raises((KeyError, sa.exc.StatementError)), database.connected(writes=True) as c:
        getattr(statements, name).run(c, {"of": "x"})


def test_all_of_a_message_is_stored() -> None:
    values = message_values(NewMessage("assistant", "hello"))
    assert set(values) == set(statements.MESSAGE_FIELDS)


def test_a_reader_sees_one_moment(database: Database, asked: dict[str, Any]) -> None:
    """Whatever is written between two of its statements."""
    with database.connected() as connection:
        assert connection.in_transaction()
        row = statements.FIND.first(connection, {"of": asked["here"]})
        with database.connected(writes=True) as other:
            other.execute(sa.update(statements.CONVERSATIONS).values(title="changed", version=99))
        again = statements.FIND.first(connection, {"of": asked["here"]})
        assert again == row and again.version != 99
    with database.connected() as connection:
        assert statements.FIND.first(connection, {"of": asked["here"]}).version == 99
