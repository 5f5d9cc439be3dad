"""Replies of stored conversations: two writers, crashes, and a database that fails."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from conversation_stores import Clock, clock, opened, server, store, texts
from fakes import wait_for

from llmkit.errors import ConflictError, NotFoundError, StoreError
from llmkit.protocol import Message
from llmkit.store import writers
from llmkit.store.conversations import ConversationStore, NewMessage
from llmkit.store.database import Database, open_database

__all__ = ["clock", "opened", "server", "store"]

USER = [Message("user", "hi")]


def begun(store: ConversationStore, **more: Any) -> tuple[str, str]:
    """A conversation with a running reply; their ids."""
    known = store.create("ann", messages=[Message("system", "s")])
    return known.id, store.begin_turn("ann", known.id, messages=USER, **more)[-1].id


class TestTurns:
    def test_a_turn(self, store: ConversationStore) -> None:
        known = store.create("ann", messages=[Message("system", "s")])
        question, reply = store.begin_turn("ann", known.id, messages=USER, model="m")
        assert (reply.status, reply.parent_id, reply.model) == ("running", question.id, "m")
        assert store.get("ann", known.id).head == reply.id
        store.update_reply(known.id, reply.id, "he", "thinks")
        read = store.path("ann", known.id)[-1]
        assert (read.content, read.reasoning, read.status) == ("he", "thinks", "running")
        ended = store.end_reply(
            known.id, reply.id, Message("assistant", "hello"), finish_reason="stop", usage={"x": 1}
        )
        assert ended == store.path("ann", known.id)[-1] and ended.id == reply.id
        assert (ended.status, ended.finish_reason, ended.usage) == ("complete", "stop", {"x": 1})
        assert ended.model == "m" and ended.reasoning is None
        with pytest.raises(ConflictError):
            store.end_reply(known.id, reply.id, Message("assistant", "again"))
        with pytest.raises(ConflictError):
            store.update_reply(known.id, reply.id, "again")
        (again,) = store.begin_turn("ann", known.id, question.id)
        store.end_reply(known.id, again.id, Message("assistant", "2"), status="partial")
        assert again.parent_id == question.id
        assert texts(store.messages("ann", known.id)) == ["s", "hi", "hello", "2"]

    def test_a_second_turn_is_a_conflict_or_a_branch(
        self, opened: Database, store: ConversationStore, clock: Clock
    ) -> None:
        """Two tabs of one gateway, and two gateways."""
        known = store.create("ann", messages=[Message("system", "s")])
        head = known.head
        question, reply = store.begin_turn("ann", known.id, head, USER)
        for tab in (store, ConversationStore(opened, now=clock)):
            for parent in (head, reply.id):
                with pytest.raises(ConflictError, match="ask for a branch"):
                    tab.begin_turn("ann", known.id, parent, USER)
            with pytest.raises(ConflictError):
                tab.begin_turn("ann", known.id, messages=USER)
            with pytest.raises(ConflictError):
                tab.begin_turn("ann", known.id, question.id)
            with pytest.raises(ConflictError):
                tab.append("ann", known.id, reply.id, USER)
        other, _ = store.begin_turn("ann", known.id, messages=USER, branch=True)
        assert other.parent_id == head, "beside the turn that is running"
        other, _ = store.begin_turn("ann", known.id, head, USER, branch=True)
        assert other.parent_id == head
        (sibling,) = store.begin_turn("ann", known.id, question.id, branch=True)
        assert sibling.parent_id == question.id
        store.end_reply(known.id, reply.id, Message("assistant", "hello"))
        more, _ = store.begin_turn("ann", known.id, reply.id, USER)
        assert more.parent_id == reply.id

    def test_many_at_once_one_wins(self, opened: Database) -> None:
        stores = [ConversationStore(opened) for _ in range(6)]
        store = stores[0]
        known = store.create("ann")
        results: list[str] = []

        def turn(each: ConversationStore) -> None:
            try:
                each.begin_turn("ann", known.id, None, USER)
                results.append("won")
            except ConflictError:
                results.append("lost")

        threads = [threading.Thread(target=turn, args=(s,)) for s in stores]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(results) == ["lost"] * 5 + ["won"]
        assert len(store.messages("ann", known.id)) == 2

    def test_a_refused_turn_leaves_no_trace(self, store: ConversationStore) -> None:
        known = store.create("ann", messages=[Message("system", "s"), *USER])
        before = store.path("ann", known.id)
        _, reply = store.begin_turn("ann", known.id, messages=USER)
        store.cancel_turn(known.id, reply.id)
        assert store.path("ann", known.id) == before == store.messages("ann", known.id)
        (again,) = store.begin_turn("ann", known.id, before[0].id, branch=True)
        store.cancel_turn(known.id, again.id)
        assert store.path("ann", known.id) == before, "the head is as it was"
        with pytest.raises(NotFoundError):
            store.cancel_turn(known.id, again.id)
        question, reply = store.begin_turn("ann", known.id, messages=USER)
        (kept,) = store.append("ann", known.id, question.id, [Message("assistant", "by hand")])
        store.cancel_turn(known.id, reply.id)
        assert store.path("ann", known.id) == [*before, question, kept], "others build on it"
        assert store.get("ann", known.id).num_messages == 4

    def test_deleted_while_it_is_answered(self, store: ConversationStore) -> None:
        session, reply = begun(store)
        store.delete("ann", session)
        for late in (
            lambda: store.update_reply(session, reply, "x"),
            lambda: store.end_reply(session, reply, Message("assistant", "x")),
            lambda: store.cancel_turn(session, reply),
        ):
            with pytest.raises(NotFoundError):
                late()
        store.renew()
        assert store.recover() == 0


def refuse(*_: Any, **__: Any) -> None:
    raise StoreError("the database is full")


class TestLeases:
    def test_a_living_writer_is_left_alone(
        self, opened: Database, store: ConversationStore, clock: Clock
    ) -> None:
        session, reply = begun(store)
        other = ConversationStore(opened, now=clock)
        clock.now += 300
        assert other.recover() == 0
        store.renew()
        clock.now += writers.ABANDONED_S - 10
        assert other.recover() == 0
        store.update_reply(session, reply, "so far")
        clock.now += writers.ABANDONED_S - 10
        assert other.recover() == 0
        clock.now += 20
        assert other.recover() == 1, "it has forgotten about it"
        assert store.path("ann", session)[-1].status == "partial"

    def test_on_another_machine_silence_counts(
        self, opened: Database, clock: Clock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(writers, "_place", lambda: "elsewhere")
        away = ConversationStore(opened, now=clock)
        monkeypatch.undo()
        here = ConversationStore(opened, now=clock)
        session, reply = begun(away)
        clock.now += writers.LEASE_S - 10
        away.renew()
        clock.now += writers.LEASE_S - 10
        assert here.recover() == 0
        clock.now += 20
        turn = here.begin_turn("ann", session, messages=USER)
        assert here.path("ann", session)[2].status == "partial", "found when it was in the way"
        with pytest.raises(ConflictError, match="taken for cut off"):
            away.update_reply(session, reply, "more")
        kept = away.end_reply(session, reply, Message("assistant", "all of it"))
        assert kept.id != reply and kept.parent_id == away.message("ann", session, reply).parent_id
        assert here.get("ann", session).head == turn[-1].id, "others went on"

    def test_what_came_late_is_shown_if_nobody_went_on(
        self, opened: Database, clock: Clock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(writers, "_place", lambda: "elsewhere")
        away = ConversationStore(opened, now=clock)
        monkeypatch.undo()
        session, reply = begun(away)
        clock.now += writers.LEASE_S + 10
        assert ConversationStore(opened, now=clock).recover() == 1
        kept = away.end_reply(session, reply, Message("assistant", "all"))
        assert away.path("ann", session)[-1] == kept

    def test_a_reply_that_is_given_up_blocks_nothing_for_long(
        self, store: ConversationStore, clock: Clock
    ) -> None:
        session, reply = begun(store)
        other, kept = begun(store)
        store.update_reply(session, reply, "so far")
        store.give_up(reply)
        for _ in range(4):
            clock.now += writers.ABANDONED_S / 3
            store.renew()
        assert store.recover() == 1
        assert (store.path("ann", session)[-1].status, store.path("ann", session)[-1].text) == (
            "partial",
            "so far",
        )
        store.begin_turn("ann", session, messages=USER)
        assert store.path("ann", other)[-1].id == kept
        assert store.path("ann", other)[-1].status == "running"

    def test_no_more_is_renewed_than_is_under_way(
        self, store: ConversationStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        session, reply = begun(store)
        with monkeypatch.context() as patch, pytest.raises(StoreError):
            patch.setattr(store, "_end", refuse)
            store.end_reply(session, reply, Message("assistant", "all"))
        assert store._under_way == {reply}, "it is tried again"
        store.end_reply(session, reply, Message("assistant", "all"))
        gone, late = begun(store)
        store.delete("ann", gone)
        with pytest.raises(NotFoundError):
            store.end_reply(gone, late, Message("assistant", "all"))
        refused, taken = begun(store)
        store.cancel_turn(refused, taken)
        assert not store._under_way


WRITER = """
import sys
from llmkit.protocol import Message
from llmkit.store.conversations import ConversationStore
from llmkit.store.database import open_database

