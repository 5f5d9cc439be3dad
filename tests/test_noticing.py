"""Changes of the database are noticed without asking for them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from llmkit.errors import StoreError
from llmkit.store.database import Database, open_database
from llmkit.store.keys import KeyStore
from llmkit.store.noticing import Notice
from llmkit.store.records import KeyRecord, digest


def add(database: Database, name: str) -> None:
    KeyStore(database).add(KeyRecord(name, digest(name)))


def test_commits_of_any_connection_are_noticed(tmp_path: Path, database: Database) -> None:
    notice = Notice(database)
    assert notice.changed(), "the first look"
    assert not notice.changed()
    KeyStore(database).all()
    assert not notice.changed(), "reading changes nothing"
    add(database, "ann")
    assert notice.changed() and not notice.changed()
    other = open_database(f"sqlite:///{tmp_path}/llmkit.db")
    add(other, "bob")
    other.close()
    assert notice.changed() and not notice.changed()
    notice.close()
    assert notice.changed(), "after a pause"
    notice.close()


@pytest.mark.parametrize("was_looked_at", [False, True])
@pytest.mark.parametrize("is_gone_first", [False, True])
def test_of_a_file_that_was_replaced_the_new_one_is_read(
    tmp_path: Path, database: Database, is_gone_first: bool, was_looked_at: bool
) -> None:
    add(database, "ann")
    notice = Notice(database)
    assert not was_looked_at or (notice.changed() and not notice.changed())
    other = open_database(f"sqlite:///{tmp_path}/other.db")
    add(other, "bob")
    other.close()  # which leaves one file
    for file in ("llmkit.db-wal", "llmkit.db-shm"):  # they are the old one's
        (tmp_path / file).unlink()
    if is_gone_first:
        (tmp_path / "llmkit.db").unlink()
        assert notice.changed()
        with pytest.raises(StoreError, match="may not be opened"):
            KeyStore(database).all()
    os.replace(tmp_path / "other.db", tmp_path / "llmkit.db")
    assert notice.changed()
    assert [record.name for record in KeyStore(database).all()] == ["bob"]
    again = open_database(f"sqlite:///{tmp_path}/llmkit.db")
    KeyStore(again).revoke("bob", 1.0)
    again.close()
    assert notice.changed() and KeyStore(database).all()[0].revoked_at == 1.0
    notice.close()


def test_a_file_that_is_replaced_or_gone_is_a_change(tmp_path: Path, database: Database) -> None:
    notice = Notice(database)
    assert notice.changed() and not notice.changed()
    path = tmp_path / "llmkit.db"
    shutil.copy(path, tmp_path / "copy.db")
    os.replace(tmp_path / "copy.db", path)
    assert notice.changed()
    path.unlink()
    assert notice.changed() and notice.changed(), "the query says what is wrong"
    notice.close()
