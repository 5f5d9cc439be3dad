"""Settings: three sources, tables of models and keys, and what is shown of them."""

from __future__ import annotations

import json
import re
import tomllib
import warnings
from pathlib import Path

import pytest
from settings_files import FULL, read, uncommented, write

from llmkit.cli import main
from llmkit.errors import InvalidRequestError
from llmkit.settings.entries import KeyEntry, ModelEntry
from llmkit.settings.example import example
from llmkit.settings.gateway import GatewayOptions
from llmkit.settings.listing import listed
from llmkit.settings.reading import TOP
from llmkit.settings.serving import ServeSettings, read_settings
from llmkit.settings.values import from_text, mask

# Where values come from


def test_the_command_line_goes_before_variables_before_the_file(tmp_path: Path) -> None:
    text = "port = 1\nhost = '127.0.0.9'\nn_ctx = 512"
    settings = read(text, tmp_path, {"n_ctx": 1024}, LLMKIT_PORT="2")
    assert (settings.gateway.host, settings.gateway.port) == ("127.0.0.9", 2)
    assert settings.engine == {"n_ctx": 1024}
    file = str(tmp_path / "llmkit.toml")
    assert settings.sources == {"host": file, "port": "$LLMKIT_PORT", "n_ctx": "command line"}


def test_the_file_may_be_named_by_a_variable(tmp_path: Path) -> None:
    file = write(tmp_path, "port = 7")
    assert read_settings({}, None, {"LLMKIT_CONFIG": str(file)}).gateway.port == 7
    assert read_settings({}, None, {"LLMKIT_CONFIG": ""}).gateway.port == 3000
    other = tmp_path / "other.toml"
    other.write_text("port = 8")
    assert read_settings({}, other, {"LLMKIT_CONFIG": str(file)}).gateway.port == 8


def test_no_file_is_read_unless_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "port = 7")
    monkeypatch.chdir(tmp_path)
    assert read_settings({}, None, {}).gateway.port == 3000


def test_lists_are_written_as_each_source_has_them(tmp_path: Path) -> None:
    wanted = ("https://a.example", "https://b.example")
    text = f"cors_origins = {list(wanted)!r}"
    assert read(text, tmp_path).gateway.cors_origins == wanted
    for variable in (
        ", ".join(wanted),
        json.dumps(wanted),
        "https://a.example,,https://b.example,",
    ):
        settings = read_settings({}, None, {"LLMKIT_CORS_ORIGINS": variable})
        assert settings.gateway.cors_origins == wanted
    for typed in ([*wanted], [",".join(wanted)], wanted):
        assert read_settings({"cors_origins": typed}, None, {}).gateway.cors_origins == wanted
    assert read('model = "smollm2"', tmp_path).gateway.models == ("smollm2",)
    # Paths may have commas in them.
    assert read_settings({"model": ["a,b.gguf"]}, None, {}).gateway.models == ("a,b.gguf",)
    variable = {"LLMKIT_MODEL": '["a,b.gguf"]'}
    assert read_settings({}, None, variable).gateway.models == ("a,b.gguf",)
    # An empty list in a variable takes back the one of the file.
    assert read(text, tmp_path, LLMKIT_CORS_ORIGINS="").gateway.cors_origins == ()


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("8080", "integer", 8080),
        (" 8080 ", "integer", 8080),
        ("8080.5", "integer", "8080.5"),
        ("1e3", "number", 1000.0),
        ("x", "number", "x"),
        ("TRUE", "flag", True),
        ("off", "switch", False),
        ("2", "flag", "2"),
        ("auto", "layers", "auto"),
        ("-1", "layers", -1),
        ("[1", "texts", "[1"),
        ("a.gguf,b.gguf", "adapters", ["a.gguf", "b.gguf"]),
        ('{"a.gguf": 0.5}', "adapters", {"a.gguf": 0.5}),
    ],
)
def test_text_becomes_a_value(text: str, kind: str, value: object) -> None:
    assert from_text(text, kind) == value


