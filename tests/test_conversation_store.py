"""Conversations in the database: the tree, versions, owners, bounds, search. On both databases."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy as sa
from conversation_stores import Clock, clock, opened, server, store, texts

from llmkit.errors import ConflictError, InvalidRequestError, NotFoundError
from llmkit.protocol import Media, Message, ToolCall
from llmkit.store.conversation_records import MAX_MESSAGE_CHARS
from llmkit.store.conversations import ConversationStore, NewMessage
from llmkit.store.database import Database
from llmkit.store.tables import Conversations

__all__ = ["clock", "opened", "server", "store"]


class TestConversations:
    def test_a_conversation_is_as_it_was_stored(self, store: ConversationStore) -> None:
        call = ToolCall("c1", "ls", '{"path": "ä\u0000"}')
        messages: list[NewMessage | Message] = [
            Message("system", "Be brief."),
            NewMessage("user", [{"type": "text", "text": "hi"}, {"type": "x", "y": [1]}]),
            Message("assistant", "", tool_calls=(call,), reasoning_content="hm"),
            Message("tool", "a.txt", "ls", tool_call_id="c1"),
            Message("user", ("see ", Media("5d41", "image"))),
        ]
        known = store.create(
            "ann", title="  A\nB ", model="m", settings={"temperature": 0}, messages=messages
        )
        assert (known.title, known.settings, known.num_messages) == ("A B", {"temperature": 0}, 5)
        assert known == store.get("ann", known.id) and known.version == 1
        path = store.path("ann", known.id)
        assert [m.number for m in path] == [1, 2, 3, 4, 5] and path[-1].id == known.head
        assert [m.parent_id for m in path] == [None, *(m.id for m in path[:-1])]
        assert path[1].content == [{"type": "text", "text": "hi"}, {"type": "x", "y": [1]}]
        assert path[2].tool_calls[0].arguments == '{"path": "ä\ufffd"}', "no NUL in PostgreSQL"
        assert path[2].message.reasoning_content == "hm" and path[3].message == messages[3]
        assert path[4].message == messages[4]
        assert path[1].message.text == "hi(a part of type x)"

    def test_another_s_is_not_there(self, store: ConversationStore) -> None:
        mine = store.create("ann", messages=[Message("user", "hi")])
        head = mine.head
        assert head is not None
        attempts: list[Callable[[], Any]] = [
            lambda: store.get("bob", mine.id),
            lambda: store.messages("bob", mine.id),
            lambda: store.message("bob", mine.id, head),
            lambda: store.path("bob", mine.id),
            lambda: store.append("bob", mine.id, head, [Message("user", "x")]),
            lambda: store.begin_turn("bob", mine.id, head, [Message("user", "x")]),
            lambda: store.change("bob", mine.id, title="x"),
            lambda: store.fork("bob", mine.id),
            lambda: store.export("bob", mine.id),
            lambda: store.delete("bob", mine.id),
            lambda: store.list("bob", after=mine.id),
        ]
        said = set()
        for attempt in attempts:
            with pytest.raises(NotFoundError) as error:
                attempt()
            said.add(str(error.value))
        with pytest.raises(NotFoundError) as error:
            store.get("bob", "sess_unknown")
        assert said == {str(error.value).replace("sess_unknown", mine.id)}
        assert store.list("bob") == [] and store.delete_all("bob") == 0
        other = store.create("ann")
        with pytest.raises(NotFoundError):
            store.path("ann", other.id, head)
        with pytest.raises(NotFoundError):
            store.append("ann", other.id, head, [Message("user", "x")])
        assert store.get("ann", mine.id) == mine
        with pytest.raises(NotFoundError):
            store.get("ann", "\x00'; --")

    def test_a_tree(self, store: ConversationStore) -> None:
        known = store.create("ann", messages=[Message("system", "s"), Message("user", "u1")])
        system, first = store.path("ann", known.id)
        (answer,) = store.append("ann", known.id, first.id, [Message("assistant", "a1")])
        second, reply = store.append(
            "ann", known.id, system.id, [Message("user", "u2"), Message("assistant", "a2")]
        )
        assert texts(store.path("ann", known.id)) == ["s", "u2", "a2"]
        assert texts(store.path("ann", known.id, answer.id)) == ["s", "u1", "a1"]
        assert texts(store.messages("ann", known.id)) == ["s", "u1", "a1", "u2", "a2"]
        store.append("ann", known.id, second.id, [Message("assistant", "aside")], head=False)
        assert store.get("ann", known.id).head == reply.id
        changed = store.change("ann", known.id, head=answer.id)
        assert texts(store.path("ann", known.id)) == ["s", "u1", "a1"]
        other = store.fork("ann", known.id)
        assert other.num_messages == 3 and other.id != known.id
        assert texts(store.path("ann", other.id)) == ["s", "u1", "a1"]
        assert texts(store.path("ann", store.fork("ann", known.id, second.id).id)) == ["s", "u2"]
        store.append("ann", other.id, other.head, [Message("user", "more")])
        assert store.get("ann", known.id) == changed, "a fork is its own"
        assert store.path("ann", store.change("ann", known.id, head=None).id) == []

    def test_a_stale_version_changes_nothing(self, store: ConversationStore) -> None:
        known = store.create("ann")
        newer = store.change("ann", known.id, title="t", version=1)
        assert newer.version == 2
        for late in (
            lambda: store.change("ann", known.id, title="x", version=1),
            lambda: store.append("ann", known.id, None, [Message("user", "x")], version=1),
            lambda: store.begin_turn("ann", known.id, None, [Message("user", "x")], version=1),
        ):
            with pytest.raises(ConflictError, match="version 2, not 1"):
                late()
        assert store.get("ann", known.id) == newer

    def test_wrong_values(self, store: ConversationStore) -> None:
        known = store.create("ann")
        deep: Any = {}
        for _ in range(2000):
            deep = {"a": deep}
        for name, value in [
            ("title", 5), ("title", "x" * 1001), ("model", None), ("settings", []),
            ("settings", {"a": {1}}), ("settings", {"a": float("nan")}), ("settings", deep),
            ("settings", {"a": "x" * (1 << 20)}), ("pruning", "all"), ("ttl_s", 0),
            ("ttl_s", True), ("ttl_s", float("inf")), ("ttl_s", "1"), ("colour", "red"),
        ]:  # fmt: skip
            with pytest.raises(InvalidRequestError) as error:
                store.change("ann", known.id, **{name: value})
            assert error.value.param == name
        with pytest.raises(NotFoundError):
            store.change("ann", known.id, head="msg_none")
        with pytest.raises(InvalidRequestError, match="too long for a session; the limit is"):
            store.append("ann", known.id, None, [Message("user", "x" * 10_000_000)])
        with pytest.raises(InvalidRequestError, match="role"):
            store.append("ann", known.id, None, [Message("god", "x")])
        for content in (5, None, [5], [{"text": "x"}], [{"type": "text", "text": {1}}]):
            with pytest.raises(InvalidRequestError):
                NewMessage("user", content)  # type: ignore[arg-type]
        assert store.get("ann", known.id) == known
        store.append("ann", known.id, None, [Message("user", "x" * MAX_MESSAGE_CHARS)])

    def test_too_much_for_one_session(
        self, store: ConversationStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("llmkit.store.conversation_rows.MAX_MESSAGES", 3)
        known = store.create("ann", messages=[Message("user", "x")] * 3)
        with pytest.raises(InvalidRequestError, match="begin another one"):
            store.append("ann", known.id, known.head, [Message("user", "x")])
        assert len(store.path("ann", known.id)) == 3

    def test_too_much_for_one_owner(
        self, store: ConversationStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("llmkit.store.conversation_bounds.MAX_OWNER_CHARS", 250_000)
        big = [NewMessage("user", "x" * 100_000, tool_call_id="y" * 100)]
        first = store.create("ann", messages=big)
        store.fork("ann", first.id)
        with pytest.raises(InvalidRequestError, match="all sessions of a caller"):
            store.fork("ann", first.id)
        assert len(store.list("ann")) == 2, "nothing of it is left"
        store.create("ann", messages=[NewMessage("user", "a few words")])
        store.create("bob", messages=big)

    def test_the_same_message_to_one_parent_by_many(self, store: ConversationStore) -> None:
        known = store.create("ann", messages=[Message("user", "x")])
        failures: list[Exception] = []

        def append() -> None:
            try:
                for _ in range(5):
                    store.append("ann", known.id, known.head, [Message("assistant", "y")])
            except Exception as error:
                failures.append(error)

        threads = [threading.Thread(target=append) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures and store.get("ann", known.id).version == 31
        assert [m.number for m in store.messages("ann", known.id)] == list(range(1, 32))


class TestLists:
    def test_pages_by_use(self, store: ConversationStore) -> None:
        ids = [store.create("ann", title=f"t{i}").id for i in range(5)]
        store.change("ann", ids[1], title="again")
        order = [ids[1], ids[4], ids[3], ids[2], ids[0]]
        assert [c.id for c in store.list("ann")] == order
        assert [c.id for c in store.list("ann", limit=2)] == order[:2]
        assert [c.id for c in store.list("ann", limit=2, after=order[1])] == order[2:4]
        assert store.list("ann", after=order[-1]) == []
        for wrong in (0, 1001, True, "5"):
            with pytest.raises(InvalidRequestError, match="limit"):
                store.list("ann", limit=wrong)  # type: ignore[arg-type]
        with pytest.raises(InvalidRequestError, match="query"):
            store.list("ann", query="x" * 1001)

    def test_search(self, store: ConversationStore) -> None:
        one = store.create("ann", title="Über Äpfel", messages=[Message("user", "50% off_x")])
        two = store.create("ann", messages=[NewMessage("user", [{"type": "text", "text": "PEAR"}])])
        store.create("bob", title="äpfel")
        for query, found in [
            ("äpfel", [one]), ("ÜBER", [one]), ("pear", [two]), ("50% OFF", [one]), ("0%_o", []),
            ("off_", [one]), ("offx", []), ("%", [one]), ("\\", []), ("text", []),
            (" ", [two, one]),
        ]:  # fmt: skip
            assert store.list("ann", query=query) == found, query


class TestRoom:
    def test_the_least_recently_used_makes_way(self, opened: Database, clock: Clock) -> None:
        store = ConversationStore(opened, max_sessions=3, now=clock)
        others = store.create("bob")
        a, b, c = (store.create("ann", messages=[Message("user", "x")]).id for _ in "abc")
        store.append("ann", a, None, [Message("user", "y")])
        d = store.create("ann").id
        assert [x.id for x in store.list("ann")] == [d, a, c], "b was used least recently"
        store.begin_turn("ann", c)
        held = {a}
        store.in_use(lambda: held)
        clock.now += 1
        store.change("ann", d, title="used")
        e = store.create("ann").id
        assert {x.id for x in store.list("ann")} == {a, c, e}, "none that is in use"
        held.clear()
        f = store.create("ann").id
        assert {x.id for x in store.list("ann")} == {c, e, f}
        assert store.get("bob", others.id) == others and b not in held
        with opened.reading() as session:
            orphans = sa.text(
                "SELECT count(*) FROM llmkit_messages WHERE conversation_id NOT IN "
                "(SELECT id FROM llmkit_conversations)"
            )
            assert session.scalar(orphans) == 0

    def test_an_end(self, opened: Database, clock: Clock) -> None:
        store = ConversationStore(opened, ttl_s=100, now=clock)
        short, long = store.create("ann", ttl_s=10), store.create("ann")
        for_ever = store.create("ann", ttl_s=None)
        assert for_ever.expires_at is None and short.expires_at == short.used_at + 10
        clock.now += 9
        short = store.change("ann", short.id, title="used")
        clock.now += 9
        assert len(store.list("ann")) == 3
        (reply,) = store.begin_turn("ann", long.id, None, [Message("user", "hi")])[1:]
        clock.now += 200
        assert [c.id for c in store.list("ann")] == [for_ever.id]
        with pytest.raises(NotFoundError, match="expired"):
            store.get("ann", short.id)
        assert store.remove_expired() == 1, "not the one that is being answered in"
        with opened.reading() as session:
            assert session.scalar(sa.select(sa.func.count()).select_from(Conversations)) == 2
        store.update_reply(long.id, reply.id, "so far")
        store.end_reply(long.id, reply.id, Message("assistant", "all"))
        assert texts(store.path("ann", long.id)) == ["hi", "all"], "its use goes on"
        changed = store.change("ann", for_ever.id, ttl_s=5)
        assert changed.expires_at == changed.used_at + 5

    def test_long_owners_are_not_mixed_up(self, store: ConversationStore) -> None:
        one, two = "x" * 300 + "a", "x" * 300 + "b"
        known = store.create(one)
        assert store.get(one, known.id) == known and store.list(two) == []
        with pytest.raises(NotFoundError):
            store.get(two, known.id)


class TestFiles:
    def test_there_and_back(self, store: ConversationStore) -> None:
        call = ToolCall("c1", "ls", "{}")
        known = store.create(
            "ann",
            title="ä",
            model="m",
            settings={"seed": 1},
            pruning="stop",
            messages=[
                Message("system", "s"),
                NewMessage("user", "u", usage={"x": 1}, created_at=5.0),
                Message("assistant", "", tool_calls=(call,), reasoning_content="r"),
            ],
        )
        root = store.path("ann", known.id)[0]
        store.append("ann", known.id, root.id, [Message("user", "other")], head=False)
        store.begin_turn("ann", known.id, root.id, [Message("user", "now")])
        data = json.loads(json.dumps(store.export("ann", known.id)))
        copy = store.import_("bob", data)
        again = store.export("bob", copy.id)
        assert texts(store.path("bob", copy.id)) == ["s", "now", ""]
        assert store.path("bob", copy.id)[-1].status == "partial"

        def plain(data: dict[str, Any]) -> Any:
            numbers = {m["id"]: i for i, m in enumerate(data["messages"])}
            data = {**data, "head": numbers[data["head"]], "created_at": 0, "updated_at": 0}
            data["messages"] = [
                {**m, "id": numbers[m["id"]], "parent": numbers.get(m["parent"])}
                for m in data["messages"]
            ]
            return data

        assert plain(data) == plain(again)
        assert not {m["id"] for m in data["messages"]} & {m["id"] for m in again["messages"]}

    def test_children_before_parents_and_other_formats(self, store: ConversationStore) -> None:
        parts = [
            {"id": "c", "parent": "b", "role": "user", "content": "3"},
            {"id": "b", "parent": "a", "role": "assistant", "content": "2"},
            {"id": "a", "parent": None, "role": "user", "content": "1"},
        ]
        known = store.import_("ann", {"messages": parts, "head": "c"})
        assert texts(store.path("ann", known.id)) == ["1", "2", "3"]
        saved = {"format": "llmkit-session", "version": 1, "sampling": {"seed": 1}}
        saved["messages"] = [{"role": "user", "content": "hi", "reasoning_content": "r"}]
        known = store.import_("ann", saved)
        assert known.settings == {"seed": 1} and store.path("ann", known.id)[0].reasoning == "r"
        known = store.import_("ann", [{"role": "user", "content": "a"}] * 2)
        assert texts(store.path("ann", known.id)) == ["a", "a"]
        assert store.import_("ann", {"messages": []}).head is None

    @pytest.mark.parametrize(
        ("wrong", "said"),
        [
            (None, "an object with a list"), ({}, "an object with a list"),
            ({"format": "x", "messages": []}, "format"),
            ({"version": 2, "messages": []}, "version"),
            ({"messages": [5]}, "message 0 must be an object"),
            ({"messages": [{"role": 5}]}, "role must be a string"),
            ({"messages": [{"role": "user", "content": 5}]}, "content must be a string"),
            ({"messages": [{"role": "user", "tool_calls": 5}]}, "tool_calls"),
            ({"messages": [{"role": "user", "tool_calls": [{"function": 5}]}]}, "tool_calls"),
            ({"messages": [{"role": "user", "content": "x" * 10_000_000}]}, "too long"),
            ({"messages": [{"role": "user", "usage": 5}]}, "usage"),
            ({"messages": [{"role": "user", "status": "dead"}]}, "status"),
            ({"messages": [{"role": "user", "created_at": 1e300}]}, "created_at"),
            ({"messages": [{"role": "user", "reasoning": 5}]}, "reasoning must be a string"),
            ({"messages": [{"role": "user"}], "title": 5}, "title must be a string"),
            ({"messages": [{"role": "user"}], "settings": "x"}, "settings must be an object"),
            ({"messages": [{"role": "user"}], "pruning": "x"}, "pruning must be"),
            ({"messages": [{"role": "user"}], "head": "x"}, "head is none"),
            ({"messages": [{"role": "user"}], "head": 5}, "head is none"),
            ({"messages": [{"role": "user", "parent": None}]}, "needs a string as its id"),
            ({"messages": [{"role": "user", "id": "a", "parent": 5}]}, "parent of message 0"),
            ({"messages": [{"role": "user", "id": "a", "parent": "b"}]}, "no message 'b'"),
            ({"messages": [{"role": "user", "id": "a", "parent": "a"}]}, "its own ancestor"),
            ({"messages": [{"role": "user", "id": "a", "parent": None}] * 2}, "the same id"),
            ({"messages": [{"role": "user", "id": x, "parent": y} for x, y in ("ab", "bc", "ca")]},
             "its own ancestor"),
        ],
    )  # fmt: skip
    def test_what_is_wrong_is_said(self, store: ConversationStore, wrong: Any, said: str) -> None:
        with pytest.raises(InvalidRequestError, match=said):
            store.import_("ann", wrong)
        assert store.list("ann") == []

    def test_long_and_deep_is_linear(self, store: ConversationStore) -> None:
        """2,000 messages: each a child of the one before, in the worst order for a reader."""
        parts = [
            {"id": str(i), "parent": str(i - 1) if i else None, "role": "user", "content": "x"}
            for i in reversed(range(2000))
        ]
        known = store.import_("ann", {"messages": parts, "head": "1999"})
        assert len(store.path("ann", known.id)) == 2000
        (more,) = store.append("ann", known.id, known.head, [Message("assistant", "y")])
        path = store.path("ann", known.id)
        assert len(path) == 2001 and path[-1] == more
        assert len(store.path("ann", known.id, path[1000].id)) == 1001
        fresh = ConversationStore(store.database)
        assert fresh.path("ann", known.id) == path
