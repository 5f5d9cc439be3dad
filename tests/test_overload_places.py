"""Places in the queue: whose they are, when they are free again, and who makes way."""

from __future__ import annotations

import asyncio
import contextlib
import json
from types import SimpleNamespace
from typing import Any

import pytest
from fake_runner import FakeRunner
from governed import CALLER, Governed, dialects, governed, message_of, until

from llmkit.gateway.access.identity import Identity
from llmkit.gateway.failures import ApiError
from llmkit.gateway.record import Record
from llmkit.gateway.response_cache import ResponseCache
from llmkit.protocol import Completion, FinishReason
from llmkit.protocol.stream import Channel

PATH = "/v1/chat/completions"
LONG = 600  # tokens: seconds, until a test lets them pass


def slow(n_slots: int = 1) -> FakeRunner:
    return FakeRunner(n_slots=n_slots, n_ctx=5000, step_s=0.01)


def chat(text: str, max_tokens: int = 30, **more: Any) -> dict[str, Any]:
    return {**dialects(max_tokens, text=text)[PATH], **more}


def hurry(gate: Governed) -> None:
    """What runs takes no time from now on."""
    gate.model.runner.step_s = 0.0


def begin(gate: Governed, number: int, caller: str, tokens: int = LONG) -> list[asyncio.Task[Any]]:
    return [
        asyncio.create_task(gate.post(PATH, chat(f"{caller} {i}", tokens), caller))
        for i in range(number)
    ]


def is_empty(gate: Governed) -> bool:
    overload = gate.overload
    return not (
        overload.num_waiting
        or overload._callers
        or overload._readers
        or overload._flying
        or any(overload._coming.values())
    )


async def test_an_answer_that_is_ready_holds_no_place_however_slowly_it_is_read() -> None:
    async with governed(slow(2), max_queue=2) as gate:
        overload = gate.overload
        (model,) = overload._load._engines()

        def exchange(caller: str) -> Any:
            identity = Identity(caller, "key")
            return SimpleNamespace(
                method="POST", route=PATH, identity=identity, counted_as=caller, record=Record()
            )

        channels = [Channel(f"r{i}", lambda _: None) for i in range(4)]
        with contextlib.ExitStack() as stack:
            for channel in channels:
                reader = exchange("slow")
                stack.enter_context(overload.stage(reader))
                overload.admit(reader, model, 1)
                overload.submitted(reader, [channel])
                reader.record.first_token_at = 1.0  # it is being read
            assert overload.num_waiting == 2
            with pytest.raises(ApiError, match="busy"), overload.stage(exchange("ann")):
                pass
            for channel in channels[:3]:
                channel.finish(Completion("", FinishReason.STOP))
            for _ in range(3):
                quick = exchange("ann")
                stack.enter_context(overload.stage(quick))
                overload.admit(quick, model, 1)
                overload.submitted(quick, [Channel("a", lambda _: None)])
            assert overload.num_waiting == 2 and overload._callers["slow"].count == 1
        assert is_empty(gate)


async def test_a_request_for_more_than_fits_displaces_nobody() -> None:
    async with governed(slow(), max_queue=4) as gate:
        tasks = begin(gate, 5, "eve")
        await until(lambda: gate.under_way("eve") == 5)
        refused = await gate.post(PATH, chat("ann", 3, n=100), "ann")
        assert refused.code == 503 and "busy" in message_of(refused)
        assert gate.under_way("eve") == 5
        two = asyncio.create_task(gate.post(PATH, chat("ann", 3, n=2), "ann"))
        await until(lambda: sum(task.done() for task in tasks) == 2)
        hurry(gate)
        codes = [r.code for r in await asyncio.gather(*tasks)]
        assert (await two).code == 200 and sorted(codes) == [200] * 3 + [503] * 2, (
            "a place for each"
        )
        await until(lambda: is_empty(gate))