def test_every_setting_can_stand_in_every_source(tmp_path: Path) -> None:
    """What the example says in the file can be said by a variable and on the command line."""
    values = tomllib.loads(uncommented(example()))
    for key, row in TOP.items():
        value = values[key]
        text = ",".join(map(str, value)) if isinstance(value, list) else str(value).lower()
        text = value if isinstance(value, str) else text
        more = {"kv_unified": True} if key == "kv_tokens" else {}
        more |= {k: values[k] for k in ("tls_cert", "tls_key") if key.startswith("tls")}
        more |= {k: values[k] for k in ("fleet_key_file",) if key == "fleet_listen"}
        by_variable = read_settings(more, None, {f"LLMKIT_{key.upper()}": text})
        by_option = read_settings({**more, key: text}, None, {})
        found = [
            next(setting.value for setting in listed(s) if setting.path == (key,))
            for s in (by_variable, by_option, read_settings({**more, key: value}, None, {}))
        ]
        if row.kind != "shares":  # kept as it was written; the engine reads it
            assert found[0] == found[1] == found[2], key


# Models and keys


def test_tables_become_entries(tmp_path: Path) -> None:
    settings = read(FULL, tmp_path)
    (small,), (ann,) = settings.models, settings.keys
    assert (small.name, small.model, small.aliases, small.pinned) == (
        "small",
        "smollm2",
        ("tiny",),
        True,
    )
    assert small.engine == {"n_ctx": 2048, "n_slots": 2} and small.sampling == {"top_k": 5}
    assert (ann.name, ann.key, ann.rate, ann.enabled) == ("ann", "sk-ann", "60/minute", True)
    assert ann.scopes == ("inference", "admin") and str(ann.expires) == "2099-01-31"
    assert settings.sampling == {"temperature": 0.5}
    assert settings.sources["models.small.n_slots"] == str(tmp_path / "llmkit.toml")
    with pytest.raises(AttributeError):
        small.name = "other"  # type: ignore[misc]


def test_a_model_is_as_all_models_where_its_table_does_not_say(tmp_path: Path) -> None:
    text = (
        "lazy = true\nidle_unload_s = 60\n[models.a]\n[models.b]\nlazy = false\nidle_unload_s = 5"
    )
    a, b = read(text, tmp_path).models
    assert (a.model, a.lazy, a.idle_unload_s) == ("a", True, 60)
    assert (b.model, b.lazy, b.idle_unload_s) == ("b", False, 5)


def test_listed_models_come_first_and_may_have_a_table(tmp_path: Path) -> None:
    text = "[models.small]\nn_ctx = 512\n[models.big]\n"
    settings = read(text, tmp_path, {"model": ["big", "minilm"]})
    assert [(m.name, m.model) for m in settings.models] == [
        ("big", "big"),
        (None, "minilm"),
        ("small", "small"),
    ]
    assert settings.gateway.model == "big" and settings.gateway.models == ("big", "minilm")
    named = read_settings({"model": "smollm2", "name": "bot"}, None, {})
    assert [(m.name, m.model) for m in named.models] == [("bot", "smollm2")]
    assert read_settings({}, None, {}).models == () and GatewayOptions().model is None


def test_a_name_with_dots_is_quoted(tmp_path: Path) -> None:
    settings = read('[models."qwen2.5"]\nn_ctx = 64', tmp_path)
    assert settings.models[0].name == "qwen2.5"
    assert 'models."qwen2.5".n_ctx' in settings.sources
    with pytest.raises(InvalidRequestError, match=r'needs quotes: \[models\."qwen2.5"\]'):
        read("[models.qwen2.5]\nn_ctx = 64", tmp_path)


def test_entries_are_checked_however_they_are_made() -> None:
    with pytest.raises(InvalidRequestError, match="weight"):
        KeyEntry(name="ann", key="a", weight=0)
    with pytest.raises(InvalidRequestError, match="aliases"):
        ModelEntry(name="a", model="a", aliases=("",))
    assert "sk-1" not in repr(KeyEntry(name="ann", key="sk-1"))
    assert listed(ServeSettings())[0].source == "default"


# What is shown


