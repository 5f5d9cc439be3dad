"""Tokens used, as the database keeps them: nothing is lost, and several gateways share them."""

from __future__ import annotations

import logging
import time
from datetime import date
from typing import Any

import pytest
from fakes import wait_for

from llmkit.store.database import Database
from llmkit.store.keys import KeyStore
from llmkit.store.records import Spending
from llmkit.store.usage import UsageStore, UsageWriter


class TestUsage:
    """What is written down, and what is not lost when it cannot be."""

    def test_two_gateways_share_a_database(self, database: Database) -> None:
        day = date(2026, 11, 28)
        both = [
            UsageWriter(UsageStore(database), KeyStore(database), lambda: day, 3600)
            for _ in range(2)
        ]
        for writer in both:
            writer.add("ann", "m", Spending(1, 10, 0, 5, 0.5))
            assert writer.flush()
        assert both[1].tokens("ann", day) == (30, 30)
        assert both[0].tokens("ann", day) == (15, 15)
        both[0].flush()
        assert both[0].tokens("ann", day) == (30, 30)
        for writer in both:
            writer.close()

    def test_months_and_days(self, database: Database) -> None:
        today = [date(2026, 11, 30)]
        writer = UsageWriter(UsageStore(database), KeyStore(database), lambda: today[0], 3600)
        for day in (date(2026, 11, 29), date(2026, 11, 30), date(2026, 12, 1)):
            today[0] = day
            writer.add("ann", "m", Spending(1, 1, 0, 0, 0.1))
            writer.add("ann", "n", Spending(1, 2, 0, 0, 0.1))
        assert writer.tokens("ann", date(2026, 11, 30)) == (3, 6)
        assert writer.tokens("ann", date(2026, 12, 1)) == (3, 3)
        today[0] = date(2026, 11, 30)
        writer.flush()
        assert writer.tokens("ann", date(2026, 11, 30)) == (3, 6)
        writer.close()

    def test_a_full_disk_loses_nothing(
        self, database: Database, caplog: pytest.LogCaptureFixture
    ) -> None:
        day = date(2026, 11, 28)
        writer = UsageWriter(UsageStore(database), KeyStore(database), lambda: day, 3600)
        with database.engine.connect() as connection:
            pages = connection.exec_driver_sql("PRAGMA page_count").scalar()
            connection.exec_driver_sql(f"PRAGMA max_page_count={pages}")  # for this connection
        with caplog.at_level(logging.WARNING):
            for i in range(300):
                writer.add(f"caller {i:0200d}", "m", Spending(1, 10, 0, 5, 0.5))
            assert not writer.flush() and not writer.flush()
            assert caplog.text.count("its disk is full") == 1
            assert writer.tokens(f"caller {7:0200d}", day) == (15, 15)
            with database.engine.connect() as connection:
                connection.exec_driver_sql("PRAGMA max_page_count=100000")
            assert writer.flush()
            assert "written down again" in caplog.text
        writer.close()
        assert len(UsageStore(database).tokens(day)) == 300

    def test_whatever_goes_wrong_nothing_is_lost(
        self,
        database: Database,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        day = date(2026, 11, 28)
        usage = UsageStore(database)
        writer = UsageWriter(usage, KeyStore(database), lambda: day, 0.02)
        with caplog.at_level(logging.WARNING), monkeypatch.context() as broken:
            broken.setattr(usage, "add", lambda entries: 1 / 0)
            writer.add("ann", "m", Spending(1, 10, 0, 5, 0.5))
            wait_for(lambda: "only in memory" in caplog.text)
            time.sleep(0.1)
            assert caplog.text.count("only in memory") == 1
            assert writer.tokens("ann", day) == (15, 15)
        wait_for(lambda: usage.tokens(day) == {"ann": {day: 15}})
        writer.close()

    def test_an_idle_gateway_seldom_reads(
        self, database: Database, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        day, reads = date(2026, 11, 28), 0
        monkeypatch.setattr("llmkit.store.usage.READ_S", 1000.0)

        class Counted(UsageStore):
            def tokens(self, since: date) -> Any:
                nonlocal reads
                reads += 1
                return super().tokens(since)

        writer = UsageWriter(Counted(database), KeyStore(database), lambda: day, 0.01)
        wait_for(lambda: reads == 1)
        time.sleep(0.3)
        assert reads == 1
        writer.add("ann", "m", Spending(1, 10, 0, 5, 0.5))
        wait_for(lambda: reads == 2)
        UsageStore(database).add({"bob": {(day, "m"): Spending(1, 1, 0, 1, 0.5)}})
        monkeypatch.setattr("llmkit.store.usage.READ_S", 0.05)
        wait_for(lambda: writer.tokens("bob", day) == (2, 2))
        writer.close()

    def test_it_is_written_within_seconds(self, database: Database) -> None:
        day = date(2026, 11, 28)
        writer = UsageWriter(UsageStore(database), KeyStore(database), lambda: day, 0.05)
        writer.add("ann", "m", Spending(1, 10, 0, 5, 0.5))
        wait_for(lambda: UsageStore(database).tokens(day) == {"ann": {day: 15}})
        writer.close()
