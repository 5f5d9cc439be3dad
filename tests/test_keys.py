"""What keys open, and until when: in the database, in the settings, while a gateway runs."""

from __future__ import annotations

import asyncio
import json
import logging
import sqlite3
import time
from collections.abc import Iterator, Sequence
from datetime import date
from typing import Any

import pytest
from access_client import Hands, Served, add_key, served
from fake_runner import FakeRunner
from fakes import FakeClient, wait_for
from gateway_client import CHAT, is_error

from llmkit.bridge.server import BridgeServer
from llmkit.errors import InvalidRequestError
from llmkit.gateway.access.authenticator import Facts
from llmkit.gateway.access.keys import Keys
from llmkit.gateway.access.permission import admitting
from llmkit.gateway.access.watching import POLL_S, KeyWatch
from llmkit.gateway.failures import ApiError
from llmkit.gateway.ops.openapi import Route
from llmkit.settings.entries import KeyEntry
from llmkit.store.database import Database
from llmkit.store.keys import KeyStore
from llmkit.store.records import KeyRecord, digest, new_secret


async def status(api: Served, key: str | None, path: str = "/v1/models") -> int:
    return (await api.by(key).fetch("GET", path)).code


async def test_a_stored_key_opens_and_is_revoked_within_a_second(
    model: FakeClient, database: Database, keys: KeyStore
) -> None:
    ann, bob = add_key(keys, "ann"), add_key(keys, "bob")
    async with served(database=database) as api:

        async def becomes(key: str, wanted: int) -> None:
            async with asyncio.timeout(30):
                while await status(api, key) != wanted:
                    await asyncio.sleep(0.1)

        assert POLL_S <= 0.5, "within a second"
        assert await status(api, ann) == await status(api, bob) == 200
        assert await status(api, None) == await status(api, "llmkit-" + "A" * 43) == 401
        await asyncio.to_thread(keys.revoke, "ann", time.time())
        await becomes(ann, 401)
        error = is_error(await api.by(ann).fetch("GET", "/v1/models"), 401)
        assert "was revoked" in error["message"] and error["code"] == "invalid_api_key"
        fresh = await asyncio.to_thread(add_key, keys, "carl")
        await becomes(fresh, 200)
        rotated = new_secret()
        await asyncio.to_thread(keys.rotate, "bob", digest(rotated), time.time())
        await becomes(rotated, 200)
        assert await status(api, bob) == 401
    used = {record.name: record.last_used_at for record in keys.all()}
    assert used["carl"] is not None and abs(used["carl"] - time.time()) < 60


async def test_a_database_that_goes_leaves_keys_as_they_were(
    model: FakeClient, database: Database, keys: KeyStore, caplog: pytest.LogCaptureFixture
) -> None:
    ann = add_key(keys, "ann")
    with caplog.at_level(logging.WARNING, "llmkit.gateway"):
        async with served(database=database) as api:
            with sqlite3.connect(database.place) as connection:
                connection.execute("ALTER TABLE llmkit_changes RENAME TO away")
            await asyncio.to_thread(wait_for, lambda: "keys stay as they were" in caplog.text)
            assert await status(api, ann) == 200 and await status(api, "x") == 401
            connection.execute("ALTER TABLE away RENAME TO llmkit_changes")
            connection.close()
            await asyncio.to_thread(wait_for, lambda: "can be read again" in caplog.text)
    assert caplog.text.count("keys stay as they were") == 1


async def test_the_first_key_closes_a_gateway_for_good(
    model: FakeClient, database: Database, keys: KeyStore
) -> None:
    async with served(database=database) as api:
        assert await status(api, None) == 200
        ann = await asyncio.to_thread(add_key, keys, "ann")
        while await status(api, None) != 401:
            await asyncio.sleep(0.05)
        assert await status(api, ann) == 200
        await asyncio.to_thread(keys.revoke, "ann", time.time())
        while await status(api, ann) != 401:
            await asyncio.sleep(0.05)
        assert await status(api, None) == 401
    async with served(database=database) as api:
        assert await status(api, None) == 401, "revoked keys do not open a server again"


