"""Whose a hub's token is, without a hub: what is remembered, who is slowed down, what is said at
the start, and quotas of groups."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import pytest
from settings_files import read

from llmkit.gateway.access.authenticator import Facts
from llmkit.gateway.access.hub import ADMIN_SCOPE, HubUsers
from llmkit.gateway.access.hub_tokens import HubGoneError, Owner, TokenOwners
from llmkit.gateway.access.throttle import Throttle
from llmkit.gateway.failures import ApiError
from llmkit.settings.allowances import Rate
from llmkit.settings.hub import HubOptions
from llmkit.settings.quotas import Quotas
from llmkit.settings.reload import changes
from llmkit.settings.serving import faults_of
from llmkit.store.database import Database
from llmkit.store.keys import KeyStore
from llmkit.store.records import Spending
from llmkit.store.rolling import RollingTotals
from llmkit.store.usage import UsageStore, UsageWriter

SCOPE = "access:services!service=llmkit"
ANN = Owner("ann", "user", frozenset({"students", "choir"}), frozenset({SCOPE}))
ADDRESS = "192.0.2.7"


def named(name: str) -> Owner:
    return Owner(name, "user", frozenset(), frozenset({SCOPE}))


class Asked:
    """A hub: what it knows, how often it was asked, and whether it is there. It answers once
    ``answers`` is set."""

    def __init__(self, **owners: Owner) -> None:
        self.owners, self.count, self.is_gone = owners, 0, False
        self.answers = asyncio.Event()
        self.answers.set()

    async def owner(self, token: str) -> Owner | None:
        self.count += 1
        await asyncio.sleep(0)
        await self.answers.wait()
        if self.is_gone:
            raise HubGoneError("gone")
        return self.owners.get(token)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class NoCookies:
    def token(self, headers: object) -> str:
        return ""

    def session(self, headers: object) -> str:
        return ""

    def check(self, facts: Facts, token: str) -> None:
        raise AssertionError("there is no cookie")


def facts(path: str = "/v1/models", **headers: str) -> Facts:
    return Facts("GET", path, "hub", ADDRESS, headers)


# What is remembered


async def test_an_answer_counts_for_a_while() -> None:
    hub, clock = Asked(good=ANN), Clock()
    owners = TokenOwners(hub, 60.0, now=clock)
    for _ in range(3):
        assert await owners.owner("good", "", ADDRESS) == ANN
        assert await owners.owner("bad", "", ADDRESS) is None
    assert hub.count == 2
    assert await owners.owner("good", "another login", ADDRESS) == ANN and hub.count == 3
    hub.owners.clear()
    clock.now += 59
    assert await owners.owner("good", "", ADDRESS) == ANN
    clock.now += 2
    assert await owners.owner("good", "", ADDRESS) is None, "it was revoked"


async def test_many_ask_once() -> None:
    hub = Asked(good=ANN)
    owners = TokenOwners(hub, 60.0)
    found = await asyncio.gather(*(owners.owner("good", "", ADDRESS) for _ in range(50)))
    assert found == [ANN] * 50 and hub.count == 1
    leaving = asyncio.create_task(owners.owner("other", "", ADDRESS))
    staying = asyncio.create_task(owners.owner("other", "", ADDRESS))
    await asyncio.sleep(0)
    leaving.cancel()
    assert await staying is None, "one caller that goes ends nobody else's question"


async def test_it_remembers_no_more_than_so_many() -> None:
    hub = Asked(**{f"t{i}": named(f"user {i}") for i in range(20)})
    owners = TokenOwners(hub, 60.0, most=10, throttle=Throttle(Rate(10**6, 60)))
    for i in range(20):
        await owners.owner(f"t{i}", "", ADDRESS)
    await owners.owner("t19", "", ADDRESS)
    assert hub.count == 20
    await owners.owner("t0", "", ADDRESS)
    assert hub.count == 21, "the oldest was forgotten"
    for i in range(3000):
        await owners.owner(f"bad{i}", "", ADDRESS)
    await owners.owner("t19", "", ADDRESS)
    assert hub.count == 3021, "wrong tokens displace no good ones"
    assert len(owners._unknown) == 1000


async def test_nobody_displaces_what_is_known_of_others() -> None:
    hub, bob = Asked(good=ANN, bobs=named("bob")), "198.51.100.1"
    throttle = Throttle(Rate(5, 60))
    owners = TokenOwners(hub, 3600.0, most=300, throttle=throttle)
    await owners.owner("bobs", "", bob)
    for i in range(400):
        assert await owners.owner("good", f"made up {i}", ADDRESS) == ANN
    asked = hub.count
    await owners.owner("bobs", "", bob)
    await owners.owner("good", "made up 399", ADDRESS)
    assert hub.count == asked, "ann's own sessions went"
    assert throttle.wait_s(ADDRESS) and not throttle.wait_s(bob), "and she is slowed down"


async def test_who_tries_tokens_is_slowed_down_and_locks_out_nobody() -> None:
    hub, clock = Asked(good=ANN, other=ANN, new=named("bob")), Clock()
    owners = TokenOwners(hub, 60.0, now=clock, throttle=Throttle(Rate(5, 60), clock))
    for i in range(5):
        assert await owners.owner(f"bad{i}", "", ADDRESS) is None
    assert await owners.owner("good", "", ADDRESS) == ANN, "the address is many people's"
    hub.answers.clear()
    asked = hub.count
    tries = [asyncio.create_task(owners.owner(f"bad {i}", "", ADDRESS)) for i in range(200)]
    elsewhere = asyncio.create_task(owners.owner("other", "", "198.51.100.1"))
    while hub.count < asked + 3:
        await asyncio.sleep(0)
    for _ in range(20):
        await asyncio.sleep(0)
    assert hub.count == asked + 3, "two of the tries at a time, and whoever comes from elsewhere"
    assert await owners.owner("good", "", ADDRESS) == ANN, "it was good before"
    with pytest.raises(ApiError) as refused:
        await owners.owner("bad 200", "", ADDRESS)
    assert refused.value.status == 429 and int(refused.value.headers["Retry-After"]) > 0
    hub.answers.set()
    assert await elsewhere == ANN
    assert await asyncio.gather(*tries) == [None] * 200
    assert await owners.owner("new", "", ADDRESS) == named("bob")


async def test_a_hub_that_hangs_holds_up_nobody_who_is_known() -> None:
    hub, clock = Asked(good=ANN, also=named("bob")), Clock()
    owners = TokenOwners(hub, 60.0, now=clock, patience_s=0.01)
    for token in ("good", "also"):
        await owners.owner(token, "", ADDRESS)
    hub.answers.clear()
    clock.now += 61
    assert await owners.owner("good", "", ADDRESS) == ANN
    before = hub.count
    assert await owners.owner("also", "", ADDRESS) == named("bob"), "at once"
    del hub.owners["good"]
    hub.answers.set()
    async with asyncio.timeout(30):
        while await owners.owner("good", "", ADDRESS) is not None:
            await asyncio.sleep(0)
    assert hub.count == before + 1, "the questions went on"


async def test_strangers_behind_a_hub_that_has_gone_do_not_wait_in_turn() -> None:
    hub = Asked()
    owners = TokenOwners(hub, 60.0)
    hub.answers.clear()
    waiting = [asyncio.create_task(owners.owner(f"t{i}", "", ADDRESS)) for i in range(40)]
    while hub.count < 16:
        await asyncio.sleep(0)
    hub.is_gone = True
    hub.answers.set()
    for refused in await asyncio.gather(*waiting, return_exceptions=True):
        assert isinstance(refused, ApiError) and refused.status == 503
    assert hub.count == 16, "nobody asked it again"


async def test_while_the_hub_does_not_answer(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "llmkit.gateway")
    hub, clock = Asked(good=ANN, other=ANN), Clock()
    owners = TokenOwners(hub, 60.0, now=clock)
    await owners.owner("good", "", ADDRESS)
    hub.is_gone = True
    clock.now += 120
    assert await owners.owner("good", "", ADDRESS) == ANN
    for _ in range(3):
        with pytest.raises(ApiError) as refused:
            await owners.owner("other", "", ADDRESS)
        assert refused.value.status == 503 and refused.value.headers["Retry-After"]
    assert hub.count == 2, "it is not asked again at once"
    clock.now += 300
    with pytest.raises(ApiError):
        await owners.owner("good", "", ADDRESS)
    hub.is_gone = False
    clock.now += 3
    assert await owners.owner("other", "", ADDRESS) == ANN
    assert [record.message for record in caplog.records] == [
        "tokens cannot be verified: gone", "the hub answers again"
    ], "once for an outage"  # fmt: skip


# Who it is


async def test_identities() -> None:
    admin = Owner("dan", "user", frozenset(), frozenset({"access:services", ADMIN_SCOPE}))
    robot = Owner("ann", "service", frozenset(), frozenset({SCOPE}))
    lacking = Owner("cat", "user", frozenset(), frozenset({"access:services!service=x"}))
    hub = Asked(ann=ANN, dan=admin, robot=robot, cat=lacking)
    quotas = Quotas.of(
        {"requests_per_minute": 9, "concurrent": 1},
        {"students": {"concurrent": 2, "tokens_per_day": 500}, "choir": {"concurrent": 4}},
    )
    users = HubUsers(TokenOwners(hub, 60.0), NoCookies(), SCOPE, HubOptions(), quotas)
    ann = await users.identify(facts(Authorization="token ann"))
    assert (ann.name, ann.kind, ann.groups) == ("hub user ann", "user", ANN.groups)
    assert ann.scopes == {"inference"} and ann.cache_scope is None
    allowed = ann.allowance
    assert (allowed.rate, allowed.concurrent, allowed.tokens_in_24h) == ("9/minute", 4, None)
    dan = await users.identify(facts(**{"x-api-key": "dan"}))
    assert dan.scopes == {"inference", "admin"} and dan.allowance.concurrent == 1
    service = await users.identify(facts(Authorization="Bearer robot"))
    assert (service.name, service.kind) == ("hub service ann", "service")
    with pytest.raises(ApiError, match="access:services!service=llmkit") as refused:
        await users.identify(facts(Authorization="Bearer cat"))
    assert refused.value.status == 403
    for given in ({}, {"Authorization": "Basic YTpi"}, {"Authorization": "Bearer ü"}):
        with pytest.raises(ApiError) as refused:
            await users.identify(facts(**given))
        assert refused.value.status == 401
    assert not (await users.identify(facts("/health"))).scopes
    for scope, shared in (("group", "hub group choir"), ("hub", "hub"), ("user", None)):
        users.apply(HubOptions(cache_scope=scope), Quotas())
        again = await users.identify(facts(Authorization="Bearer ann"))
        assert again.cache_scope == shared and again.allowance.rate is None


# Quotas


QUOTA = """
[quota.default]
tokens_per_day = 1000
[quota.groups.students]
requests_per_minute = 5
[quota.groups."computer science"]
tokens_per_day = 5000
"""


def test_quotas_of_a_file(tmp_path: Path) -> None:
    quotas = read(QUOTA, tmp_path).quotas
    assert quotas.of_groups(()).tokens_per_day == 1000
    both = quotas.of_groups({"students", "computer science", "else"})
    assert (both.tokens_per_day, both.requests_per_minute) == (5000, None), "the most generous"
    alone = quotas.of_groups({"students"})
    assert (alone.tokens_per_day, alone.requests_per_minute) == (1000, 5)
    old, new = read(QUOTA, tmp_path), read(QUOTA.replace("5000", "6000"), tmp_path)
    (change,) = changes(old, new)
    assert str(change) == 'quota.groups."computer science".tokens_per_day 5000 -> 6000'
    assert change.live


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("quota = 5", "quotas belong in tables [quota.default] or [quota.groups.NAME]"),
        ("[quota.students]\nconcurrent = 1", "quota.students"),
        ("[quota]\ngroups = 1", "quota.groups"),
        ("[quota.groups]\nstudents = 1", "quota.groups.students"),
        ("[quota.default]\ntokens = 1", "quota.default.tokens is not a setting"),
        ("[quota.default]\nconcurrent = 0", "quota.default.concurrent must be"),
        ("requests_per_minute = 5", "[quota.default] or [quota.groups.NAME]"),
    ],
)
def test_faults_of_quotas(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "llmkit.toml"
    file.write_text(text)
    (fault,) = faults_of(file)
    assert said in fault.message and fault.line is not None


def test_windows_roll() -> None:
    totals, hour = RollingTotals(), 3600.0
    for time in (0.0, 2 * hour, 10 * hour):
        totals.count("ann", time, 100)
    assert totals.standing("ann", 23 * hour, 250) == (300, 1.5 * hour)
    assert totals.standing("ann", 24.4 * hour, 250)[0] == 300
    assert totals.standing("ann", 24.6 * hour, 250) == (200, 0.0)
    assert totals.standing("ann", 24.6 * hour, 100)[1] == pytest.approx(9.9 * hour)
    assert totals.standing("bob", 0.0, 1) == (0, 0.0)


def test_windows_are_written_down(database: Database) -> None:
    """By two gateways with one database, also over a restart; old half hours go."""
    from datetime import UTC, datetime

    now = [1_800_000_000.0]

    def writer() -> UsageWriter:
        def today() -> object:
            return datetime.fromtimestamp(now[0], UTC).date()

        usage, keys = UsageStore(database), KeyStore(database)
        return UsageWriter(usage, keys, today, 3600, lambda: now[0])  # type: ignore[arg-type]

    one, other = writer(), writer()
    one.add("ann", "m", Spending(1, 30, 0, 12, 0.1))
    assert one.in_window("ann", 100) == (42, 0.0) and one.flush()
    other.add("ann", "m", Spending(1, 50, 0, 8, 0.1))
    assert other.flush()
    assert other.in_window("ann", 100)[0] == 100
    assert [row[0] for row in other.rows(datetime.fromtimestamp(now[0], UTC).date())] == ["ann"]
    one.close()
    other.close()
    now[0] += 20 * 3600
    again = writer()
    assert again.in_window("ann", 100)[0] == 100
    now[0] += 5 * 3600
    assert again.in_window("ann", 100)[0] == 0
    now[0] += 48 * 3600
    again.add("bob", "m", Spending(1, 1, 0, 1, 0.1))
    again.flush()
    assert set(UsageStore(database).half_hours(0)) == {"bob"}
    again.close()
