"""The events of a turn, for readers that keep up and for those that do not."""

from __future__ import annotations

import asyncio
import random
import tempfile

import pytest
from gateway_client import sessions_in

from llmkit.gateway.access.held import Held
from llmkit.gateway.access.identity import Identity
from llmkit.gateway.conversations.detached import Wish
from llmkit.gateway.conversations.log import EventLog
from llmkit.gateway.conversations.turns import Turns
from llmkit.gateway.exchange import Exchange


@pytest.mark.parametrize("seed", range(5))
def test_readers_get_every_character_once(seed: int) -> None:
    draw = random.Random(seed)

    async def run() -> None:
        log, texts = EventLog(), {"delta": "", "reasoning": ""}
        for _ in range(2000):
            kind = draw.choice(["delta", "delta", "delta", "reasoning", "call"])
            if kind == "call":
                log.add("call", call={})
                continue
            text = "".join(draw.choices("aβ中🙂", k=draw.randint(1, 5)))
            log.text(kind, text)  # type: ignore[arg-type]
            texts[kind] += text
        log.add("end", is_last=True)
        for _ in range(30):
            after, seen = 0, {"delta": "", "reasoning": ""}
            while after < log.last:
                found = list(log.since(after))
                assert [e.seq for e in found] == sorted({e.seq for e in found})
                for event in found[: draw.randint(1, len(found))]:
                    assert event.seq > after
                    after = event.seq
                    if event.type in seen:
                        seen[event.type] += event.text
            assert seen == texts
        # A reader that stopped at any number gets what it lacks.
        fast = {0: ""}
        text = ""
        for event in log.since(0):
            text += event.text
            fast[event.seq] = text
        for after, known in fast.items():
            assert known + "".join(e.text for e in log.since(after)) == text

    asyncio.run(run())


async def test_a_turn_that_nobody_waits_for_any_more_never_begins() -> None:
    entered, ended = asyncio.Event(), asyncio.Event()

    async def dispatch(exchange: Exchange) -> None:
        entered.set()
        try:
            await asyncio.Event().wait()  # in a queue, say
        finally:
            ended.set()

    with tempfile.TemporaryDirectory() as folder:
        turns = Turns(dispatch, Held(), sessions_in(folder))
        wanted = asyncio.create_task(
            turns.start(Identity("ann", "key"), "1.2.3.4", Wish("send", None), {})
        )
        await entered.wait()
        wanted.cancel()
        await asyncio.wait([wanted])
        assert wanted.cancelled()
        await asyncio.wait_for(ended.wait(), 30)
        await turns.close()
