"""Mistakes in settings: each is named with its line and with what is right."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from settings_files import ALL_ROWS, write

from llmkit.errors import InvalidRequestError
from llmkit.settings.serving import faults_of, read_settings

MISTAKES = {
    # One key
    "prot = 1": "prot is not a setting; did you mean port",
    "n-ctx = 1": "did you mean n_ctx",
    "Port = 1": "did you mean port",
    "max_model_len = 1": "did you mean n_ctx",
    "parallel = 1": "did you mean n_slots",
    "isolated = true": "has a process of its own",
    "temperature = 1": r"belongs into \[sampling\]",
    "key_sha256 = 'a'": r"belongs into \[keys.NAME\]",
    "port = '3000'": "port must be an integer from 0 to 65535, not '3000'",
    "port = 70000": "0 to 65535",
    "port = 3000.0": "an integer",
    "port = true": "an integer",
    "drain_s = nan": "a number from 0 to 86400",
    "body_mb = inf": "a number from",
    "strict = 1": "strict must be true or false",
    "log_level = 'trace'": "one of debug, info, warning, error",
    "base_path = 'llm'": "a path such as /llm",
    "base_path = '/llm/'": "a path such as /llm",
    "base_path = '/a/../b'": "a path such as /llm",
    "base_path = '/a?b'": "a path such as /llm",
    "host = ''": "not empty",
    "host = 'a\\nb'": "",
    'host = "a\\nb"': "one line",
    "cors_origins = 'https://a.example/'": "without a path or a slash",
    "cors_origins = ['https://a.example', 'a.example']": "not 'a.example'",
    "cors_origins = ['https://*.example']": "origins such as",
    "cors_origins = ['https://a.example:99999']": "origins such as",
    "cors_origins = 3": "must be a list of texts",
    "cors_origins = [3]": "not 3",
    "trusted_proxies = '10.0.0.1/8'": r"did you mean 10\.0\.0\.0/8",
    "trusted_proxies = '10.0.0.0/33'": "addresses or networks",
    "trusted_proxies = 'localhost'": "addresses or networks",
    "rate = '60'": "60/minute",
    "rate = '60/fortnight'": "60/minute",
    "rate = '0/minute'": "at least one request",
    "rate = 60": "must be a text",
    "db_url = 'mysql://ann:secret@host/db'": "sqlite:// or postgresql://",
    "fleet_listen = '10.0.0.5:7100'": "an address such as tcp://10.0.0.5:7100",
    "fleet_listen = 'tcp://10.0.0.5:7100'": "needs fleet_key_file as well",
    "redis_url = 'redis://'": "followed by a host",
    "redis_url = 'redis://h:99999'": "valid host and port",
    "otlp_endpoint = 'localhost:4318'": "begins with http://",
    "tls_cert = 'a.pem'": "tls_cert needs tls_key",
    "default_max_tokens = 9\nmax_tokens_limit = 8": r"default_max_tokens must be at most .*8",
    "n_gpu_layers = 'all'": "-1",
    "kv_tokens = 256": "kv_unified",
    "api_key = ''": "api_key must be printable ASCII",
    "api_key = 'pä'": "api_key must be printable ASCII",
    "model = ['a', 'a']": "twice",
    "model = ['a', 'b']\nname = 'c'": r"tables \[models.NAME\]",
    "name = 'c'\nmodel = 'a'\n[models.a]": "has one",
    # Tables
    "models = ['a']": r"a list of models is model = ",
    "[[models]]\nname = 'a'": r"must be tables \[models.NAME\]",
    "[models]\na = 1": r"models.a must be a table: \[models.a\]",
    "[model.a]\nn_ctx = 1": r"say \[models.NAME\]",
    "[port]\na = 1": "port is a setting, not a table",
    "[samplng]\ntop_k = 1": r"did you mean \[sampling\]",
    "sampling = 1": "sampling must be a table",
    "[sampling]\nrepetition_penalty = 1": "did you mean repeat_penalty",
    "[sampling]\ntop_p = 2": "sampling.top_p must be a number from 0 to 1",
    "[models.small]\nn_ctx = 0": r"models\.small\.n_ctx must be an integer from 1",
    "[models.small]\nnctx = 1": r"models\.small\.nctx is not a setting; did you mean n_ctx",
    "[models.small]\npath = 'x'": "did you mean model",
    "[models.small]\nport = 1": "at the top of the file",
    "[models.small]\nkv_tokens = 256": r"models\.small\.kv_tokens",
    "[models.small]\nquantize = 'Q4'": r"models\.small\.quantize",
    "[models.small.sampling]\ntemprature = 1": r"models\.small\.sampling\.temprature.*temperature",
    "[models.small]\nsampling = 1": r"models\.small\.sampling",
    "[models.default]": "stands for another",
    "[models.a]\naliases = ['b']\n[models.b]": "is a name of 'a' already",
    "[models.a]\naliases = ['b b']": r"models\.a\.aliases",
    "default_model = 'smal'\n[models.small]": "did you mean 'small'",
    "[keys.ann]": "either key or key_sha256",
    "[keys.ann]\nkey = 'a'\nkey_sha256 = '" + "0" * 64 + "'": "not both",
    "[keys.ann]\nkey_sha256 = '00'": "64 hexadecimal digits",
    "[keys.ann]\nkey = 'a'\nexpires = '90d'": "begin again",
    "[keys.ann]\nkey = 'a'\nexpires = '31.12.2099'": "2027-01-31",
    "[keys.ann]\nkey = 'a'\nexpires = 12:00:00": "2027-01-31",
    "[keys.ann]\nkey = 'a'\nscopes = []": "enabled = false",
    "[keys.ann]\nkey = 'a'\nscopes = ['root']": "one of inference, admin",
    "[keys.ann]\nkey = 'a'\ntokens_per_day = 0": "from 1",
    "[keys.ann]\nkey = 'a'\nenabled = 'no'": "true or false",
    "[keys.'a b']\nkey = 'a'": "the name of a key",
    "[keys.a]\nkey = 'x'\n[keys.b]\nkey = 'x'": "that of 'a' too",
    "[keys]\nann = 'sk-secret'": r"keys.ann must be a table",
    "api_key = 'x'\n[keys.a]\nkey = 'x'": r"keys\.a\.key: this key is also api_key",
    "name = 'default'\nmodel = 'a'": "name: .*'default' stands for another",
    "[server]\nport = 1": "port belongs at the top of the file",
    "[quota.groups]\na = 3": r"quota\.groups\.a: quotas belong in tables",
    "[models.b]\naliases = ['y']\n[models.y]": r"models\.y\.aliases: 'y' is a name of",
}


@pytest.mark.parametrize(("text", "message"), MISTAKES.items())
def test_a_mistake_is_named_with_what_is_right(text: str, message: str, tmp_path: Path) -> None:
    file = write(tmp_path, text)
    if not message:
        assert faults_of(file) == []  # a literal string: TOML has no escapes in it
        return
    with pytest.raises(InvalidRequestError, match=message) as raised:
        read_settings({}, file, {})
    assert str(raised.value).startswith("setting ")
    faults = faults_of(file)
    assert faults and all(fault.line is not None for fault in faults)
    assert "sk-secret" not in str(raised.value) and ":secret@" not in str(raised.value)


def test_a_mistake_says_where_it_stands(tmp_path: Path) -> None:
    file = write(tmp_path, "\nport = 70000")
    with pytest.raises(InvalidRequestError, match=rf"\({re.escape(str(file))}, line 2\)"):
        read_settings({}, file, {})
    with pytest.raises(InvalidRequestError, match=r"port must be .*, not 'x' \(\$LLMKIT_PORT\)"):
        read_settings({}, None, {"LLMKIT_PORT": "x"})
    with pytest.raises(InvalidRequestError, match=r"not 70000\.$"):
        read_settings({"port": 70000}, None, {})
    with pytest.raises(InvalidRequestError, match=r"LLMKIT_APIKEY.*LLMKIT_API_KEY"):
        read_settings({}, None, {"LLMKIT_APIKEY": "x"})
    with pytest.raises(InvalidRequestError, match=r"LLMKIT_TEMPERATURE is not.*\[sampling\]"):
        read_settings({}, None, {"LLMKIT_TEMPERATURE": "1"})
    with pytest.raises(InvalidRequestError, match="There are 2 more"):
        read_settings({}, write(tmp_path, "a = 1\nb = 2\nc = 3"), {})


def test_every_fault_is_found_with_its_line(tmp_path: Path) -> None:
    text = '\ufeff# a comment\r\nprot = 1\r\nlora = [\r\n  # "no = 1\r\n  "a.gguf",\r\n]\r\n\r\n'
    text += "host = '''\r\n[models.small]\r\nport = 0'''\r\n[models.small] # here\r\nn_ctx = 0\r\n"
    text += (
        "n_slots.a = 1\r\n[models.small.sampling]\r\ntop_k = 'a'\r\n[keys.ann]\r\nrate = 'a'\r\n"
    )
    text += "expires = '90d'\r\nsampling.top_p = 3\r\n"
    file = tmp_path / "llmkit.toml"
    file.write_bytes(text.encode())
    assert [(fault.line, fault.key) for fault in faults_of(file)] == [
        (2, "prot"),
        (8, "host"),
        (12, "models.small.n_ctx"),
        (13, "models.small.n_slots"),
        (15, "models.small.sampling.top_k"),
        (16, "keys.ann.key_sha256"),
        (17, "keys.ann.rate"),
        (18, "keys.ann.expires"),
        (19, "keys.ann.sampling"),
    ]


def test_a_key_that_is_wrong_is_not_said_to_be_missing(tmp_path: Path) -> None:
    faults = faults_of(write(tmp_path, "[keys.ann]\nkey = 12345678\n[keys.bob]\nkey_sha256 = 'a'"))
    assert [(fault.line, fault.key) for fault in faults] == [
        (2, "keys.ann.key"),
        (4, "keys.bob.key_sha256"),
    ]


@settings(deadline=None)
@given(st.sampled_from(ALL_ROWS), st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.dates()
    | st.datetimes() | st.times() | st.sampled_from([10**400, "\ud800", "é" * 5000]),
    lambda values: st.lists(values, max_size=4) | st.dictionaries(st.text(), values, max_size=4),
    max_leaves=8,
))  # fmt: skip
def test_whatever_a_value_is_it_is_taken_or_refused(row: Any, value: Any) -> None:
    try:
        row.check(value)
    except InvalidRequestError as error:
        assert error.param == row.name and len(str(error)) < 1000


# The file itself


def test_files_that_are_refused(tmp_path: Path) -> None:
    def refusal(file: Path) -> str:
        with pytest.raises(InvalidRequestError) as raised:
            read_settings({}, file, {})
        (fault,) = faults_of(file)
        assert fault.message.rstrip(".") in str(raised.value)
        return str(raised.value)

    assert "No such file" in refusal(tmp_path / "none.toml")
    assert "cannot read" in refusal(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    assert "not a regular file" in refusal(tmp_path / "pipe")
    assert "chmod o-w" in refusal(write(tmp_path, "port = 1", 0o666))
    assert "larger than 1024 KiB" in refusal(write(tmp_path, "#" * (1 << 20) + "\n"))
    assert "line 2" in refusal(write(tmp_path, "port = 1\n= =\n"))
    assert "overwrite" in refusal(write(tmp_path, "port = 1\nport = 2")).lower()
    assert "nested too deeply" in refusal(write(tmp_path, "a = " + "[" * 50_000))
    assert "cannot read" in refusal(write(tmp_path, "port = " + "9" * 5000))
    assert "so large a number" in refusal(write(tmp_path, "port = 0x" + "f" * 5000))
    file = tmp_path / "latin.toml"
    file.write_bytes(b"host = '\xe4'")
    assert "not text in UTF-8" in refusal(file)
    if os.getuid():
        assert "Permission denied" in refusal(write(tmp_path, "", 0o000))


def test_a_file_with_secrets_should_be_its_owners_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for text in (
        "api_key = 'a'",
        "[keys.a]\nkey = 'a'",
        "db_url = 'postgresql://ann:secret@host/db'",
    ):
        with pytest.warns(RuntimeWarning, match="chmod 600"):
            read_settings({}, write(tmp_path, text, 0o644), {})
        assert read_settings({}, write(tmp_path, text, 0o600), {})
    text = "db_url = 'postgresql://ann@host/db'\n[keys.a]\nkey_sha256 = '" + "0" * 64 + "'"
    assert read_settings({}, write(tmp_path, text, 0o644), {})
    with pytest.warns(RuntimeWarning, match="writable by others"):
        read_settings({}, write(tmp_path, "port = 1", 0o620), {})
    # What systemd hands over is readable by the service's own group.
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    assert read_settings({}, write(tmp_path, "api_key = 'a'", 0o440), {})
