"""The database: what can be wrong with it, and what is not lost."""

from __future__ import annotations

import os
import re
import sqlite3
import stat
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from access_client import add_key

from llmkit.errors import InvalidRequestError, StoreError
from llmkit.store import database as database_module
from llmkit.store.database import Database, default_path, open_database
from llmkit.store.keys import KeyStore
from llmkit.store.migrations import HEAD
from llmkit.store.records import KeyRecord, digest, is_generated, new_secret
from llmkit.store.tables import Table


def url_of(folder: Path) -> str:
    return f"sqlite:///{folder}/llmkit.db"


class TestDatabase:
    """What can be wrong with it, and that nothing is lost."""

    def test_only_its_owner_may_read_it(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
        before = os.umask(0)
        try:
            open_database().close()
        finally:
            os.umask(before)
        path = default_path()
        assert path == tmp_path / "data/llmkit/llmkit.db"
        for each in (path.parent, *path.parent.iterdir()):
            assert stat.S_IMODE(each.stat().st_mode) & 0o077 == 0, each

    def test_the_tables_are_those_of_the_migrations(self, database: Database) -> None:
        inspector = sa.inspect(database.engine)
        for table in Table.metadata.tables.values():
            columns = {c["name"]: c["nullable"] for c in inspector.get_columns(table.name)}
            assert columns == {c.name: bool(c.nullable) for c in table.columns}
            indexes = {i["name"]: i["column_names"] for i in inspector.get_indexes(table.name)}
            assert {n: c for n, c in indexes.items() if "autoindex" not in str(n)} == {
                index.name: [c.name for c in index.columns] for index in table.indexes
            }

    def test_the_newest_step_is_named(self) -> None:
        from alembic.config import Config
        from alembic.script import ScriptDirectory

        import llmkit.store.migrations as migrations

        config = Config()
        config.set_main_option("script_location", str(Path(migrations.__file__).parent))
        assert ScriptDirectory.from_config(config).get_heads() == [HEAD]

    def test_many_may_start_at_once(self, tmp_path: Path) -> None:
        code = (
            "import sys; from llmkit.store.database import open_database as o;"
            "from llmkit.store.keys import KeyStore; print(KeyStore(o(sys.argv[1])).version())"
        )
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", code, url_of(tmp_path)],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
            for _ in range(4)
        ]
        for process in processes:
            out, err = process.communicate(timeout=60)
            assert (process.returncode, out) == (0, b"0\n"), err

    def test_one_of_a_newer_version_is_left_alone(self, tmp_path: Path) -> None:
        open_database(url_of(tmp_path)).close()
        path = tmp_path / "llmkit.db"
        with sqlite3.connect(path) as connection:
            connection.execute("UPDATE llmkit_version SET version_num = 'v9999'")
        connection.close()
        before = path.read_bytes()
        with pytest.raises(StoreError, match=r"written by a newer llmkit \(v9999; this one knows"):
            open_database(url_of(tmp_path))
        assert path.read_bytes() == before

    @pytest.mark.parametrize("content", [b"hello" * 1000, b"SQLite format 3\0" + b"\xff" * 5000])
    def test_a_damaged_file_is_left_alone(self, tmp_path: Path, content: bytes) -> None:
        path = tmp_path / "llmkit.db"
        path.write_bytes(content)
        path.chmod(0o600)
        with pytest.raises(StoreError, match="restore a backup"):
            open_database(url_of(tmp_path))
        assert path.read_bytes() == content

    def test_a_step_that_fails_changes_nothing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """SQLite's changes of tables are in the transaction too."""
        from alembic import op

        real = op.create_table

        def fails_last(name: str, *columns: Any) -> Any:
            if name == "llmkit_changes":
                raise RuntimeError("the power is gone")
            return real(name, *columns)

        monkeypatch.setattr(op, "create_table", fails_last)
        with pytest.raises(RuntimeError):
            open_database(url_of(tmp_path))
        with sqlite3.connect(tmp_path / "llmkit.db") as connection:
            assert connection.execute("SELECT name FROM sqlite_master").fetchall() == []
        connection.close()
        monkeypatch.undo()
        open_database(url_of(tmp_path)).close()

    def test_a_full_disk_changes_nothing(self, database: Database, keys: KeyStore) -> None:
        add_key(keys, "ann")
        with database.engine.connect() as connection:
            pages = connection.exec_driver_sql("PRAGMA page_count").scalar()
            connection.exec_driver_sql(f"PRAGMA max_page_count={pages}")
        with pytest.raises(StoreError, match="its disk is full; free some space"):
            for i in range(500):
                add_key(keys, f"key{i}", models=("x" * 200,))
        known, version = keys.all(), keys.version()
        assert len(known) == version >= 1
        with database.engine.connect() as connection:
            connection.exec_driver_sql("PRAGMA max_page_count=100000")
        add_key(keys, "bob")
        assert keys.version() == version + 1

    def test_no_room_for_the_index_is_told_as_a_full_disk(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def told(place: str) -> str:
            return str(database_module.explained(OSError("disk I/O error"), place))

        assert "its disk reported an error" in told(f"{tmp_path}/llmkit.db")
        monkeypatch.setattr(database_module, "LEAST_BYTES", 1 << 62)
        assert "its disk is full; free some space" in told(f"{tmp_path}/llmkit.db")
        assert "its disk reported an error" in told("postgresql://h/d")

    def test_no_password_of_an_address_is_shown(self) -> None:
        url = sa.make_url("postgresql://ann:not-shown@h/d?password=not-shown")
        shown = database_module._postgresql(url).place
        assert shown == "postgresql://ann:***@h/d?password=***"

    def test_one_that_everyone_may_write_is_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "llmkit.db"
        path.touch()
        path.chmod(0o666)
        with pytest.raises(StoreError, match=f"chmod 600 {path}"):
            open_database(url_of(tmp_path))

    def test_a_file_that_was_moved_away_is_no_empty_database(
        self, database: Database, keys: KeyStore, tmp_path: Path
    ) -> None:
        add_key(keys, "ann")
        database.close()
        for file in tmp_path.glob("llmkit.db*"):
            file.unlink()
        with pytest.raises(StoreError, match="may not be opened"):
            keys.all()
        assert not (tmp_path / "llmkit.db").exists()

    def test_what_can_not_be_opened_is_said(self, tmp_path: Path) -> None:
        for url in (
            f"sqlite:///{tmp_path}/none/x.db",
            f"sqlite:///{tmp_path}",
            "sqlite:////dev/null",
        ):
            with pytest.raises(StoreError, match="db_url"):
                open_database(url)
        with pytest.raises(StoreError, match="there is no database"):
            open_database(url_of(tmp_path), create=False)
        with pytest.raises(StoreError, match=r"user:\*\*\*@127\.0\.0\.1:1/x"):
            open_database("postgresql://user:secret@127.0.0.1:1/x")

    @pytest.mark.parametrize(
        "wrong",
        ["", "x.db", "sqlite://", "sqlite:///:memory:", "mysql://h/x", "sqlite:///x.db?mode=ro"],
    )
    def test_what_names_no_database_is_an_error(self, wrong: str) -> None:
        with pytest.raises(InvalidRequestError, match="db_url"):
            open_database(wrong)

    def test_writers_wait_for_each_other(self, database: Database, keys: KeyStore) -> None:
        threads = [threading.Thread(target=add_key, args=(keys, f"key{i}")) for i in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(keys.all()) == keys.version() == 16


class TestStoredKeys:
    """The table of keys."""

    def test_a_key_is_256_random_bits_and_only_its_hash_is_kept(
        self, keys: KeyStore, tmp_path: Path
    ) -> None:
        secret = add_key(keys, "ann")
        assert re.fullmatch(r"llmkit-[A-Za-z0-9_-]{43}", secret) and is_generated(secret)
        assert len({new_secret() for _ in range(1000)}) == 1000
        assert keys.all()[0].sha256 == digest(secret)
        for file in tmp_path.glob("llmkit.db*"):
            assert secret.encode() not in file.read_bytes()

    def test_names(self, keys: KeyStore) -> None:
        add_key(keys, "ann")
        for action in (
            lambda: add_key(keys, "ann"),
            lambda: keys.revoke("bob", 1.0),
            lambda: keys.rotate("bob", "0" * 64, 1.0),
        ):
            with pytest.raises(InvalidRequestError):
                action()
        keys.revoke("ann", 2.0)
        for action in (lambda: keys.revoke("ann", 3.0), lambda: keys.rotate("ann", "0" * 64, 3.0)):
            with pytest.raises(InvalidRequestError, match="was revoked before"):
                action()
        assert keys.all()[0].state(9.0) == "revoked"
        add_key(keys, "ann", rate="5/s")
        assert keys.all()[0].state(9.0) == "active" and keys.all()[0].rate == "5/s"

    def test_a_key_that_expired(self, keys: KeyStore) -> None:
        add_key(keys, "ann", expires_at=5.0)
        with pytest.raises(InvalidRequestError, match="has expired; give the new one a later end"):
            keys.rotate("ann", "0" * 64, 9.0)
        with pytest.raises(InvalidRequestError, match="has expired"):
            keys.rotate("ann", "0" * 64, 9.0, 8.0)
        assert keys.all()[0].expires_at == 5.0, "a refusal changes nothing"
        assert keys.rotate("ann", "0" * 64, 9.0, 20.0).state(9.0) == "active"
        assert keys.all()[0].expires_at == 20.0
        keys.add(KeyRecord("ann", "1" * 64, created_at=30.0))
        assert keys.all()[0].sha256 == "1" * 64, "its name is free"

    def test_each_change_is_seen(self, keys: KeyStore) -> None:
        seen = [keys.version()]
        for change in (
            lambda: add_key(keys, "ann"),
            lambda: keys.rotate("ann", "1" * 64, 1.0),
            lambda: keys.revoke("ann", 1.0),
        ):
            change()
            seen.append(keys.version())
        assert len(set(seen)) == 4
        keys.note_use({"1" * 64: 5.0})
        assert keys.version() == seen[-1] and keys.all()[0].last_used_at == 5.0