async def test_a_stored_answer_and_a_joiner_take_no_place() -> None:
    cache = ResponseCache(1 << 20, 600)
    async with governed(slow(), max_queue=1, cache=cache) as gate:
        stored = await gate.post(PATH, chat("stored", 20, stream=True), "ann")
        assert stored.code == 200
        async with gate.connection(PATH, chat("long", 4000, stream=True), "eve") as first:
            await first.readuntil(b"content")
            for _ in range(5):  # they are computed already, as the first one's
                async with gate.connection(PATH, chat("long", 4000, stream=True), "eve") as more:
                    await more.readuntil(b"content")
                    assert gate.overload.num_waiting == 0
            hits = await asyncio.gather(
                *(gate.post(PATH, chat("stored", 20, stream=True), "ann") for _ in range(5))
            )
            assert [r.headers["x-llmkit-cache"] for r in hits] == ["hit"] * 5
            assert sum(gate.overload._flying.values()) == 1
        await until(lambda: is_empty(gate))


async def test_what_another_request_goes_on_with_is_counted_for_that_one() -> None:
    cache = ResponseCache(1 << 20, 600)
    async with governed(slow(), max_queue=1, cache=cache) as gate:
        body = chat("long", LONG, stream=True)
        async with gate.connection(PATH, body, "eve") as first:
            await first.readuntil(b"content")
            other = asyncio.create_task(gate.post(PATH, body, "eve"))
            await until(lambda: cache.joined == 1)
        await until(lambda: gate.under_way("eve") == 1)
        assert sum(gate.overload._flying.values()) == 1, "the second one's now"
        waiting = begin(gate, 1, "ann", 5)
        await until(lambda: gate.under_way("ann") == 1)
        assert (await gate.post(PATH, chat("bob"), "ann")).code == 503
        hurry(gate)
        assert (await other).code == 200
        assert [r.code for r in await asyncio.gather(*waiting)] == [200]
        await until(lambda: is_empty(gate))


async def test_a_running_computation_is_joined_by_its_own_caller_only() -> None:
    cache = ResponseCache(1 << 20, 600, shared=True)
    async with governed(slow(4), cache=cache) as gate:
        tasks = [
            asyncio.create_task(gate.post(PATH, chat("same", LONG), f"c{i % 3}")) for i in range(9)
        ]
        await until(lambda: cache.joined == 6)
        hurry(gate)
        replies = await asyncio.gather(*tasks)
        texts = {json.loads(r.body)["choices"][0]["message"]["content"] for r in replies}
        assert len(texts) == 1
        assert gate.model.stats().requests_total == 3 and cache.joined == 6
        late = await gate.post(PATH, chat("same", LONG), "somebody else")
        assert late.headers["x-llmkit-cache"] == "hit", "what is stored is shared"


async def test_a_fresh_answer_replaces_the_one_under_way() -> None:
    cache = ResponseCache(1 << 20, 600)
    async with governed(slow(2), cache=cache) as gate:
        body = chat("again", LONG)
        first = asyncio.create_task(gate.post(PATH, body, "ann"))
        await until(lambda: cache.misses == 1)
        second = asyncio.create_task(gate.post(PATH, body, "ann", cache_control="no-cache"))
        await until(lambda: cache.misses == 2)
        joining = asyncio.create_task(gate.post(PATH, body, "ann"))
        await until(lambda: cache.joined == 1)
        hurry(gate)
        third = await joining
        assert third.headers["x-llmkit-cache"] == "hit" and cache.joined == 1
        assert (await first).code == (await second).code == 200
        assert len(cache) == 1 and not cache._flights


async def test_counting_waits_for_admission() -> None:
    """Anthropic's streams begin with the length of the prompt: no way round the queue's bound."""
    async with governed(slow(), max_queue=1) as gate:
        tasks = begin(gate, 2, "eve")
        await until(lambda: gate.under_way("eve") == 2)
        counted: list[str] = []
        tokenize = gate.model.inquire

        def watch(inquiry: Any) -> Any:
            counted.append(type(inquiry).__name__)
            return tokenize(inquiry)

        gate.model.inquire = watch  # type: ignore[method-assign]
        body = dialects(5, stream=True)["/v1/messages"]
        reply = await gate.api.fetch("POST", "/v1/messages", body, {CALLER: "eve"})
        assert reply.code == 503 and not counted
        hurry(gate)
        await asyncio.gather(*tasks)