def test_what_counts_is_shown_with_its_place_and_no_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "db_url = 'postgresql://ann:hush@host/db'\n" + FULL
    text += "[keys.bob]\nkey_sha256 = '" + "0123456789abcdef" * 4 + "'\n"
    file = write(tmp_path, text)
    monkeypatch.setenv("LLMKIT_API_KEY", "sk-owner")
    assert main(["config", "show", "minilm", "--config", str(file), "--n-slots", "3"]) == 0
    out = capsys.readouterr().out
    for line in (
        rf"port +4000 +{file}",
        r'api_key +"\*\*\*" +\$LLMKIT_API_KEY',
        rf'db_url +"postgresql://ann:\*\*\*@host/db" +{file}',
        r"n_slots +3 +command line",
        r'model +\["minilm"\] +command line',
        r"strict +false +default",
        rf'key +"\*\*\*" +{file}',
        rf'key_sha256 +"01234567…" +{file}',
        r"\[models\.small\.sampling\]",
    ):
        assert re.search(line, out), line
    assert main(["config", "show", "--config", str(file), "--json"]) == 0
    shown = capsys.readouterr().out
    found = json.loads(shown)
    assert found["port"] == {"value": 4000, "source": str(file), "live": False}
    assert found["log_level"] == {"value": "info", "source": "default", "live": True}
    assert found["keys.ann.expires"]["value"] == "2099-01-31"
    assert {key for key in found if "." not in key} == set(TOP)
    settings = read_settings({}, file)
    for text in (out, shown, repr(settings)):
        assert not re.search("sk-ann|sk-owner|hush", text)
    assert "89abcdef" not in out + shown


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("redis://:p@ss@host:6379", "redis://:***@host:6379"),
        ("redis://p-ss@host:6379", "redis://***@host:6379"),
        ("redis://ab/cd==@host:6379/0", "redis://***@host:6379/0"),
        ("rediss://p@q:r#s@host", "rediss://***@host"),
        ("valkey://ann:p@q/r@host", "valkey://ann:***@host"),
        ("unix://secret@/run/redis.sock?db=1", "unix://***@/run/redis.sock?db=1"),
        ("redis://a:b@host/0?password=c@d", "redis://a:***@host/0?password=***"),
        ("postgresql://a:b/c@host/db", "postgresql://a:***@host/db"),
        ("postgresql://host/db?user=a&password=b", "postgresql://host/db?user=a&password=***"),
        ("sqlite:////a/b.db", "sqlite:////a/b.db"),
        ("secret", "***"),
    ],
)
def test_passwords_of_addresses_are_masked(address: str, shown: str) -> None:
    assert mask(address) == shown


def test_checking_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path, FULL)
    assert main(["config", "check", str(file)]) == 0
    assert capsys.readouterr().out == f"{file}: no fault\n"
    file = write(tmp_path, "port = 70000\n\n[sampling]\ntop_k = -1\ntop_x = 1")
    assert main(["config", "check", str(file)]) == 1
    assert [line.partition(" ")[0] for line in capsys.readouterr().out.splitlines()] == [
        f"{file}:1:",
        f"{file}:4:",
        f"{file}:5:",
    ]
    assert main(["config", "check", "--json", str(file)]) == 1
    faults = json.loads(capsys.readouterr().out)["faults"]
    assert [(f["key"], f["line"]) for f in faults][:2] == [("port", 1), ("sampling.top_k", 4)]
    assert main(["config", "check", str(write(tmp_path, "= ="))]) == 1
    assert f"{file}:1: cannot read" in capsys.readouterr().out
    assert main(["config", "show", "--config", str(file)]) == 1
    assert capsys.readouterr().err.startswith("llmkit: ")


def test_a_warning_of_the_command_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path, "api_key = 'a'", 0o644)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda *told: print(warnings.formatwarning(*told[:4]), end="")
        assert main(["config", "check", str(file)]) == 0
    first, *rest = capsys.readouterr().out.splitlines()
    assert first.startswith("llmkit: the settings file") and rest == [f"{file}: no fault"]