async def test_keys_of_the_settings(model: FakeClient) -> None:
    secret = "a-secret-of-theirs"
    entries = [
        KeyEntry(name="ann", key=secret),
        KeyEntry(name="bob", key_sha256=digest("b").upper()),
        KeyEntry(name="off", key="off", enabled=False),
        KeyEntry(name="old", key="old", expires="2020-01-01"),
        KeyEntry(name="new", key="new", expires=date(2999, 1, 1)),
    ]
    async with served(entries, api_key="the-owner") as api:
        for key in (secret, "b", "new", "the-owner"):
            assert await status(api, key) == 200
        for key, words in (("off", "is switched off"), ("old", "has expired")):
            error = is_error(await api.by(key).fetch("GET", "/v1/models"), 401)
            assert words in error["message"] and "Ask whoever" in error["message"]
        for key in ("", "A" * 20_000, digest(secret), "ann", "a-secret-of-their", "ä"):
            headers = {"Authorization": f"Bearer {key}"}
            assert (await api.fetch("GET", "/v1/models", headers=headers)).code == 401, key
        for name in ("x-api-key", "X-API-Key"):
            assert (await api.fetch("GET", "/v1/models", headers={name: secret})).code == 200
        lower = {"Authorization": f"bearer  {secret} "}
        assert (await api.fetch("GET", "/v1/models", headers=lower)).code == 200
        assert (await api.fetch("GET", "/health", headers={"x-api-key": "no"})).code == 200


async def test_a_key_ends_while_it_is_used(model: FakeClient, database: Database) -> None:
    hands = Hands()
    secret = add_key(KeyStore(database), "ann", expires_at=hands.wall + 100)
    async with served(database=database, clock=hands.clock()) as api:
        hands.jump(5000)
        assert await status(api, secret) == 200, "a clock that jumps expires nothing at once"
        hands.jump(-5000)
        hands.pass_time(99)
        assert await status(api, secret) == 200
        hands.pass_time(1)
        assert await status(api, secret) == 401


async def test_wrong_keys_are_slowed_down(model: FakeClient) -> None:
    generated = new_secret()
    entries = [KeyEntry(name="ann", key="weak"), KeyEntry(name="bob", key=generated)]
    async with served(entries, trusted_proxies=("127.0.0.1",)) as api:

        async def tried(key: str, address: str = "203.0.113.9") -> tuple[int, str]:
            headers = {"Authorization": f"Bearer {key}", "X-Forwarded-For": address}
            reply = await api.fetch("GET", "/v1/models", headers=headers)
            return reply.code, reply.headers.get("Retry-After", "")

        codes = [(await tried(f"guess {i}"))[0] for i in range(30)]
        assert codes == [401] * 20 + [429] * 10
        code, retry = await tried("weak")
        assert code == 429 and 0 < int(retry) <= 61, "the right guess is not told from a wrong one"
        assert (await tried(new_secret()))[0] == 429
        assert (await tried(generated))[0] == 200, "nobody guesses this one"
        assert (await tried("weak", "203.0.113.10"))[0] == 200, "others are not held up"
        assert (await api.fetch("GET", "/v1/models")).code == 401, "no key is no guess"


