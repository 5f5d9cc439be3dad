"""A real PostgreSQL."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from datetime import date

import pytest
import sqlalchemy as sa
from access_client import add_key, served
from fakes import FakeClient
from gateway_client import CHAT
from postgres_server import PROGRAMS, postgres_server

from llmkit.errors import StoreError
from llmkit.store.database import open_database
from llmkit.store.keys import KeyStore
from llmkit.store.records import Spending, digest
from llmkit.store.usage import UsageStore


@pytest.fixture(scope="module")
def postgres() -> Iterator[str]:
    if not PROGRAMS:
        pytest.skip("PostgreSQL is not installed")
    with postgres_server() as url:
        yield url


class TestPostgres:
    """The same tables in a real PostgreSQL, where several gateways share them."""

    def test_keys_and_usage(self, postgres: str) -> None:
        database = open_database(postgres)
        keys, usage = KeyStore(database), UsageStore(database)
        secret = add_key(keys, "ann", models=("q*",), tokens_per_day=10**12, expires_at=1e9 + 0.25)
        (record,) = keys.all()
        assert record.sha256 == digest(secret) and record.models == ("q*",)
        assert record.tokens_per_day == 10**12 and record.expires_at == 1e9 + 0.25
        day = date(2026, 11, 28)
        for _ in range(2):
            usage.add({"key ann": {(day, "m"): Spending(1, 10**10, 0, 5, 0.5)}})
        assert usage.tokens(day) == {"key ann": {day: 2 * (10**10 + 5)}}
        threads = [threading.Thread(target=add_key, args=(keys, f"key{i}")) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert keys.version() == len(keys.all()) == 9
        database.close()

    def test_what_takes_too_long_is_an_error(
        self, postgres: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        database = open_database(postgres)
        with database.engine.connect() as connection:
            assert connection.exec_driver_sql("SHOW statement_timeout").scalar() == "10s"
        monkeypatch.setattr("llmkit.store.database.BUSY_S", 0.2)
        with (
            pytest.raises(StoreError, match="it took too long to answer"),
            database.reading() as session,
        ):
            session.execute(sa.select(sa.func.pg_sleep(30)))
        assert KeyStore(database).version() >= 0, "and goes on afterwards"
        database.close()

    async def test_a_gateway(self, postgres: str, model: FakeClient) -> None:
        database = await asyncio.to_thread(open_database, postgres)
        keys = KeyStore(database)
        secret = await asyncio.to_thread(add_key, keys, "gateway", tokens_per_day=14)
        async with served(database=database) as api:
            codes = [(await api.by(secret).post("/v1/chat/completions", CHAT))[0] for _ in "ab"]
            assert codes == [200, 429]
            await asyncio.to_thread(keys.revoke, "gateway", time.time())
            while (await api.by(secret).fetch("GET", "/v1/models")).code != 401:
                await asyncio.sleep(0.05)
        database.close()
