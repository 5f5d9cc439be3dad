"""Rates, budgets and requests at once, in memory, whatever the clock does."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
from datetime import UTC, date, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sqlalchemy as sa
from access_client import COMPLETION, Hands, entry, served
from fakes import FakeClient, wait_for
from gateway_client import CHAT, is_error
from hypothesis import given
from hypothesis import strategies as st

from llmkit.errors import InvalidRequestError
from llmkit.gateway.access.clock import BELIEVED_S, SteadyClock
from llmkit.gateway.access.identity import Allowance, Identity
from llmkit.gateway.access.limiting import duration, limiting
from llmkit.gateway.access.throttle import Throttle
from llmkit.gateway.access.windows import SteadyMemory, Windows
from llmkit.gateway.record import Record
from llmkit.settings.allowances import Rate, read_expiry, read_rate
from llmkit.settings.gateway import GatewayOptions
from llmkit.store.database import Database, open_database
from llmkit.store.keys import KeyStore
from llmkit.store.usage import UsageStore, UsageWriter


@pytest.mark.parametrize(
    ("text", "rate"),
    [
        ("60/minute", Rate(60, 60)),
        (" 5 / s ", Rate(5, 1)),
        ("1 per day", Rate(1, 86_400)),
        ("1000/12h", Rate(1000, 43_200)),
        ("10/Minutes", Rate(10, 60)),
    ],
)
def test_rates_as_people_write_them(text: str, rate: Rate) -> None:
    assert read_rate(text) == rate


NO_RATES = ["", "60", "/minute", "60/", "-1/minute", "0/minute", "1.5/s", "60/fortnight", "1/0s"]
NO_RATES += ["60/40d", "60/minute/second", "６０/minute", "9999999999/s", "x/minute", "60 minute"]


@pytest.mark.parametrize("wrong", NO_RATES)
def test_what_is_no_rate_is_an_error(wrong: str) -> None:
    with pytest.raises(InvalidRequestError, match="rate"):
        read_rate(wrong)


@pytest.mark.parametrize(
    ("text", "end"),
    [
        ("90d", 90 * 86_400.0),
        ("12h", 43_200.0),
        ("1970-01-31", 31 * 86_400.0),
        ("1970-01-02T00:00:00", 86_400.0),
        ("1970-01-02T00:00:00Z", 86_400.0),
        ("1970-01-02T01:00:00+01:00", 86_400.0),
        (date(1970, 1, 1), 86_400.0),
        (datetime(1970, 1, 2, tzinfo=UTC), 86_400.0),
        (None, None),
    ],
)
def test_ends_of_keys(text: Any, end: float | None) -> None:
    assert read_expiry(text, 0.0) == end


@pytest.mark.parametrize(
    "wrong", ["", "soon", "0d", "-1d", "2027-13-01", "20270131", "9" * 20 + "d"]
)
def test_what_is_no_end_is_an_error(wrong: str) -> None:
    with pytest.raises(InvalidRequestError, match="expires"):
        read_expiry(wrong, 0.0)


@given(st.lists(st.floats(0, 30), max_size=80), st.integers(1, 8), st.integers(1, 20))
def test_rates_hold_whenever_requests_come(gaps: list[float], amount: int, seconds: int) -> None:
    """No burst has more than twice the rate, and what Retry-After promises holds."""
    hands = Hands()
    windows, rate = Windows(now=lambda: hands.steady), Rate(amount, seconds)
    let_through: list[float] = []
    for gap in gaps:
        hands.pass_time(gap)
        standing = windows.take_here(rate, "ann")
        assert 0 <= standing.remaining <= amount and 0 <= standing.reset_s <= 2 * seconds
        if standing.is_allowed:
            let_through.append(hands.steady)
        else:
            assert standing.remaining == 0
            hands.pass_time(standing.reset_s + 1e-3)
            assert windows.take_here(rate, "ann").is_allowed, "what is promised holds"
            let_through.append(hands.steady)
    for start in let_through:
        assert sum(start <= t < start + seconds for t in let_through) <= 2 * amount
    span = let_through[-1] - let_through[0] if let_through else 0
    assert len(let_through) <= amount * (span / seconds + 2)


def test_the_table_of_callers_is_bounded() -> None:
    memory = SteadyMemory(most=100)
    for i in range(1000):
        assert memory.acquire_sliding_window_entry(f"address {i}", 1, 60)
    assert memory.reset() == 100


def test_a_caller_that_was_refused_is_let_in_again() -> None:
    hands = Hands()
    windows = Windows(now=lambda: hands.steady)
    rate = Rate(3, 60)
    assert [windows.take_here(rate, "a").is_allowed for _ in range(4)] == [True] * 3 + [False]
    assert windows.take_here(rate, "b").is_allowed
    hands.pass_time(120)
    assert [windows.take_here(rate, "a").is_allowed for _ in range(4)] == [True] * 3 + [False]


@pytest.mark.parametrize("jump", [-86_400.0, 86_400.0, 3600.0, -3600.0, 1e9])
def test_a_clock_that_jumps_moves_no_window(jump: float, monkeypatch: pytest.MonkeyPatch) -> None:
    windows, rate, wall = Windows(), Rate(2, 60), time.time()
    monkeypatch.setattr(time, "time", lambda: wall)
    assert [windows.take_here(rate, "a").is_allowed for _ in range(3)] == [True, True, False]
    wall += jump
    standing = windows.take_here(rate, "a")
    assert not standing.is_allowed and 50 < standing.reset_s <= 60
    assert windows.take_here(rate, "b").is_allowed


def test_a_jump_of_the_clock_counts_once_it_lasts(caplog: pytest.LogCaptureFixture) -> None:
    hands = Hands()
    clock = hands.clock()
    began = clock.now()
    hands.jump(1e6)
    with caplog.at_level(logging.WARNING):
        assert clock.now() == began
        hands.pass_time(100)
        assert clock.now() == began + 100
    assert caplog.text.count("jumped") == 1
    hands.jump(-1e6)  # it was a mistake
    assert clock.now() == began + 100
    hands.pass_time(BELIEVED_S)
    assert clock.now() == began + 100 + BELIEVED_S
    hands.jump(-5000)
    clock.now()
    hands.pass_time(BELIEVED_S + 1)
    assert clock.now() == hands.wall, "it is believed in the end"
    for _ in range(1000):  # a clock that is slewed is followed
        hands.pass_time(1)
        hands.jump(0.5)
        clock.now()
    assert clock.now() == hands.wall


def test_the_clock_is_read_by_several_threads() -> None:
    """What one doubts may be believed by another in the middle."""

    class Watched(SteadyClock):
        doubts: Any = None
        looks = 0

        @property
        def _doubted(self) -> Any:
            self.looks += 1
            return self.doubts if self.looks == 1 else None

        @_doubted.setter
        def _doubted(self, value: Any) -> None:
            self.doubts = value

    hands = Hands()
    clock = Watched(lambda: hands.wall, lambda: hands.steady)
    hands.jump(1e6)
    clock.doubts = (hands.wall - hands.steady, hands.steady)
    hands.pass_time(BELIEVED_S)
    assert clock.now() == hands.wall


@pytest.mark.parametrize(
    ("now", "day", "month"),
    [
        ("2026-11-28T23:59:59", 1.0, 2 * 86_400 + 1.0),
        ("2026-12-31T00:00:00", 86_400.0, 86_400.0),
        ("2028-02-01T12:00:00", 43_200.0, 28 * 86_400 + 43_200.0),
    ],
)
def test_what_is_left_of_day_and_month(now: str, day: float, month: float) -> None:
    wall = datetime.fromisoformat(now).replace(tzinfo=UTC).timestamp()
    clock = SteadyClock(lambda: wall, lambda: 0.0)
    assert (clock.left_of_day(), clock.left_of_month()) == (day, month)


async def test_a_rate_is_held_and_said(model: FakeClient) -> None:
    async with served([entry(rate="3/minute"), entry("bob")]) as api:
        ann = api.by("secret-ann")
        for left in (2, 1, 0):
            reply = await ann.fetch("POST", "/v1/completions", COMPLETION)
            assert reply.code == 200
            assert reply.headers["x-ratelimit-limit-requests"] == "3"
            assert reply.headers["x-ratelimit-remaining-requests"] == str(left)
            assert re.fullmatch("1m0s|60s|[345].s", reply.headers["x-ratelimit-reset-requests"])
        reply = await ann.fetch("POST", "/v1/completions", COMPLETION)
        error = is_error(reply, 429)
        assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
        assert 30 <= int(reply.headers["Retry-After"]) <= 60
        assert reply.headers["x-ratelimit-remaining-requests"] == "0"
        assert (await ann.fetch("GET", "/v1/models")).code == 200, "a look costs nothing"
        assert (await api.by("secret-bob").post("/v1/completions", COMPLETION))[0] == 200
        for path, shape in (("/v1/messages", "type"), ("/api/chat", "error")):
            body = {**CHAT, "max_tokens": 5}
            assert shape in (await ann.post(path, body))[1], "each dialect has its own error"
        streamed = await ann.fetch("POST", "/v1/completions", {**COMPLETION, "stream": True})
        assert streamed.code == 429


async def test_only_what_computes_counts(model: FakeClient) -> None:
    async with served([entry(rate="1/hour")]) as api:
        ann = api.by("secret-ann")
        assert (await ann.post("/api/show", {"model": "fake"}))[0] == 200
        assert (await ann.post("/v1/completions", COMPLETION))[0] == 200
        assert (await ann.post("/v1/completions", COMPLETION))[0] == 429
        reply = await ann.fetch("POST", "/v1/responses/resp_1/cancel", b"{}")
        assert reply.code == 404, "an answer can be ended whatever else was used up"
        assert "x-ratelimit-limit-requests" not in reply.headers
        assert (await ann.post("/api/show", {"model": "fake"}))[0] == 200


async def test_requests_at_once(model: FakeClient) -> None:
    long = {**COMPLETION, "max_tokens": 2000}
    async with served([entry(concurrent=2), entry("bob")], max_concurrent=3) as api:
        for name, most in (("ann", 2), ("bob", 3)):
            by = api.by(f"secret-{name}")
            model.runner.step_s = 0.02
            calls = [by.fetch("POST", "/v1/completions", long) for _ in range(6)]
            coming = asyncio.as_completed(calls)
            for refused in [await next(coming) for _ in range(6 - most)]:
                assert is_error(refused, 429)["code"] == "too_many_concurrent_requests"
                assert refused.headers["Retry-After"]
            model.runner.step_s = 0.0
            assert [(await each).code for each in coming] == [200] * most
            assert (await by.post("/v1/completions", COMPLETION))[0] == 200, "places come back"


async def leave(port: int, body: dict[str, Any]) -> None:
    """Read some of a stream, and go."""
    data = json.dumps(body).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(
        b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer secret-ann\r\n"
        b"Content-Length: %d\r\n\r\n%s" % (len(data), data)
    )
    assert (await reader.readline()).startswith(b"HTTP/1.1 200")
    for _ in range(20):
        await reader.readuntil(b"data: ")
    writer.close()


async def test_a_client_that_leaves_gives_its_place_back(model: FakeClient) -> None:
    model.runner.step_s = 0.02
    async with served([entry(concurrent=1)]) as api:
        ann = api.by("secret-ann")
        await leave(api.port, {**COMPLETION, "max_tokens": 4000, "stream": True})
        codes = []
        async with asyncio.timeout(30):
            while not codes or codes[-1] != 200:
                codes.append((await ann.post("/v1/completions", COMPLETION))[0])
                await asyncio.sleep(0.05)
        assert set(codes[:-1]) <= {429}, "it has its place back, and no other error on the way"


async def test_budgets(model: FakeClient, database: Database) -> None:
    """Ten tokens a request: five of the prompt, five of the answer."""
    hands = Hands(datetime(2026, 11, 29, 23, 0, tzinfo=UTC).timestamp())
    keys = [entry(tokens_per_day=20), entry("bob", tokens_per_day=1000, tokens_per_month=20)]
    async with served(keys, database, clock=hands.clock()) as api:
        for name, limit, reset in (("ann", "20", "1h0m0s"), ("bob", "20", "25h0m0s")):
            by = api.by(f"secret-{name}")
            for left in ("20", "10"):
                reply = await by.fetch("POST", "/v1/completions", COMPLETION)
                assert reply.code == 200
                assert reply.headers["x-ratelimit-limit-tokens"] == limit
                assert reply.headers["x-ratelimit-remaining-tokens"] == left
                assert reply.headers["x-ratelimit-reset-tokens"] == reset
            reply = await by.fetch("POST", "/v1/completions", COMPLETION)
            error = is_error(reply, 429)
            assert (error["type"], error["code"]) == ("insufficient_quota", "insufficient_quota")
            assert "2026-1" in error["message"] and "renewed" in error["message"]
            assert reply.headers["Retry-After"] == ("3600" if name == "ann" else "90000")
            assert reply.headers["x-should-retry"] == "false"
        hands.pass_time(3601)
        assert (await api.by("secret-ann").post("/v1/completions", COMPLETION))[0] == 200
        assert (await api.by("secret-bob").post("/v1/completions", COMPLETION))[0] == 429
        hands.pass_time(86_400)
        assert (await api.by("secret-bob").post("/v1/completions", COMPLETION))[0] == 200


async def test_budgets_survive_a_restart(model: FakeClient, tmp_path: Path) -> None:
    for number in range(3):
        database = open_database(f"sqlite:///{tmp_path}/llmkit.db")
        async with served([entry(tokens_per_day=20)], database, clock=Hands().clock()) as api:
            code, _ = await api.by("secret-ann").post("/v1/completions", COMPLETION)
            assert code == (200 if number < 2 else 429)
        database.close()


async def test_what_a_client_left_is_paid_for(model: FakeClient, database: Database) -> None:
    """Else reading all but the last word would be free."""
    model.runner.step_s = 0.01
    async with served([entry(tokens_per_day=10_000)], database) as api:
        body = {"prompt": "x" * 400, "max_tokens": 4000, "stream": True, "temperature": 0}
        await leave(api.port, body)
        usage = UsageStore(database)
        await asyncio.to_thread(wait_for, lambda: usage.tokens(date(2000, 1, 1)) != {})
        (days,) = usage.tokens(date(2000, 1, 1)).values()
        assert 100 + 5 < sum(days.values()) < 3000


async def test_embeddings_and_every_choice_are_paid_for(
    model: FakeClient, database: Database
) -> None:
    async with served([entry()], database) as api:
        ann = api.by("secret-ann")
        await ann.post("/v1/embeddings", {"model": "fake", "input": ["four", "six666"]})
        await ann.post("/v1/completions", {**COMPLETION, "n": 3})
        await ann.post("/v1/completions", {**COMPLETION, "prompt": ""})  # refused
    (days,) = UsageStore(database).tokens(date(2000, 1, 1)).values()
    assert sum(days.values()) == 10 + 3 * 10


async def test_a_budget_needs_a_database() -> None:
    with pytest.raises(InvalidRequestError, match="db_url"):
        async with served([entry(tokens_per_day=5)]):
            pass


async def test_limits_change_while_it_runs(model: FakeClient) -> None:
    async with served([entry(rate="1/hour")]) as api:
        ann = api.by("secret-ann")
        codes = [(await ann.post("/v1/completions", COMPLETION))[0] for _ in range(2)]
        assert codes == [200, 429]
        options = GatewayOptions()
        api.access.apply(options, [entry(rate="5/hour")])
        assert (await ann.post("/v1/completions", COMPLETION))[0] == 200
        with pytest.raises(InvalidRequestError):
            api.access.apply(options, [entry(rate="5/hour", tokens_per_day=5)])
        api.access.apply(options, [entry(enabled=False)])
        assert (await ann.post("/v1/completions", COMPLETION))[0] == 401


def test_failed_attempts_are_counted_by_network() -> None:
    hands = Hands()
    throttle = Throttle(Rate(3, 60), lambda: hands.steady, most=10)
    for i in range(3):
        assert throttle.wait_s("2001:db8::1") == 0
        throttle.note(f"2001:db8::{i}")
    assert 0 < throttle.wait_s("2001:db8::99") <= 61
    assert throttle.wait_s("203.0.113.9") == 0
    hands.pass_time(121)
    assert throttle.wait_s("2001:db8::1") == 0


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0ms"), (0.0204, "21ms"), (1, "1s"), (59.2, "1m0s"), (360, "6m0s"), (90_000, "25h0m0s")],
)
def test_spans_as_openai_writes_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text


async def test_the_stage_asks_no_database(database: Database) -> None:
    """Neither to let a request in nor to count it: `benchmarks/pipeline.py` measures the rest."""
    day = date.today()
    writer = UsageWriter(UsageStore(database), KeyStore(database), lambda: day, 3600)
    allowance = Allowance(rate="1000000/minute", concurrent=10, tokens_per_day=10**12)
    stage = limiting(Windows(), writer)
    exchange: Any = SimpleNamespace(
        identity=Identity("key ann", "key", allowance=allowance),
        method="POST",
        route="/v1/completions",
        record=Record(model="m"),
        counted_as="key ann",
        set_header=lambda name, value: None,
    )
    asked: list[str] = []
    sa.event.listen(database.engine, "before_cursor_execute", lambda *args: asked.append(args[2]))
    for _ in range(500):
        async with stage(exchange):  # type: ignore[union-attr]
            pass
    assert not asked
    writer.close()
    assert asked, "they were counted"