store = ConversationStore(open_database(sys.argv[1]))
session = store.create("ann", messages=[Message("system", "s")]).id
for turn in range(10**6):
    question, reply = store.begin_turn("ann", session, messages=[Message("user", f"q{turn}")])
    print(session, flush=True)
    for count in range(5):
        store.update_reply(session, reply.id, "x" * (count + 1))
        print(turn, count + 1, flush=True)
    store.end_reply(session, reply.id, Message("assistant", "x" * 6))
    print(turn, 6, flush=True)
"""


def _is_served(database: Database) -> bool:
    """Whether PostgreSQL still works for the writer: on what it asked last, though it has ended."""
    if database.engine.dialect.name == "sqlite":
        return False
    asked = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'writer'"
    with database.reading() as session:
        return bool(session.scalar(sa.text(asked)))


class TestCrashes:
    @pytest.mark.parametrize("after", [1, 2, 9, 13, 14, 20, 40])
    def test_kill_9_loses_at_most_the_unfinished_reply(self, opened: Database, after: int) -> None:
        url = opened.engine.url.render_as_string(hide_password=False)
        if opened.engine.dialect.name == "sqlite":
            url = f"sqlite:///{opened.place}"
        else:
            url += "&application_name=writer"
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, url], stdout=subprocess.PIPE, text=True
        )
        assert writer.stdout is not None
        lines = [writer.stdout.readline() for _ in range(after)]
        os.kill(writer.pid, signal.SIGKILL)
        lines += writer.stdout.read().splitlines(keepends=True)
        writer.wait()
        writer.stdout.close()
        wait_for(lambda: not _is_served(opened))
        session = lines[0].strip()
        said = [tuple(map(int, line.split())) for line in lines if " " in line and line[-1] == "\n"]
        store = ConversationStore(opened)
        messages = store.messages("ann", session)
        if messages[-1].status == "running":
            assert store.recover() == 1, "at once, its process is gone"
        messages = store.messages("ann", session)
        replies = [m for m in messages if m.role == "assistant"]
        assert all(m.status == "complete" and m.content == "x" * 6 for m in replies[:-1])
        turn, count = said[-1] if said else (0, 0)
        assert len(replies) in (turn + 1, turn + 2)
        assert len(str(replies[turn].content)) >= count, "what was kept is there"
        assert replies[-1].status == ("complete" if replies[-1].content == "x" * 6 else "partial")
        assert store.path("ann", session) == messages
        turn_after = store.begin_turn("ann", session, messages=USER)
        assert turn_after[0].parent_id == messages[-1].id


class TestFailures:
    """What a file can do; the messages are those of `test_store.py`."""

    @pytest.fixture
    def files(self, database: Database) -> ConversationStore:
        return ConversationStore(database)

    def test_locked(
        self, files: ConversationStore, database: Database, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        session, reply = begun(files)
        other = sqlite3.connect(database.place, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with database.engine.connect() as connection:
            connection.exec_driver_sql("PRAGMA busy_timeout=50")
        with pytest.raises(StoreError, match="another program holds it"):
            files.end_reply(session, reply, Message("assistant", "all"))
        assert files.path("ann", session)[-1].status == "running", "it can be read"
        other.execute("ROLLBACK")
        other.close()
        assert files.end_reply(session, reply, Message("assistant", "all")).status == "complete"

    def test_full(self, files: ConversationStore, database: Database) -> None:
        session, reply = begun(files)
        with database.engine.connect() as connection:
            pages = connection.exec_driver_sql("PRAGMA page_count").scalar()
            connection.exec_driver_sql(f"PRAGMA max_page_count={pages}")
        with pytest.raises(StoreError, match="its disk is full"):
            files.end_reply(session, reply, Message("assistant", "x" * 1_000_000))
        assert [m.status for m in files.path("ann", session)] == ["complete"] * 2 + ["running"]
        with pytest.raises(StoreError, match="its disk is full"):
            files.import_("ann", [{"role": "user", "content": "x" * 1_000_000}])
        with database.engine.connect() as connection:
            connection.exec_driver_sql("PRAGMA max_page_count=100000")
        files.end_reply(session, reply, Message("assistant", "x" * 1_000_000))
        assert len(files.list("ann")) == 1

    def test_moved_away(self, files: ConversationStore, database: Database, tmp_path: Path) -> None:
        session, _ = begun(files)
        database.close()
        for file in tmp_path.glob("llmkit.db*"):
            file.unlink()
        with pytest.raises(StoreError, match="may not be opened"):
            files.get("ann", session)

    def test_an_older_database_gets_the_tables(self, tmp_path: Path) -> None:
        """What the first step made, with keys in it, is brought on."""
        from alembic import command
        from alembic.config import Config

        import llmkit.store.migrations as migrations

        url = f"sqlite:///{tmp_path}/old.db"
        database = open_database(url)
        config = Config(attributes={"connection": None})
        config.set_main_option("script_location", str(Path(migrations.__file__).parent))
        with database._writing.begin() as connection:
            config.attributes["connection"] = connection
            command.downgrade(config, "v0001")
            connection.exec_driver_sql("INSERT INTO llmkit_changes VALUES ('x', 5)")
        database.close()
        database = open_database(url)
        assert ConversationStore(database).create("ann").version == 1
        with database.reading() as session:
            assert (
                session.connection().exec_driver_sql("SELECT number FROM llmkit_changes").scalar()
            )
        database.close()


def test_a_turn_s_cost_does_not_grow(database: Database) -> None:
    """Statements and rows, not seconds: the second read of a long conversation reads its news."""
    store = ConversationStore(database)
    known = store.create("ann", messages=[NewMessage("user", "x")] * 2000)
    store.path("ann", known.id)
    rows = 0

    def count(*arguments: Any) -> None:
        nonlocal rows
        rows += 1

    if database.engine.dialect.name == "sqlite":  # all that the driver is asked

        def watch(connection: Any, *_: object) -> None:
            connection.set_trace_callback(count)

        sa.event.listen(database.engine, "checkout", watch)
    else:
        sa.event.listen(database.engine, "before_cursor_execute", count)
    began = time.perf_counter()
    _, reply = store.begin_turn("ann", known.id, messages=USER)
    store.path("ann", known.id)
    store.end_reply(known.id, reply.id, Message("assistant", "x"))
    store.path("ann", known.id)
    print(f"{(time.perf_counter() - began) * 1000:.1f} ms, {rows} statements")
    assert rows < 40
