"""The events of a turn, for readers that keep up and for those that do not."""

from __future__ import annotations

import asyncio
import random

import pytest

from llmkit.gateway.conversations.log import EventLog


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
