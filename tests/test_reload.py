"""Settings that are read again while a server runs."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from settings_files import FULL, write

from llmkit.errors import ModelLoadError
from llmkit.settings.entries import KEY_OPTIONS
from llmkit.settings.gateway import GATEWAY_OPTIONS
from llmkit.settings.options import OPTIONS
from llmkit.settings.reload import changes, reload, taken_over
from llmkit.settings.sampling import SAMPLING_OPTIONS
from llmkit.settings.serving import ServeSettings, read_settings

# Reloading


def settings_of(text: str, folder: Path, **given: Any) -> ServeSettings:
    return read_settings(given, write(folder, text), {})


def test_what_can_change_at_run_time_is_taken_over_and_the_rest_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    old = settings_of(FULL, tmp_path)
    text = FULL.replace("port = 4000", 'port = 5000\nlog_level = "debug"\nrate = "5/s"')
    text = text.replace("n_slots = 2", "n_slots = 3\nmax_tokens_limit = 9")
    text = text.replace("top_k = 5", "top_k = 6").replace("sk-ann", "sk-new")
    text += "[keys.bob]\nkey = 'sk-bob'\n[models.big]\n"
    applied: list[ServeSettings] = []
    with caplog.at_level(logging.INFO):
        now = reload(old, lambda: settings_of(text, tmp_path), applied.append)
    assert applied == [now]
    assert (now.gateway.port, now.gateway.log_level, now.gateway.rate) == (4000, "debug", "5/s")
    assert [key.key for key in now.keys] == ["sk-new", "sk-bob"]
    (small,) = now.models
    assert small.engine["n_slots"] == 2 and small.max_tokens_limit == 9
    assert small.sampling == {"top_k": 6}
    done, later = caplog.messages
    assert "log_level" in done and "rate unset -> " in done and "keys.bob is new" in done
    assert "keys.ann.key is another one" in done and "max_tokens_limit unset -> 9" in done
    assert "restart" in later and "port 4000 -> 5000" in later and "models.big is new" in later
    assert "models.small.n_slots 2 -> 3" in later
    assert "sk-" not in caplog.text
    # What waits for a restart is told again each time; what was taken over is not.
    assert {c.live for c in changes(now, settings_of(text, tmp_path))} == {False}


def test_a_bad_file_changes_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    old = settings_of(FULL, tmp_path)

    def never(_: ServeSettings) -> None:
        raise AssertionError("applied")

    for text in ("port = ", "log_level = 'trace'", FULL + "[keys.bob]\n"):
        assert reload(old, lambda text=text: settings_of(text, tmp_path), never) is old
    assert len(caplog.messages) == 3
    assert all("stay as they were" in message for message in caplog.messages)
    (tmp_path / "llmkit.toml").unlink()
    assert reload(old, lambda: read_settings({}, old.file, {}), never) is old

    def fails(_: ServeSettings) -> None:
        raise ModelLoadError("the certificate does not fit its key")

    assert reload(old, lambda: settings_of(FULL, tmp_path), fails) is old
    assert "does not fit" in caplog.text


def test_nothing_new_is_applied_all_the_same(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Certificates may have changed behind their paths."""
    old = settings_of(FULL, tmp_path)
    applied: list[ServeSettings] = []
    with caplog.at_level(logging.INFO):
        now = reload(old, lambda: settings_of(FULL, tmp_path), applied.append)
    assert now == old and applied == [old] and "nothing changes" in caplog.text


def test_a_key_that_is_gone_is_gone(tmp_path: Path) -> None:
    old = settings_of(FULL, tmp_path)
    new = settings_of(FULL.partition("[keys.ann]")[0], tmp_path)
    assert [str(change) for change in changes(old, new)] == ["keys.ann is gone"]
    now = taken_over(old, new)
    assert now.keys == () and not any(key.startswith("keys.") for key in now.sources)


def test_the_command_line_stays_in_charge(tmp_path: Path) -> None:
    old = settings_of("log_level = 'info'", tmp_path, log_level="error")
    new = settings_of("log_level = 'debug'", tmp_path, log_level="error")
    assert changes(old, new) == []


def test_what_is_live() -> None:
    """The promise of the documentation."""
    live = {name for name, row in GATEWAY_OPTIONS.items() if row.live}
    assert live == {
        "access_log", "allowed_models", "api_key", "cors_origins", "default_max_tokens",
        "default_model", "log_level", "max_concurrent", "max_prompt_chars", "max_queue",
        "max_tokens_limit", "media_hosts", "over_limit", "rate", "request_timeout_s",
        "tls_cert", "tls_key",
    }  # fmt: skip
    assert all(row.live for row in (*KEY_OPTIONS.values(), *SAMPLING_OPTIONS.values()))
    assert not any(row.live for row in OPTIONS.values())
