"""Which threads the stores' calls take: no owner, and no session, holds up the others."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest
from governed import until
from test_history import shelf_in

from llmkit.chat.parsers.events import Content
from llmkit.errors import ConflictError, StoreError
from llmkit.gateway.conversations import keeping
from llmkit.gateway.conversations import shelf as shelves
from llmkit.gateway.conversations.keeping import Keeping
from llmkit.gateway.conversations.shelf import Shelf
from llmkit.gateway.failures import ApiError
from llmkit.store import conversation_replies as replies
from llmkit.store.conversation_records import NewMessage
from llmkit.store.conversations import ConversationStore

HI = NewMessage("user", "hi")


async def test_one_caller_holds_up_no_other(tmp_path: Path) -> None:
    """A caller's calls of the store take two threads, reading another; leases have their own."""
    shelf = shelf_in(tmp_path)
    goes_on = threading.Event()
    slow = [shelf.call("ann", lambda _: goes_on.wait(30), f"sess_{i}") for i in range(40)]
    slow += [shelf.look("ann", lambda _: goes_on.wait(30)) for _ in range(8)]
    async with asyncio.timeout(30):
        await shelf.call("bob", lambda store: store.create("bob"))
        assert len(await shelf.look("bob", lambda store: store.list("bob"))) == 1
        await shelf.responses("bob", lambda store: store.renew())
        # All threads are taken: those of the leases are not.
        slow += [shelf.call(f"c{i}", lambda _: goes_on.wait(30)) for i in range(8)]
        await shelf._submit(shelf._leasing, "", lambda stores: stores.tidy())
    goes_on.set()
    await asyncio.gather(*slow)
    await shelf.close()


async def test_one_key_s_sessions_wait_for_each_other_in_part(tmp_path: Path) -> None:
    """One session's calls keep their order, and two of an owner's run at once: never more."""
    shelf = shelf_in(tmp_path)
    goes_on, lock = threading.Event(), threading.Lock()
    running = most = 0
    order: list[int] = []

    def slow(_: Any) -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        goes_on.wait(30)
        with lock:
            running -= 1

    calls = [shelf.call("ann", slow, f"sess_{i}") for i in range(40)]
    await until(lambda: running == 2)
    assert shelf.is_behind("ann", "sess_0") and not shelf.is_behind("bob", "sess_0")
    more = [shelf.call("ann", lambda _, i=i: order.append(i), "sess_0") for i in range(20)]  # type: ignore[misc]
    goes_on.set()
    await asyncio.gather(*calls, *more)
    assert most == 2 and order == list(range(20))
    assert not shelf.is_behind("ann", "sess_0")
    await shelf.close()


async def test_a_checkpoint_waits_for_no_backlog(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others' turns go first; the end of a reply is stored all the same."""
    monkeypatch.setattr(keeping, "CHECKPOINT_S", 0.0)
    shelf = shelf_in(tmp_path)
    known = await shelf.call("ann", lambda store: store.create("ann"))
    begun = await shelf.call(
        "ann", lambda s: s.begin_turn("ann", known.id, None, [NewMessage("user", "hi")], model="m")
    )
    kept = Keeping(shelf, "ann", begun[-1])
    kept.take([Content("one ")])
    call = kept._timer
    assert call is not None
    await until(lambda: kept._timer is None)
    assert (await shelf.call("ann", lambda s: s.messages("ann", known.id)))[-1].text == "one "
    goes_on = threading.Event()
    slow = [shelf.call("ann", lambda _: goes_on.wait(30), known.id) for _ in range(3)]
    behind = shelf._lanes.num_waiting
    await until(lambda: 2 in map(behind, [*shelf._lanes._busy]))  # the first runs
    kept.take([Content("two")])
    await until(lambda: kept._timer is None)
    lanes = [lane for lane in shelf._lanes._busy if behind(lane)]
    assert [behind(lane) for lane in lanes] == [2], "nothing more"
    goes_on.set()
    await asyncio.gather(*slow)
    await kept.end()
    assert kept.reply.text == "one two" and kept.reply.status == "partial"
    await shelf.close()


async def begun(shelf: Shelf) -> tuple[str, Keeping]:
    """A session of ann's, and its reply, which has all its text."""
    known = await shelf.call("ann", lambda store: store.create("ann"))
    turn = await shelf.call("ann", lambda s: s.begin_turn("ann", known.id, None, [HI]))
    kept = Keeping(shelf, "ann", turn[-1])
    kept.take([Content("all of it")])
    return known.id, kept


def refuse(*_: Any, **__: Any) -> None:
    raise StoreError("the database is locked")


async def test_an_end_that_the_database_does_not_take_is_stored_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeping, "RETRIES_S", (0.0,))
    monkeypatch.setattr(shelves, "RENEW_S", 0.01)
    shelf = shelf_in(tmp_path)
    session, kept = await begun(shelf)
    other, refused = await begun(shelf)
    refused._text.clear()
    refused.size = 0
    with monkeypatch.context() as patch:
        patch.setattr(ConversationStore, "_end", refuse)
        patch.setattr(replies, "cancel", refuse)
        with pytest.raises(StoreError):
            await kept.end()
        with pytest.raises(StoreError):
            await refused.end(ApiError(429, "not now"))
        await until(lambda: len(shelf._postponed) == 2)
        with pytest.raises(ConflictError):
            await shelf.call("ann", lambda s: s.begin_turn("ann", session, None))
    await until(lambda: not shelf._postponed)
    turn = await shelf.call("ann", lambda s: s.begin_turn("ann", session, messages=[HI]))
    path = await shelf.call("ann", lambda s: s.path("ann", session))
    assert [m.text for m in path] == ["hi", "all of it", "hi", ""] and path[-1] == turn[-1]
    assert await shelf.call("ann", lambda s: s.path("ann", other)) == []
    await shelf.close()


async def test_what_waits_for_the_database_is_bounded_and_tried_last_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeping, "RETRIES_S", ())
    monkeypatch.setattr(shelves, "POSTPONED_CHARS", shelves.LEAST_CHARS)  # room for one
    shelf = shelf_in(tmp_path)
    two = [await begun(shelf) for _ in range(2)]
    with monkeypatch.context() as patch:
        patch.setattr(ConversationStore, "_end", refuse)
        for _, kept in two:
            with pytest.raises(StoreError):
                await kept.end()
    assert shelf._stores is not None
    assert shelf._stores.conversations._under_way == {two[1][1].reply.id}
    await shelf.close()
    again = shelf_in(tmp_path)
    paths = [await again.call("ann", lambda s, i=i: s.path("ann", i)) for i, _ in two]  # type: ignore[misc]
    assert [path[-1].text for path in paths] == ["", "all of it"]
    await again.close()
