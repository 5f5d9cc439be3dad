"""The queue is bounded and shared; those beyond it are refused at once, and told when to come
back."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from typing import Any

import pytest
from conftest import ROOT
from fake_runner import FakeRunner
from governed import CALLER, Governed, dialects, governed, message_of, until

from llmkit.gateway.access.identity import Allowance
from llmkit.gateway.access.service_rate import MAX_RETRY_S, ServiceRate


def slow(n_slots: int = 1, step_s: float = 0.01) -> FakeRunner:
    return FakeRunner(n_slots=n_slots, n_ctx=5000, step_s=step_s)


LONG = 600  # tokens: seconds, until a test lets them pass


def hurry(gate: Governed) -> None:
    """What runs takes no time from now on."""
    gate.model.runner.step_s = 0.0


def chat(text: str, max_tokens: int = 30) -> dict[str, Any]:
    return {**dialects(max_tokens, text=text)["/v1/chat/completions"], "seed": 1}


async def fill(gate: Governed, number: int, caller: str = "eve", tokens: int = LONG) -> list[Any]:
    """So many requests under way."""
    tasks = [
        asyncio.create_task(
            gate.post("/v1/chat/completions", chat(f"{caller} {i}", tokens), caller)
        )
        for i in range(number)
    ]
    await until(lambda: gate.under_way(caller) >= number)
    return tasks


@pytest.mark.parametrize("path", dialects(1))
async def test_beyond_the_queue_every_dialect_is_refused_at_once(path: str) -> None:
    async with governed(slow(), max_queue=2) as gate:
        tasks = await fill(gate, 3)
        reply = await gate.post(path, dialects(5)[path], "eve")
        assert reply.code == 503 and 1 <= int(reply.headers["Retry-After"]) <= MAX_RETRY_S
        assert "2 requests are waiting" in message_of(reply)
        assert gate.overload.refused["server_busy"] == 1
        hurry(gate)
        assert all(r.code == 200 for r in await asyncio.gather(*tasks)), "nobody else noticed"
        assert (await gate.post(path, dialects(5)[path], "eve")).code == 200


async def test_the_bound_is_exact_and_nothing_is_lost() -> None:
    async with governed(slow(n_slots=2, step_s=0.003), max_queue=3) as gate:
        replies = await asyncio.gather(
            *(gate.post("/v1/chat/completions", chat(f"n {i}"), "eve") for i in range(30))
        )
        codes = [r.code for r in replies]
        assert codes.count(200) >= 5 and codes.count(503) == 30 - codes.count(200)
        for i, reply in enumerate(replies):
            if reply.code == 200:
                text = json.loads(reply.body)["choices"][0]["message"]["content"]
                expected = gate.model.runner.reference(b"[user]n %d" % i, 30)
                assert text.encode() == expected, "its own answer"
        assert gate.overload.num_waiting == 0 and not gate.overload._callers
        assert not gate.overload._flying and not any(gate.overload._coming.values())


async def test_a_callers_own_limit_is_a_429_of_its_own() -> None:
    allowances = {"small": Allowance(concurrent=1)}
    async with governed(slow(n_slots=8), max_concurrent=3, allowances=allowances) as gate:
        tasks = await fill(gate, 3)
        refused = await gate.post("/v1/chat/completions", chat("one more"), "eve")
        assert refused.code == 429 and int(refused.headers["Retry-After"]) >= 1
        error = json.loads(refused.body)["error"]
        assert error["type"] == "rate_limit_error"
        assert error["code"] == "too_many_concurrent_requests" and "3 requests" in error["message"]
        assert (await gate.post("/v1/chat/completions", chat("ann", 3), "ann")).code == 200
        mine = asyncio.create_task(gate.post("/v1/chat/completions", chat("s", LONG), "small"))
        await until(lambda: gate.under_way("small"))
        assert (await gate.post("/v1/embeddings", {"input": "a"}, "small")).code == 429
        assert (await gate.api.fetch("GET", "/v1/models", headers={CALLER: "eve"})).code == 200
        hurry(gate)
        assert all(r.code == 200 for r in await asyncio.gather(mine, *tasks))
        assert (await gate.post("/v1/chat/completions", chat("again", 3), "eve")).code == 200


async def test_whoever_has_most_makes_way_for_a_newcomer() -> None:
    async with governed(slow(), max_queue=4) as gate:
        tasks = await fill(gate, 5, "eve")
        mine = asyncio.create_task(gate.post("/v1/chat/completions", chat("ann", 5), "ann"))
        await until(lambda: any(task.done() for task in tasks))
        hurry(gate)
        replies = await asyncio.gather(*tasks)
        assert (await mine).code == 200
        (refused,) = [r for r in replies if r.code != 200]
        assert refused.code == 503 and refused.headers["Retry-After"]
        assert "made way" in message_of(refused)
        record = next(r for r in gate.records if r.status == 503)
        assert record.error == "server_busy", "not a client that left"
        assert gate.model.stats().num_waiting == 0


async def test_the_queue_is_shared_by_weight() -> None:
    allowances = {"heavy": Allowance(weight=3.0), "eve": Allowance(weight=1.0)}
    async with governed(slow(step_s=0.02), max_queue=8, allowances=allowances) as gate:
        tasks = await fill(gate, 9, "eve")
        heavy = [
            asyncio.create_task(gate.post("/v1/chat/completions", chat(f"h {i}", 2), "heavy"))
            for i in range(9)
        ]
        await until(lambda: gate.under_way("heavy") + sum(t.done() for t in heavy) == 9)
        hurry(gate)
        codes = [r.code for r in await asyncio.gather(*heavy)]
        assert 6 <= codes.count(200) <= 8, "three quarters of the places"
        for task in tasks:
            task.cancel()


async def test_what_an_answer_is_for_gets_its_weight() -> None:
    seen: list[float] = []
    async with governed(allowances={"heavy": Allowance(weight=4.0)}) as gate:
        submit = gate.model.submit

        def watch(request: Any, submit: Any = submit) -> Any:
            seen.append(request.weight)
            return submit(request)

        gate.model.submit = watch  # type: ignore[method-assign]
        for caller in ("heavy", "ann"):
            for path, body in dialects(2).items():
                assert (await gate.post(path, body, caller)).code == 200
    assert seen == [4.0] * 6 + [1.0] * 6


async def test_a_claim_in_the_body_gives_no_weight() -> None:
    async with governed() as gate:
        reply = await gate.post("/v1/chat/completions", {**chat("a"), "weight": 50})
        assert reply.code == 400 and "weight" in message_of(reply)


async def test_large_bodies_of_the_refused_are_not_read() -> None:
    async with governed(slow(), max_queue=1) as gate:
        tasks = await fill(gate, 2)
        async with gate.connection(
            "/v1/chat/completions", b'{"messages": [', "eve", announced=10 << 20
        ) as reader:  # ten megabytes never come
            head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 30)
            assert b" 503 " in head.splitlines()[0] and b"Retry-After" in head
        hurry(gate)
        assert all(r.code == 200 for r in await asyncio.gather(*tasks))


async def test_choices_and_lists_of_prompts_count_each() -> None:
    async with governed(slow(n_slots=2), max_queue=3) as gate:
        many = asyncio.create_task(
            gate.post("/v1/completions", {"prompt": ["a", "b"], "n": 2, "max_tokens": LONG}, "eve")
        )
        await until(lambda: sum(gate.overload._flying.values()) == 4)
        assert gate.overload.num_waiting == 2
        reply = await gate.post("/v1/completions", {"prompt": "c", "n": 2}, "eve")
        assert reply.code == 503, "two more would be four"
        hurry(gate)
        assert (await many).code == 200
        lone = await gate.post(
            "/v1/completions", {"prompt": "d", "n": 8, "max_tokens": 3, "seed": 1}, "eve"
        )
        assert lone.code == 200, "who is alone may wait for all of its own"


async def test_the_engines_own_refusal_has_the_same_headers_in_every_dialect() -> None:
    async with governed(slow(), max_waiting=1) as gate:
        tasks = await fill(gate, 1, "ann")
        await until(lambda: gate.model.stats().num_running == 1)
        tasks += await fill(gate, 1, "eve", tokens=5)
        await until(lambda: gate.model.stats().num_waiting == 1)
        for path, body in dialects(5).items():
            reply = await gate.post(path, body, "eve")
            assert reply.code == 429 and 1 <= int(reply.headers["Retry-After"]) <= MAX_RETRY_S
            assert "already waiting" in message_of(reply)
        assert gate.overload.refused["queue_full"] == 6
        hurry(gate)
        await asyncio.gather(*tasks)


async def test_who_cannot_begin_in_time_is_refused() -> None:
    async with governed(slow(step_s=0.01)) as gate:
        tasks = await fill(gate, 4, tokens=30)
        more = await fill(gate, 4)
        await asyncio.gather(*tasks)  # by now it knows how fast it is
        reply = await gate.post("/v1/chat/completions", {**chat("late"), "timeout": 0.05}, "eve")
        assert reply.code == 503
        assert json.loads(reply.body)["error"]["code"] == "cannot_begin_in_time"
        assert int(reply.headers["Retry-After"]) >= 1
        hurry(gate)
        patient = await gate.post("/v1/chat/completions", {**chat("ok", 3), "timeout": 30}, "eve")
        assert patient.code == 200
        await asyncio.gather(*more)


def test_the_wait_follows_what_was_served_and_never_falls_with_the_queue() -> None:
    now = [0.0]
    rate = ServiceRate(lambda: now[0])
    assert rate.retry_after(5) == 2, "nothing is known"
    rate.served(3.0)
    assert rate.retry_after(4, at_once=2) == 6, "two at once, three seconds each"
    rate.waits(True)
    for _ in range(100):
        now[0] += 0.5
        rate.served(1.0)
    assert rate.wait_s(10) == pytest.approx(5.0, rel=0.05)
    waits = [rate.retry_after(n) for n in range(0, 2000, 7)]
    assert waits == sorted(waits) and waits[0] == 1 and waits[-1] == MAX_RETRY_S
    assert rate.retry_after(40) == rate.retry_after(40), "no jitter"
    rate.waits(False)
    now[0] += 10_000
    assert rate.wait_s(10) == pytest.approx(5.0, rel=0.05), "an idle server is not a slow one"
    rate.waits(True)
    stalled = rate.wait_s(10)
    now[0] += 60
    assert stalled is not None and (rate.wait_s(10) or 0) > 2 * stalled, "a stall is"


@pytest.mark.model
def test_a_real_server_under_twice_its_load() -> None:
    """Some seconds of what `make soak` does for two minutes, without its judgement of times."""
    script = ROOT / "benchmarks" / "overload.py"
    given = ["--seconds", "6", "--max-tokens", "10", "--slots", "2", "--queue", "3", "--load", "3"]
    done = subprocess.run(
        [sys.executable, str(script), *given], capture_output=True, text=True, timeout=300
    )
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["lost"] == result["mixed"] == 0, (result["faults"], done.stderr)
    assert result["answered"] > 10 and result["refused"] > 3
    assert result["refused_p99_ms"] < 10_000 and result["growth"] < 0.2


async def test_two_times_the_load_leaves_the_accepted_as_they_were() -> None:
    """The short form of benchmarks/overload.py."""
    async with governed(slow(n_slots=4, step_s=0.002), max_queue=8) as gate:
        taken: dict[str, list[float]] = {"alone": [], "beside": []}
        refusals: list[float] = []
        wrong: list[str] = []

        async def client(phase: str, number: int, end: float) -> None:
            for turn in range(10_000):
                if time.monotonic() > end and len(taken[phase]) > 40:
                    return
                text = f"{phase} {number} {turn}"
                start = time.monotonic()
                reply = await gate.post(
                    "/v1/chat/completions", chat(text, 20), f"caller {number % 6}"
                )
                seconds = time.monotonic() - start
                if reply.code == 200:
                    taken[phase].append(seconds)
                    content = json.loads(reply.body)["choices"][0]["message"]["content"]
                    expected = gate.model.runner.reference(f"[user]{text}".encode(), 20)
                    wrong.extend([text] if content.encode() != expected else [])
                else:
                    assert reply.code == 503 and reply.headers["Retry-After"]
                    refusals.append(seconds)
                    await asyncio.sleep(0.05)

        for phase, clients in (("alone", 12), ("beside", 24)):
            end = time.monotonic() + 2.5
            await asyncio.gather(*(client(phase, i, end) for i in range(clients)))
        assert not wrong and refusals and min(map(len, taken.values())) > 30
        middle = {phase: sorted(times)[len(times) // 2] for phase, times in taken.items()}
        assert middle["beside"] < 10 * middle["alone"]
        assert not gate.overload._callers and not gate.overload._flying
