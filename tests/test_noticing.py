"""Changes of the database are noticed without asking for them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

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
