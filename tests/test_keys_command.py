"""`llmkit keys`: a secret is shown once, and what is wrong is one line."""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from llmkit.cli import main
from llmkit.store.database import open_database
from llmkit.store.records import digest, is_generated


class TestCommand:
    """`llmkit keys`."""

    @pytest.fixture
    def run(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> Any:
        monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))

        def run(*words: str) -> tuple[int, str, str]:
            code = main(["keys", *words])
            return code, *capsys.readouterr()

        return run

    def test_a_key_is_printed_once_and_alone(self, run: Any) -> None:
        code, out, err = run(
            "add", "ann", "--rate", "60/minute", "--model", "q*", "--expires", "9d"
        )
        assert code == 0 and is_generated(out.strip()) and out.count("\n") == 1
        assert "ann" in err and out.strip() not in err
        code, listed, _ = run("list")
        assert code == 0 and out.strip() not in listed and digest(out.strip()) not in listed
        assert "ann" in listed and "60/minute" in listed and "active" in listed
        code, second, _ = run("rotate", "ann")
        assert code == 0 and is_generated(second.strip()) and second != out
        code, out, err = run("revoke", "ann")
        assert (code, out) == (0, "") and "revoked" in err
        code, out, _ = run("list", "--json")
        (row,) = json.loads(out)
        assert row["state"] == "revoked" and row["rate"] == "60/minute" and row["models"] == ["q*"]
        assert "sha256" not in out and datetime.fromisoformat(row["expires_at"]) > datetime.now(UTC)

    def test_json(self, run: Any) -> None:
        code, out, _ = run(
            "add", "ann", "--scope", "inference", "--scope", "admin", "--concurrent", "4",
            "--tokens-per-day", "1000", "--tokens-per-month", "9000", "--weight", "2", "--json",
        )  # fmt: skip
        made = json.loads(out)
        assert code == 0 and is_generated(made["key"])
        assert made["scopes"] == ["inference", "admin"] and made["concurrent"] == 4
        assert (made["tokens_per_day"], made["tokens_per_month"]) == (1000, 9000)
        assert made["weight"] == 2 and made["created_at"].endswith("+00:00")
        assert is_generated(json.loads(run("rotate", "ann", "--json")[1])["key"])
        assert json.loads(run("revoke", "ann", "--json")[1])["state"] == "revoked"

    @pytest.mark.parametrize(
        "words",
        [
            ["add", "ann", "--rate", "many"],
            ["add", "ann", "--scope", "root"],
            ["add", "ann", "--expires", "2020-01-01"],
            ["add", "ann", "--expires", "soon"],
            ["add", "ann", "--concurrent", "0"],
            ["add", "ann", "--tokens-per-day", "-5"],
            ["add", "ann", "--weight", "0"],
            ["add", "ann", "--weight", "nan"],
            ["add", "ann", "--model", ""],
            ["add", "a b"],
            ["add", "a\nb"],
            ["add", ""],
            ["revoke", "nobody"],
            ["rotate", "nobody"],
            ["list", "--db-url", "nothing"],
            ["list", "--db-url", "sqlite:////nothing/here.db"],
        ],
    )
    def test_what_is_wrong_is_one_line(self, run: Any, words: list[str]) -> None:
        code, out, err = run(*words)
        assert (code, out, err.count("\n")) == (1, "", 1) and err.startswith("llmkit: ")

    def test_a_key_that_expired_gets_a_later_end(
        self, run: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run("add", "ann", "--expires", "1h")
        later = time.time() + 7200
        monkeypatch.setattr("llmkit.cli.keys.time.time", lambda: later)
        code, out, err = run("rotate", "ann")
        assert (code, out) == (1, "") and "--expires" in err
        assert run("rotate", "ann", "--expires", "2020-01-01")[0] == 1
        code, out, _ = run("rotate", "ann", "--expires", "9d")
        assert code == 0 and is_generated(out.strip())
        later += 10 * 86_400
        assert is_generated(run("add", "ann")[1].strip()), "its name is free"

    def test_it_finds_the_gateways_database(
        self, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        url = f"sqlite:///{tmp_path}/other.db"
        config = tmp_path / "llmkit.toml"
        config.write_text(f'db_url = "{url}"\n')
        assert run("add", "ann", "--config", str(config))[0] == 0
        assert "ann" in run("list", "--db-url", url)[1]
        monkeypatch.setenv("LLMKIT_DB_URL", url)
        assert "ann" in run("list")[1]

    def test_what_was_used_is_listed(self, run: Any, tmp_path: Path) -> None:
        from llmkit.store.records import Spending
        from llmkit.store.usage import UsageStore

        run("add", "ann")
        database = open_database()
        today = datetime.now(UTC).date()
        UsageStore(database).add({"key ann": {(today, "m"): Spending(1, 40, 0, 2, 0.5)}})
        database.close()
        (row,) = json.loads(run("list", "--json")[1])
        assert row["tokens_today"] == row["tokens_this_month"] == 42
        assert "42" in run("list")[1]
