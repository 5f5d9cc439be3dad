"""Variables of other services as fallbacks: what each becomes, what wins, and what is refused."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from settings_files import read

from llmkit.cli import main
from llmkit.errors import InvalidRequestError
from llmkit.settings.compat_env import SWITCHES, VARIABLES
from llmkit.settings.listing import listed
from llmkit.settings.reading import TOP
from llmkit.settings.sampling import SAMPLING_OPTIONS
from llmkit.settings.serving import ServeSettings, read_settings

ON = {"compat_env": True}
NAMES = """
MODEL_PATH GPU_LAYERS CONTEXT_SIZE BATCH_SIZE HOST PORT ENABLE_CORS ENABLE_RATE_LIMIT RATE_LIMIT_MAX
RATE_LIMIT_WINDOW MAX_QUEUE_SIZE ENABLE_CONTINUOUS_BATCHING MAX_BATCH_SIZE BATCH_TIMEOUT_MS
MODELS_DIR LLAMA_MODEL_PATH SERVER_PORT LLM_ALLOWED_MODELS LLM_INFERENCE_HOSTNAME LLM_INFERENCE_PORT
CORS_ALLOWED_ORIGINS LLM_DEFAULT_TEMPERATURE LLM_DEFAULT_TOP_P LLM_DEFAULT_MAX_TOKENS
LLM_MAX_TOKENS_LIMIT LLM_MAX_CONCURRENT_REQUESTS LLM_MODEL_PATH HF_HOME HF_ENDPOINT LLM_ENABLE_ISQ
LLM_ISQ_TYPE SERVICE_NAME OTEL_EXPORTER_OTLP_ENDPOINT LOG_FORMAT RUST_LOG SERVER_SSL_ENABLED
TLS_SERVER_CERT_PATH TLS_SERVER_KEY_PATH
"""
ISSUE = NAMES.split()


def compat(given: dict[str, Any] | None = None, **variables: str) -> ServeSettings:
    return read_settings(given or ON, None, variables)


def set_by(settings: ServeSettings) -> dict[str, tuple[Any, str]]:
    """What variables of others have set: the value and its source, by key."""
    return {s.key: (s.shown, s.source) for s in listed(settings) if s.source.endswith("(compat)")}


def test_the_table_has_every_name_and_its_setting() -> None:
    assert sorted(v.name for v in VARIABLES) == sorted(ISSUE)
    for variable in VARIABLES:
        assert bool(variable.key) != bool(variable.why), variable
        rows = SAMPLING_OPTIONS if variable.key.startswith("sampling.") else TOP
        assert not variable.key or variable.key.rpartition(".")[2] in rows
        assert not variable.switch or variable.switch in SWITCHES
    text = (ROOT / "docs" / "migrate.md").read_text(encoding="utf-8")
    for variable in VARIABLES:
        (line,) = re.findall(rf"^\| `{variable.name}` \|[^\n]*$", text, re.MULTILINE)
        assert not variable.key or f"`{variable.key}`" in line, line


def test_nothing_is_read_unless_it_is_asked_for() -> None:
    variables = {"HOST": "0.0.0.0", "PORT": "9", "MODEL_PATH": "x.gguf", "RATE_LIMIT_MAX": "no"}
    settings = read_settings({}, None, variables)
    assert settings == ServeSettings() and settings.gateway.port == 3000
    assert read_settings({}, None, {**variables, "LLMKIT_COMPAT_ENV": "0"}).gateway.port == 3000


@pytest.mark.parametrize(
    ("variables", "key", "value"),
    [
        ({"HOST": "127.0.0.2"}, "host", "127.0.0.2"),
        ({"HOST": "127.0.0.2", "LLM_INFERENCE_HOSTNAME": "127.0.0.3"}, "host", "127.0.0.3"),
        ({"PORT": " 8091 "}, "port", 8091),
        ({"SERVER_PORT": "1", "PORT": "2"}, "port", 1),
        ({"LLM_INFERENCE_PORT": "3", "SERVER_PORT": "1"}, "port", 3),
        ({"MODEL_PATH": "/m/a,b.gguf"}, "model", ["/m/a,b.gguf"]),
        ({"LLAMA_MODEL_PATH": "a.gguf"}, "model", ["a.gguf"]),
        ({"MODELS_DIR": "/m"}, "models_dir", "/m"),
        ({"LLM_MODEL_PATH": "/m"}, "models_dir", "/m"),
        ({"LLM_MODEL_PATH": "/m/a.gguf"}, "model", ["/m/a.gguf"]),
        ({"GPU_LAYERS": "-1"}, "n_gpu_layers", -1),
        ({"GPU_LAYERS": "auto"}, "n_gpu_layers", "auto"),
        ({"CONTEXT_SIZE": "4096"}, "n_ctx", 4096),
        ({"BATCH_SIZE": "512"}, "batch_tokens", 512),
        ({"MAX_QUEUE_SIZE": "64"}, "max_queue", 64),
        ({"LLM_MAX_CONCURRENT_REQUESTS": "10"}, "n_slots", 10),
        ({"ENABLE_CONTINUOUS_BATCHING": "false"}, "batching", False),
        ({"MAX_BATCH_SIZE": "4"}, "batch_requests", 4),
        ({"BATCH_TIMEOUT_MS": "50"}, "batch_wait_ms", 50.0),
        ({"ENABLE_CORS": "TRUE"}, "cors_origins", ["*"]),
        ({"ENABLE_CORS": "0", "CORS_ALLOWED_ORIGINS": "https://a.b"}, "cors_origins", []),
        ({"CORS_ALLOWED_ORIGINS": "http://a:1/, *"}, "cors_origins", ["http://a:1", "*"]),
        ({"RATE_LIMIT_MAX": "100"}, "rate", "100/minute"),
        ({"RATE_LIMIT_MAX": "100", "RATE_LIMIT_WINDOW": "60"}, "rate", "100/minute"),
        ({"RATE_LIMIT_MAX": "5", "RATE_LIMIT_WINDOW": "1"}, "rate", "5/second"),
        ({"RATE_LIMIT_MAX": "5", "RATE_LIMIT_WINDOW": "90"}, "rate", "5/90s"),
        ({"RATE_LIMIT_MAX": "5", "RATE_LIMIT_WINDOW": "1h"}, "rate", "5/hour"),
        ({"LLM_DEFAULT_MAX_TOKENS": "512"}, "default_max_tokens", 512),
        ({"LLM_MAX_TOKENS_LIMIT": "4096"}, "max_tokens_limit", 4096),
        ({"LLM_DEFAULT_TEMPERATURE": "0.7"}, "sampling.temperature", 0.7),
        ({"LLM_DEFAULT_TOP_P": "0.9"}, "sampling.top_p", 0.9),
        ({"LOG_FORMAT": "JSON"}, "log_format", "json"),
        ({"LOG_FORMAT": "compact"}, "log_format", "pretty"),
        ({"LLM_MAX_CONCURRENT_REQUESTS": "1000"}, "n_slots", 256),
        ({"RUST_LOG": "warn"}, "log_level", "warning"),
        ({"SERVICE_NAME": "llm"}, "service_name", "llm"),
        ({"RUST_LOG": "info,tower=trace"}, "log_level", "info"),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318"}, "otlp_endpoint", "http://c:4318"),
        ({"LLM_ENABLE_ISQ": "true", "LLM_ISQ_TYPE": "Q4_K"}, "quantize", "Q4_K_M"),
    ],
)
def test_what_a_variable_becomes(variables: dict[str, str], key: str, value: Any) -> None:
    found = set_by(compat(**variables))
    assert found[key][0] == value and found[key][1].removesuffix(" (compat)") in variables


def test_nothing_is_the_default() -> None:
    assert set_by(compat(CONTEXT_SIZE="0", RATE_LIMIT_MAX="0", ENABLE_RATE_LIMIT="true")) == {}


def test_certificates_need_their_switch() -> None:
    paths = {"TLS_SERVER_CERT_PATH": "/c.pem", "TLS_SERVER_KEY_PATH": "/k.pem"}
    settings = compat(**paths)
    assert settings.gateway.tls_cert is None
    assert [note.split(" ")[0] for note in settings.notes] == list(paths)
    settings = compat(SERVER_SSL_ENABLED="true", **paths)
    assert (settings.gateway.tls_cert, settings.gateway.tls_key) == ("/c.pem", "/k.pem")
    assert compat(SERVER_SSL_ENABLED="false", **paths).notes == ()


def test_what_is_switched_off_sets_nothing() -> None:
    settings = compat(
        ENABLE_RATE_LIMIT="false",
        RATE_LIMIT_MAX="5",
        ENABLE_CONTINUOUS_BATCHING="0",
        MAX_BATCH_SIZE="8",
        LLM_ENABLE_ISQ="false",
        LLM_ISQ_TYPE="HQQ4",
        PORT="",
    )
    assert set_by(settings) == {"batching": (False, "ENABLE_CONTINUOUS_BATCHING (compat)")}


def test_allowed_models_are_served_under_their_names() -> None:
    names = "Qwen/Qwen3-0.6B-GGUF, a/b:x.gguf@a/b ,small"
    settings = compat(LLM_ALLOWED_MODELS=names)
    assert [(m.name, m.model, m.lazy) for m in settings.models] == [
        ("Qwen/Qwen3-0.6B-GGUF", "Qwen/Qwen3-0.6B-GGUF", True),
        ("a/b:x.gguf@a/b", "a/b:x.gguf@a/b", True),
    ]
    assert settings.gateway.allowed_models == ("Qwen/Qwen3-0.6B-GGUF", "a/b:x.gguf@a/b", "small")
    (one,) = compat(LLM_ALLOWED_MODELS="org/repo").models
    assert not one.lazy
    everything = compat(LLM_ALLOWED_MODELS="*")
    assert everything.models == () and everything.gateway.allowed_models == ()
    both = compat(LLM_ALLOWED_MODELS="org/repo", MODEL_PATH="x.gguf")
    assert [m.model for m in both.models] == ["x.gguf", "org/repo"]


def test_everything_of_ours_goes_before(tmp_path: Path) -> None:
    variables = {
        "PORT": "1", "HOST": "127.0.0.9", "CONTEXT_SIZE": "512", "LLM_DEFAULT_TOP_P": "0.1",
        "MODEL_PATH": "theirs.gguf", "LLM_ALLOWED_MODELS": "org/theirs", "LOG_FORMAT": "json",
    }  # fmt: skip
    text = "port = 2\ncompat_env = true\n[sampling]\ntop_p = 0.2\n[models.small]\nmodel = 'm.gguf'"
    settings = read(text, tmp_path, {"n_ctx": 1024}, LLMKIT_HOST="127.0.0.8", **variables)
    assert (settings.gateway.port, settings.gateway.host) == (2, "127.0.0.8")
    assert settings.engine == {"n_ctx": 1024} and settings.sampling == {"top_p": 0.2}
    assert [m.model for m in settings.models] == ["m.gguf"]
    assert set_by(settings).keys() == {"log_format", "allowed_models"}


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"PORT": "http"}, r"variable PORT \(compat\) must be an integer, not 'http'"),
        ({"PORT": "70000"}, r"variable PORT \(compat\).*port must be an integer from 0 to 65535"),
        ({"RATE_LIMIT_MAX": "-1"}, r"RATE_LIMIT_MAX \(compat\) must be a number of requests"),
        ({"RATE_LIMIT_WINDOW": "-1"}, r"RATE_LIMIT_WINDOW \(compat\) must be a number of seconds"),
        ({"ENABLE_RATE_LIMIT": "true"}, r"ENABLE_RATE_LIMIT.* needs RATE_LIMIT_MAX as well"),
        ({"ENABLE_CORS": "maybe"}, r"ENABLE_CORS \(compat\) must be true or false, not 'maybe'"),
        ({"CORS_ALLOWED_ORIGINS": "a.example"}, r"CORS_ALLOWED_ORIGINS.*must be origins"),
        ({"SERVER_SSL_ENABLED": "1"}, r"SERVER_SSL_ENABLED.* needs TLS_SERVER_CERT_PATH"),
        ({"LLM_ENABLE_ISQ": "true"}, r"LLM_ENABLE_ISQ.* needs LLM_ISQ_TYPE"),
        ({"LLM_ENABLE_ISQ": "true", "LLM_ISQ_TYPE": "HQQ4"}, r"LLM_ISQ_TYPE.*type of weights"),
        ({"LOG_FORMAT": "xml"}, r"LOG_FORMAT \(compat\).*pretty, json"),
        ({"RUST_LOG": "tower=debug"}, r"RUST_LOG \(compat\) must have a level for all"),
        ({"LLM_DEFAULT_TEMPERATURE": "hot"}, r"LLM_DEFAULT_TEMPERATURE.*must be a number"),
        ({"LLM_DEFAULT_TOP_P": "nan"}, r"LLM_DEFAULT_TOP_P.*top_p must be"),
        ({"GPU_LAYERS": "many"}, r"GPU_LAYERS.*must be an integer"),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "c:4317"}, r"OTEL_EXPORTER_OTLP_ENDPOINT.*an address"),
        ({"LLM_ALLOWED_MODELS": "a/b c"}, r"LLM_ALLOWED_MODELS \(compat\).*a name of a model must"),
        (
            {"LLM_DEFAULT_MAX_TOKENS": "9", "LLM_MAX_TOKENS_LIMIT": "8"},
            r"default_max_tokens must be at most.*LLM_DEFAULT_MAX_TOKENS \(compat\)",
        ),
    ],
)
def test_values_that_make_no_sense_name_the_variable(variables: dict[str, str], words: str) -> None:
    with pytest.raises(InvalidRequestError, match=words):
        compat(**variables)


def test_what_is_not_as_they_mean_it_is_said_once() -> None:
    collector = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4317"}
    settings = compat(LLM_MAX_CONCURRENT_REQUESTS="1000", **collector)
    slots, port = settings.notes
    assert slots == "LLM_MAX_CONCURRENT_REQUESTS: 256 is the most there can be" and "4318" in port
    assert compat(LLM_MAX_CONCURRENT_REQUESTS="256").notes == ()
    ours = compat({"otlp_endpoint": "http://c:4318", **ON}, **collector)
    assert ours.notes == (), "it is not used"


def test_config_show_names_the_source(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ISSUE:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOST", "127.0.0.7")
    monkeypatch.setenv("LLM_MAX_CONCURRENT_REQUESTS", "300")
    monkeypatch.setenv("LLMKIT_COMPAT_ENV", "1")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert main(["config", "show"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"host +\"127\.0\.0\.7\" +HOST \(compat\)", shown)
    assert len(said) == 1 and "256" in str(said[0].message)
    monkeypatch.delenv("LLMKIT_COMPAT_ENV")
    monkeypatch.delenv("LLM_MAX_CONCURRENT_REQUESTS")
    assert main(["config", "show", "--compat-env", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["host"]
    assert (found["value"], found["source"]) == ("127.0.0.7", "HOST (compat)")