async def test_nobody_sees_a_key_in_the_logs(
    model: FakeClient, database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    secret = add_key(KeyStore(database), "ann", rate="1/hour", tokens_per_day=1)
    with caplog.at_level(logging.DEBUG):
        async with served(database=database) as api:
            for key in (secret, "wrong-" + secret):
                for path in ("/v1/chat/completions", "/nothing", "/v1/chat/completions"):
                    await api.by(key).post(path, CHAT)
            await api.by(secret).post("/v1/chat/completions", {"model": secret})
    text = caplog.text
    assert secret not in text and digest(secret) not in text


@pytest.fixture
def two_models() -> Iterator[list[str]]:
    """Two fake models; the second is the newest."""
    clients = [FakeClient(name, FakeRunner(n_ctx=5000)) for name in ("small", "large-70b")]
    bridges = [BridgeServer(client) for client in clients]
    yield [client.description.name for client in clients]
    for bridge in bridges:
        bridge.close()
    for client in clients:
        client.close()


async def test_models_that_a_key_may_not_use_are_not_there(two_models: list[str]) -> None:
    entries = [
        KeyEntry(name="ann", key="ann", models=("small",)),
        KeyEntry(name="bob", key="bob", models=("large*", "other")),
        KeyEntry(name="all", key="all"),
        KeyEntry(name="none", key="none", models=("nothing",)),
    ]
    async with served(entries) as api:
        for key, seen in (
            ("ann", {"small"}),
            ("bob", {"large-70b"}),
            ("all", {"small", "large-70b"}),
            ("none", set()),
        ):
            by = api.by(key)
            listed = json.loads((await by.fetch("GET", "/v1/models")).body)["data"]
            assert {m["id"] for m in listed} == seen
            tags = json.loads((await by.fetch("GET", "/api/tags")).body)["models"]
            assert {m["name"].removesuffix(":latest") for m in tags} == seen
            shown = json.loads((await by.fetch("GET", "/status")).body)["models"]
            assert {m["id"] for m in shown} == seen
            for name in two_models:
                bare = {"model": name, "messages": CHAT["messages"]}
                body = {**CHAT, "model": name}
                for path, sent in (
                    ("/v1/chat/completions", body),
                    ("/v1/completions", {"model": name, "prompt": "x", "max_tokens": 2}),
                    ("/v1/responses", {"model": name, "input": "x", "max_output_tokens": 2}),
                    ("/v1/messages", {**body, "max_tokens": 2}),
                    ("/v1/messages/count_tokens", bare),
                    ("/api/chat", {**bare, "stream": False}),
                    ("/api/generate", {"model": f"{name}:latest", "prompt": "x", "stream": False}),
                    ("/tokenize", {"model": name, "prompt": "x"}),
                    ("/apply-template", bare),
                    ("/v1/embeddings", {"model": name, "input": "x"}),
                ):
                    code, reply = await by.post(path, sent)
                    assert (code != 404) == (name in seen), (key, path, reply)
                    if code == 404:
                        assert not (set(two_models) - seen - {name}) & set(str(reply).split("'"))
                code = (await by.fetch("GET", f"/v1/models/{name}")).code
                assert code == (200 if name in seen else 404)
            code, reply = await by.post("/v1/chat/completions", {**CHAT, "model": "default"})
            assert (code == 200) == bool(seen)
            if seen:
                assert reply["model"] in seen


async def test_models_that_nobody_may_use(two_models: list[str]) -> None:
    async with served(allowed_models=("sm*",)) as api:
        listed = json.loads((await api.fetch("GET", "/v1/models")).body)["data"]
        assert [m["id"] for m in listed] == ["small"]
        assert (await api.post("/v1/chat/completions", {**CHAT, "model": "large-70b"}))[0] == 404


async def test_a_model_is_refused_before_it_is_loaded(model: FakeClient) -> None:
    loaded: list[str] = []

    async def name_of(name: str) -> str | None:
        return {"alias": "secret-model", "fake": "fake"}.get(name)

    async def load(exchange: Any, name: str) -> None:
        loaded.append(name)

    gateway = {"admissions": [admitting(name_of), load]}
    async with served([KeyEntry(name="ann", key="ann", models=("fake",))], gateway=gateway) as api:
        ann = api.by("ann")
        assert (await ann.post("/v1/chat/completions", {**CHAT, "model": "alias"}))[0] == 404
        assert loaded == []
        assert (await ann.post("/v1/chat/completions", CHAT))[0] == 200
        assert loaded == ["fake"]


async def answer(exchange: Any) -> None:
    exchange.send_json({"caller": exchange.caller})


ADMIN_ROUTES = [
    Route("POST", "/admin/thing", answer, "An action"),
    Route("GET", "/admin/thing", answer, "A look"),
    Route("POST", "/api/thing", answer, "An action of another dialect", scope="admin"),
]
SCOPED = [
    KeyEntry(name="user", key="user"),
    KeyEntry(name="admin", key="admin", scopes=("admin",)),
    KeyEntry(name="both", key="both", scopes=("inference", "admin")),
]


async def test_admin_routes_need_the_scope(model: FakeClient) -> None:
    async with served(SCOPED, admin=True, api_key="own", gateway={"routes": ADMIN_ROUTES}) as api:
        for key, admin, chat in (
            ("user", 403, 200),
            ("admin", 200, 403),
            ("both", 200, 200),
            ("own", 200, 200),
            ("wrong", 401, 401),
        ):
            by = api.by(key)
            for path in ("/admin/thing", "/api/thing"):
                assert (await by.fetch("POST", path, b"{}")).code == admin
            assert (await by.fetch("GET", "/admin/thing")).code == admin
            assert (await by.fetch("POST", "/v1/chat/completions", CHAT)).code == chat
            assert (await by.fetch("GET", "/v1/models")).code == (401 if key == "wrong" else 200)
        error = is_error(await api.by("user").fetch("POST", "/admin/thing", b"{}"), 403)
        assert error["code"] == "insufficient_scope" and "'admin'" in error["message"]


async def test_admin_routes_are_off_by_default(model: FakeClient) -> None:
    async with served(SCOPED, gateway={"routes": ADMIN_ROUTES}) as api:
        for path in ("/admin/thing", "/api/thing"):
            assert (await api.by("both").fetch("POST", path, b"{}")).code == 404
        assert "/thing" not in (await api.fetch("GET", "/openapi.json")).body.decode()


async def test_without_keys_only_this_machine_administers(model: FakeClient) -> None:
    async with served(
        admin=True, trusted_proxies=("127.0.0.1",), gateway={"routes": ADMIN_ROUTES}
    ) as api:
        assert (await api.fetch("POST", "/admin/thing", b"{}")).code == 200
        away = {"X-Forwarded-For": "203.0.113.9"}
        assert (await api.fetch("POST", "/admin/thing", b"{}", away)).code == 403
        assert (await api.fetch("POST", "/v1/chat/completions", CHAT, away)).code == 200


@pytest.mark.parametrize("header", ["X-Forwarded-For", "forwarded", "X-Real-IP"])
async def test_who_comes_through_a_proxy_that_nobody_named_is_not_the_owner(
    model: FakeClient, header: str
) -> None:
    async with served(admin=True, gateway={"routes": ADMIN_ROUTES}) as api:
        for value in ("203.0.113.9", "for=127.0.0.1", ""):
            assert (await api.fetch("POST", "/admin/thing", b"{}", {header: value})).code == 403
            reply = await api.fetch("POST", "/v1/chat/completions", CHAT, {header: value})
            assert reply.code == 200
        assert (await api.fetch("POST", "/admin/thing", b"{}")).code == 200


async def test_keyless_callers_hold_bytes_by_address(model: FakeClient) -> None:
    async def look(exchange: Any) -> None:
        who = exchange.counted_as
        exchange.send_json([exchange.caller, who, exchange._held.of(who)])

    gateway = {"routes": [Route("POST", "/look", look, "What is held")]}
    for entries, key, who in (
        ([], None, "address 203.0.113.9"),
        ([KeyEntry(name="ann", key="ann")], "ann", "key ann"),
    ):
        async with served(entries, trusted_proxies=("127.0.0.1",), gateway=gateway) as api:
            away = {"X-Forwarded-For": "203.0.113.9"}
            reply = await api.by(key).fetch("POST", "/look", b"x" * 100_000, away)
            assert json.loads(reply.body) == ["local" if key is None else who, who, 100_000]


def test_whatever_goes_wrong_the_keys_are_watched_on(
    keys: KeyStore, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[int] = []

    def take(records: Sequence[KeyRecord]) -> None:
        seen.append(len(records))
        if len(seen) < 3:
            raise ZeroDivisionError("nobody thought of this")

    watch = KeyWatch(keys, 0.02)
    with caplog.at_level(logging.WARNING):
        watch.start(take)
        add_key(keys, "ann")
        wait_for(lambda: "can be read again" in caplog.text)
    watch.close()
    assert seen == [1, 1, 1] and caplog.text.count("keys stay as they were") == 1
    assert "Traceback" in caplog.text, "which a database that is gone does not need"


async def test_a_key_sees_no_requests_of_others(model: FakeClient) -> None:
    async with served(SCOPED) as api:
        for key in ("user", "both"):
            await api.by(key).post("/v1/chat/completions", CHAT)
        for key, seen in (("user", {"key user"}), ("both", {"key user", "key both"})):
            state = json.loads((await api.by(key).fetch("GET", "/status")).body)
            assert {c["caller"] for c in state["callers"]} == seen


async def test_settings_may_change_while_it_runs(model: FakeClient) -> None:
    keys = Keys("first", "127.0.0.1")

    async def opens(secret: str) -> bool:
        try:
            headers = {"x-api-key": secret}
            await keys.identify(Facts("GET", "/v1/models", "127.0.0.1", "127.0.0.1", headers))
            return True
        except ApiError:
            return False

    assert await opens("first")
    with pytest.raises(InvalidRequestError):
        keys.replace("", [])
    assert await opens("first"), "a bad setting changes nothing"
    keys.replace("second", [KeyEntry(name="ann", key="third")])
    assert [await opens(s) for s in ("first", "second", "third")] == [False, True, True]
    keys.replace(None, [])
    assert [await opens(s) for s in ("second", "third", "")] == [False] * 3, "it stays closed"
