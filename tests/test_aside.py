"""Work beside the event loop: in turn for each caller, and no longer than somebody waits for it."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import CancelledError, Future

import pytest
from fakes import wait_for

from llmkit.gateway.aside import Aside, Waiting


@pytest.fixture
def aside() -> Aside:
    return Aside(2, "llmkit-test")


async def test_it_gives_what_the_work_gives(aside: Aside) -> None:
    assert await aside.run("ann", lambda _: 6 * 7) == 42
    with pytest.raises(ValueError, match="no"):
        await aside.run("ann", lambda _: int("no"))
    aside.close()


async def test_a_caller_takes_one_thread(aside: Aside) -> None:
    goes_on = threading.Event()
    slow = [asyncio.ensure_future(aside.run("ann", lambda _: goes_on.wait(30))) for _ in range(9)]
    async with asyncio.timeout(30):
        assert await aside.run("bob", lambda _: "quick") == "quick"
    goes_on.set()
    await asyncio.gather(*slow)
    aside.close()


async def test_work_ends_when_nobody_waits(aside: Aside) -> None:
    begun, ended = threading.Event(), threading.Event()

    def work(waiting: Waiting) -> None:
        begun.set()
        try:
            while True:
                waiting.check()
        except CancelledError:
            ended.set()
            raise

    task = asyncio.create_task(aside.run("ann", work))
    later = asyncio.create_task(aside.run("ann", lambda _: ended.is_set()))
    await asyncio.to_thread(wait_for, begun.is_set, 10)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await later is True, "its thread is free for the next"
    aside.close()


async def test_what_waits_for_its_turn_never_begins(aside: Aside) -> None:
    goes_on = threading.Event()
    begun: list[Waiting] = []
    slow = asyncio.ensure_future(aside.run("ann", lambda _: goes_on.wait(30)))
    others = [asyncio.create_task(aside.run("ann", begun.append)) for _ in range(3)]
    await asyncio.sleep(0)
    for other in others:
        other.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    goes_on.set()
    await slow
    assert await aside.run("ann", lambda _: begun) == []
    aside.close()


async def test_a_wait_for_something_else_ends_too(aside: Aside) -> None:
    begun, never = threading.Event(), Future[int]()

    def work(waiting: Waiting) -> int:
        begun.set()
        return waiting.result(never, 60)

    task = asyncio.create_task(aside.run("ann", work))
    await asyncio.to_thread(begun.wait, 30)
    task.cancel()
    assert await aside.run("ann", lambda _: "free") == "free"
    assert never.cancelled()
    known: Future[int] = Future()
    known.set_result(3)
    assert await aside.run("ann", lambda waiting: waiting.result(known, 60)) == 3
    with pytest.raises(TimeoutError):
        await aside.run("ann", lambda waiting: waiting.result(Future(), 0.01))
    aside.close()
