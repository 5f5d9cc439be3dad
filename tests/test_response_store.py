"""Stored responses in the database: owners, sharing, bounds. On both databases."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy as sa
from conversation_stores import Clock, clock, opened, server

from llmkit.errors import InvalidRequestError, NotFoundError
from llmkit.store.database import Database
from llmkit.store.responses import ResponseStore
from llmkit.store.tables import Responses

__all__ = ["clock", "opened", "server"]


def item(text: str) -> dict[str, Any]:
    return {"id": f"msg_{text}", "content": text}


def response(*said: str, status: str = "completed") -> dict[str, Any]:
    return {"status": status, "output": [item(text) for text in said]}


@pytest.fixture
def store(opened: Database, clock: Clock) -> ResponseStore:
    return ResponseStore(opened, now=clock)


def ids(items: list[dict[str, Any]]) -> list[str]:
    return [each["content"] for each in items]


def test_turns_share_their_beginning(store: ResponseStore) -> None:
    big = "x" * 10_000
    assert store.put("ann", "r1", response("a1"), [item("q1"), item(big)])
    size = store.num_bytes("ann")
    for i in range(2, 12):
        assert store.put("ann", f"r{i}", response(f"a{i}"), [item(f"q{i}")], f"r{i - 1}")
    assert store.num_bytes("ann") < size + 11 * 300
    assert ids(store.history("ann", "r3")) == ["q1", big, "a1", "q2", "a2", "q3", "a3"]
    assert ids(store.input_items("ann", "r3")) == ["q3"]
    for i in range(1, 11):
        store.delete("ann", f"r{i}")
    assert len(store.history("ann", "r11")) == 23, "what continues it keeps its items"
    store.delete("ann", "r11")
    assert (store.count(), store.num_bytes()) == (0, 0)


def test_its_latest_state_counts(store: ResponseStore) -> None:
    store.put("ann", "r1", response(status="in_progress"), [item("q")])
    assert store.find("ann", "r1").status == "in_progress"
    store.put("ann", "r1", response("a"), [item("q")])
    found = store.find("ann", "r1")
    assert found.status == "completed" and b"msg_a" in found.body
    assert ids(store.history("ann", "r1")) == ["q", "a"]
    store.delete("ann", "r1")
    assert store.num_bytes() == 0


def test_another_s_is_not_there(store: ResponseStore) -> None:
    store.put("ann", "r1", response("a"), [item("q")])
    attempts: list[Callable[[], Any]] = [
        lambda: store.find("bob", "r1"),
        lambda: store.history("bob", "r1"),
        lambda: store.input_items("bob", "r1"),
        lambda: store.delete("bob", "r1"),
        lambda: store.find_items("bob", ["msg_q"]),
        lambda: store.find("ann", "r\x00"),
    ]
    for attempt in attempts:
        with pytest.raises(NotFoundError):
            attempt()
    assert not store.put("bob", "r1", response("b"), [])
    assert ids(store.history("ann", "r1")) == ["q", "a"]


def test_items_by_id(store: ResponseStore) -> None:
    store.put("ann", "r1", response("a"), [item("q")])
    store.put("ann", "r2", response("b"), [{"id": "msg_q", "content": "newer"}])
    found = store.find_items("ann", ["msg_q", "msg_a"])
    assert found == {"msg_q": {"id": "msg_q", "content": "newer"}, "msg_a": item("a")}
    with pytest.raises(InvalidRequestError, match="references too much"):
        store.find_items("ann", [str(i) for i in range(2000)])


def test_what_was_continued_may_be_gone(store: ResponseStore) -> None:
    assert store.put("ann", "r2", response("a2"), [item("q2")], "r1", [item("q1"), item("a1")])
    assert ids(store.history("ann", "r2")) == ["q1", "a1", "q2", "a2"]


def test_bounds(opened: Database, clock: Clock) -> None:
    store = ResponseStore(opened, max_kept=3, max_response_bytes=2000, now=clock)
    assert not store.put("ann", "big", response("x" * 3000), []) and store.count() == 0
    for i in range(3):
        store.put("ann", f"r{i}", response("a"), [])
    store.find("ann", "r0")
    store.put("bob", "r3", response("a"), [])
    assert store.count("ann") == 2 and store.count("bob") == 1
    with pytest.raises(NotFoundError):
        store.find("ann", "r1")
    small = ResponseStore(opened, max_owner_bytes=3000, now=clock)
    for i in range(10):
        assert small.put("ann", f"s{i}", response("x" * 400), [])
        assert small.num_bytes("ann") <= 3000
    assert store.count("bob") == 1, "an owner makes way for itself"
    tiny = ResponseStore(opened, max_bytes=1000, now=clock)
    assert not tiny.put("ann", "t", response("x" * 1000), [])
    assert tiny.num_bytes() <= 1000


def test_they_end(opened: Database, clock: Clock) -> None:
    store = ResponseStore(opened, ttl_s=10, now=clock)
    store.put("ann", "r1", response("a"), [])
    clock.now += 9
    assert store.find("ann", "r1").expires_at == pytest.approx(clock.now + 10, abs=1)
    clock.now += 11
    with pytest.raises(NotFoundError, match="expired"):
        store.find("ann", "r1")
    assert store.remove_expired() == 1 and store.num_bytes() == 0


def test_what_a_killed_process_was_writing_has_failed(
    opened: Database, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmkit.store import writers

    monkeypatch.setattr(writers, "_place", lambda: "elsewhere")
    away = ResponseStore(opened, now=clock)
    monkeypatch.undo()
    away.put("ann", "r1", response(status="in_progress"), [item("q")])
    here = ResponseStore(opened, now=clock)
    here.put("ann", "r2", response(status="in_progress"), [item("q")])
    assert here.recover() == 0
    clock.now += writers.LEASE_S + 1
    assert here.recover() == 1
    assert here.find("ann", "r1").status == "failed"
    assert b"server ended" in here.find("ann", "r1").body
    assert here.find("ann", "r2").status == "in_progress"


def test_many_at_once(opened: Database) -> None:
    store = ResponseStore(opened, max_kept=20)
    store.put("ann", "r", response("a"), [item("q")])
    failures: list[Exception] = []

    def work(number: int) -> None:
        try:
            for i in range(6):
                name = f"r{number}-{i}"
                store.put("ann", name, response("a"), [item("q")], "r", [item("q"), item("a")])
                store.find("ann", name)
                if i % 2:
                    store.delete("ann", name)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not [f for f in failures if not isinstance(f, NotFoundError)]
    assert store.count() <= 20
    with opened.reading() as session:
        left = session.scalars(sa.select(Responses.id)).all()
    for each in left:
        store.delete("ann", each)
    assert store.num_bytes() == 0


def test_one_that_is_computed_for_long_is_not_taken_for_lost(
    store: ResponseStore, clock: Clock
) -> None:
    store.put("ann", "r1", response(status="in_progress"), [item("q")])
    for _ in range(10):
        clock.now += 300
        store.renew()
        assert store.recover() == 0
    assert store.find("ann", "r1").status == "in_progress"
    clock.now += 3000
    assert store.recover() == 1 and store.find("ann", "r1").status == "failed"


def test_one_that_is_given_up_has_failed_before_long(store: ResponseStore, clock: Clock) -> None:
    for name in ("r1", "r2", "r3", "r4"):
        store.put("ann", name, response(status="in_progress"), [item("q")])
    store.give_up("r1")
    store.put("ann", "r3", response("a"), [item("q")])
    store.delete("ann", "r4")
    assert store._under_way == {"r2"}
    for _ in range(4):
        clock.now += 200
        store.renew()
    assert store.recover() == 1 and store.find("ann", "r1").status == "failed"
    assert store.find("ann", "r2").status == "in_progress"


def test_who_has_most_makes_way(opened: Database, clock: Clock) -> None:
    store = ResponseStore(opened, max_kept=6, now=clock)
    store.put("ann", "kept", response("a"), [])
    store.put("ann", "running", response(status="in_progress"), [])
    for i in range(20):
        assert store.put("eve", f"e{i}", response("a"), [])
        assert store.count() <= 6
    assert store.count("ann") == 2 and store.find("eve", "e19")
    assert store.put("ann", "running", response("b"), []), "also after eve's flood"
    large = ResponseStore(opened, max_bytes=4000, now=clock)
    for i in range(20):
        assert large.put("eve", f"large{i}", response("x" * 300), [])
    assert store.count("ann") == 2 and store.num_bytes() <= 4000


def test_what_is_in_progress_makes_way_for_nobody(opened: Database, clock: Clock) -> None:
    store = ResponseStore(opened, max_kept=3, now=clock)
    for i in range(3):
        assert store.put("eve", f"e{i}", response(status="in_progress"), [])
    assert not store.put("ann", "a", response("a"), []) and store.count() == 3
    store.put("eve", "e0", response("a"), [])
    assert store.put("ann", "a", response("a"), []) and store.count() == 3
    with pytest.raises(NotFoundError):
        store.find("eve", "e0")
    small = ResponseStore(opened, max_owner_bytes=1000, now=clock)
    assert not small.put("eve", "e3", response("x" * 400, status="in_progress"), [item("y" * 400)])
    assert small.count("eve") == 2
