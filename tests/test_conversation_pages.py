"""Conversations a page at a time, their use by readers, and whose title began them. On both
databases."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from conversation_stores import Clock, clock, opened, server, store, texts

from llmkit.errors import InvalidRequestError, NotFoundError
from llmkit.protocol import Message
from llmkit.store import conversation_pages, conversation_rows, conversation_search
from llmkit.store.conversation_formats import FORMAT
from llmkit.store.conversations import ConversationStore
from llmkit.store.database import Database, open_database
from llmkit.store.migrations import HEAD

__all__ = ["clock", "opened", "server", "store"]


def forked(store: ConversationStore) -> tuple[str, dict[str, str]]:
    """A conversation of seven messages, two branches: s-a-b-c and s-a-x-y-z; the head is c."""
    parents = {"s": None, "a": "s", "b": "a", "x": "a", "c": "b", "y": "x", "z": "y"}
    messages = [
        {"id": name, "parent": parent, "role": "user", "content": name}
        for name, parent in parents.items()
    ]
    made = store.import_("ann", {"format": FORMAT, "head": "c", "messages": messages})
    return made.id, {m.text: m.id for m in store.messages("ann", made.id)}


class TestPages:
    def test_a_branch_by_pages_from_either_end(self, store: ConversationStore) -> None:
        known, ids = forked(store)
        for newest_first, order in ((False, "saxyz"), (True, "zyxas")):
            found, after, count = "", None, 0
            while True:
                page = store.page("ann", known, leaf=ids["z"], limit=2, after=after,
                                  newest_first=newest_first)  # fmt: skip
                found += "".join(texts(page.messages))
                count += 1
                if not page.has_more:
                    break
                after = page.messages[-1].id
            assert (found, count) == (order, 3)
        shown = store.page("ann", known)
        assert texts(shown.messages) == list("sabc") and not shown.has_more
        assert shown.conversation == store.get("ann", known)
        assert store.branch("ann", known) == [ids[name] for name in "sabc"]
        end = store.page("ann", known, after=ids["c"])
        assert end.messages == [] and not end.has_more
        start = store.page("ann", known, after=ids["s"], newest_first=True)
        assert start.messages == [] and not start.has_more
        moved = store.page("ann", known, after=ids["y"], newest_first=True)
        assert texts(moved.messages) == list("xas"), "though the head is elsewhere by now"

    def test_a_tree_by_pages_from_either_end(self, store: ConversationStore) -> None:
        known, ids = forked(store)
        first = store.page("ann", known, tree=True, limit=4)
        assert texts(first.messages) == list("sabx") and first.has_more
        assert first.children[ids["a"]] == [ids["b"], ids["x"]]
        assert first.children[ids["b"]] == [ids["c"]], "though that is on the next page"
        rest = store.page("ann", known, tree=True, after=ids["x"])
        assert texts(rest.messages) == list("cyz") and not rest.has_more
        last = store.page("ann", known, tree=True, limit=3, newest_first=True)
        assert texts(last.messages) == list("zyc") and last.has_more
        assert last.children == {ids["z"]: [], ids["y"]: [ids["z"]], ids["c"]: []}
        before = store.page("ann", known, tree=True, after=ids["c"], newest_first=True)
        assert texts(before.messages) == list("xbas") and not before.has_more
        plain = store.page("ann", known, tree=True, limit=4, children=False)
        assert (plain.messages, plain.children) == (first.messages, {})

    def test_an_empty_conversation(self, store: ConversationStore) -> None:
        known = store.create("ann").id
        for tree in (False, True):
            page = store.page("ann", known, tree=tree)
            assert (page.messages, page.has_more) == ([], False)
        assert store.branch("ann", known) == []

    def test_a_page_ends_where_texts_are_long(
        self, store: ConversationStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        said = [Message("user", text * 40) for text in "abcde"]
        known = store.create("ann", messages=said).id
        for options in ({}, {"tree": True}, {"newest_first": True}):
            page = store.page("ann", known, max_chars=60, **options)  # type: ignore[arg-type]
            assert len(page.messages) == 2 and page.has_more
        ids = store.branch("ann", known)
        assert texts(store.some("ann", known, ids[2:], 60)) == ["c" * 40, "d" * 40]
        assert texts(store.some("ann", known, ids[4:], 0)) == ["e" * 40], "one at least"
        part = [{"type": "x", "blob": "b" * 100}]
        messages = [{"role": "user", "content": part}] * 3
        parts = store.import_("ann", {"messages": messages}).id
        assert len(store.page("ann", parts, max_chars=150).messages) == 2, "parts count too"
        # Of what is left out nothing is read.
        read: list[Any] = []
        made = conversation_rows.message_of

        def reading(row: Any) -> Any:
            read.append(row)
            return made(row)

        monkeypatch.setattr(conversation_pages, "message_of", reading)
        store.page("ann", known, tree=True, max_chars=60)
        assert len(read) == 2

    def test_what_is_not_there_is_said(self, store: ConversationStore) -> None:
        known, ids = forked(store)
        other, others = forked(store)
        for options in (
            {"after": "msg_0"}, {"after": others["a"]}, {"after": ids["x"]}, {"leaf": "msg_0"},
            {"leaf": others["a"]}, {"tree": True, "after": others["a"]},
            {"after": ids["c"], "leaf": ids["b"]},
            *(
                {"after": ids[after], "leaf": leaf, "newest_first": True}
                for after, leaf in (("x", ids["c"]), ("b", ids["z"]), ("c", ids["b"]),
                                    ("s", "msg_0"), ("s", others["a"]))
            ),
        ):  # fmt: skip
            with pytest.raises(NotFoundError):
                store.page("ann", known, **options)  # type: ignore[arg-type]
        for limit in (0, 1001, True, "5"):
            for tree in (False, True):
                with pytest.raises(InvalidRequestError, match="limit"):
                    store.page("ann", known, limit=limit, tree=tree)  # type: ignore[arg-type]
        for act in (store.page, store.branch):
            with pytest.raises(NotFoundError):
                act("bob", known)  # type: ignore[operator]
        with pytest.raises(NotFoundError):
            store.some("bob", known, [ids["a"]], 10)
        assert store.some("ann", known, [others["a"]], 10) == [] and other

    def test_a_list_ends_where_settings_are_large(
        self, store: ConversationStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(conversation_search, "PAGE_CHARS", 100)
        ids = [store.create("ann", settings={"stop": ["x" * 70]}).id for _ in range(5)]
        found, has_more = store.listed("ann")
        assert [c.id for c in found] == [ids[4], ids[3]] and has_more
        found, has_more = store.listed("ann", after=ids[3])
        assert [c.id for c in found] == [ids[2], ids[1]] and has_more
        found, has_more = store.listed("ann", after=ids[1])
        assert [c.id for c in found] == [ids[0]] and not has_more


class TestUse:
    def test_reading_is_a_use_at_most_once_a_minute(self, opened: Database, clock: Clock) -> None:
        store = ConversationStore(opened, max_sessions=2, ttl_s=1000, now=clock)
        old, new = store.create("ann"), store.create("ann")
        store.touch(old)
        assert store.get("ann", old.id) == old, "not within a minute"
        clock.now += 100
        store.touch(store.get("ann", old.id))
        read = store.get("ann", old.id)
        assert read.used_at > new.used_at and read.expires_at == read.used_at + 1000
        assert (read.version, read.updated_at) == (old.version, old.updated_at)
        assert [c.id for c in store.list("ann")] == [new.id, old.id], "by their changes, as before"
        store.create("ann")
        assert store.get("ann", old.id) and len(store.list("ann")) == 2
        with pytest.raises(NotFoundError):
            store.get("ann", new.id)
        store.touch(new)  # gone meanwhile

    def test_what_a_title_began_makes_way_first(self, opened: Database, clock: Clock) -> None:
        store = ConversationStore(opened, max_sessions=4, now=clock)
        old = [store.create("ann", title=f"mine {i}").id for i in range(3)]
        for i in range(20):  # a client that makes up a title for each chat
            named = store.create("ann", title=f"title {i}", by_title=True)
            store.append("ann", named.id, None, [Message("user", "x")])
        assert {c.id for c in store.list("ann")} == {*old, named.id}
        # One whose owner changes it is a conversation like others.
        store.change("ann", named.id, title="kept")
        other = store.create("ann", title="other", by_title=True)
        assert {c.id for c in store.list("ann")} == {*old[1:], named.id, other.id}

    def test_none_in_use_makes_way(self, opened: Database, clock: Clock) -> None:
        store = ConversationStore(opened, max_sessions=2, now=clock)
        mine = store.create("ann").id
        held = store.create("ann", by_title=True).id
        store.in_use(lambda: [held])
        store.create("ann", by_title=True)
        found = {c.id for c in store.list("ann")}
        assert held in found and mine not in found and len(found) == 2


def test_an_older_database_gets_the_new_column(tmp_path: Path) -> None:
    url, path = f"sqlite:///{tmp_path}/llmkit.db", tmp_path / "llmkit.db"
    store = ConversationStore(open_database(url))
    known = store.create("ann", title="kept", messages=[Message("user", "x")])
    store.database.close()
    with sqlite3.connect(path) as connection:
        for table in ("llmkit_media_uses", "llmkit_media", "llmkit_half_hours"):
            connection.execute(f"DROP TABLE {table}")
        connection.execute("DROP INDEX llmkit_conversations_updated")
        connection.execute("ALTER TABLE llmkit_conversations DROP COLUMN by_title")
        connection.execute("UPDATE llmkit_version SET version_num = 'v0002'")
    connection.close()
    database = open_database(url)
    with database.reading() as session:
        assert session.scalar(sa.text("SELECT version_num FROM llmkit_version")) == HEAD
        assert session.scalar(sa.text("SELECT by_title FROM llmkit_conversations")) in (0, False)
    store = ConversationStore(database)
    assert store.get("ann", known.id) == known and texts(store.path("ann", known.id)) == ["x"]
    database.close()
