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
from llmkit.gateway.conversations import keeping
from llmkit.gateway.conversations.keeping import Keeping
from llmkit.store.conversation_records import NewMessage


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
