"""`llmkit config migrate`: the files of services around mistral.rs, and files that are not."""

from __future__ import annotations

import hashlib
import json
import stat
import tomllib
from pathlib import Path
from typing import Any

import pytest

from llmkit.cli import main
from llmkit.errors import InvalidRequestError
from llmkit.settings.document import open_document
from llmkit.settings.migration import Migration, migrate
from llmkit.settings.reading import TOP
from llmkit.settings.sampling import SAMPLING_OPTIONS
from llmkit.settings.serving import faults_of, read_settings
from llmkit.settings.translations import ENTRY_KEYS, KEYS

SERVICE = """
[server]
host = "0.0.0.0"
port = 8080
log_level = "warn"

[models]
model_dir = "/models"
default_device = "cpu"
max_concurrent_requests = 10

[[models.available_models]]
id = "qwen"
name = "Qwen/Qwen2.5-0.5B-Instruct"
quantization = "q4"
context_length = 4096

[[models.available_models]]
id = "phi"
name = "microsoft/Phi-3.5-mini-instruct"
path = "/models/phi.gguf"
license = "MIT"

[security]
enable_auth = true
allowed_origins = ["https://chat.example.org"]

[[security.api_keys]]
key = "sk-secret"
name = "ann"
rate_limit_per_minute = 100
enabled = true

[limits]
max_prompt_length = 8192
max_response_tokens = 2048
max_sessions = 100
session_ttl_seconds = 3600
default_rate_limit_per_minute = 60

[observability]
enable_metrics = true
enable_tracing = true
metrics_path = "/metrics"
"""
MISTRALRS = """
command = "serve"
default_model_id = "TheBloke/Mistral-7B-Instruct-v0.1-GGUF"

[global]
seed = 42

[server]
host = "127.0.0.1"
port = 1234
ui = true

[runtime]
max_seqs = 32

[paged_attn]
mode = "auto"
context_len = 8192
cache_type = "f8e4m3"

[[models]]
kind = "text"
model_id = "TheBloke/Mistral-7B-Instruct-v0.1-GGUF"

[models.format]
format = "gguf"
quantized_file = "mistral-7b-instruct-v0.1.Q4_K_M.gguf"
tok_model_id = "mistralai/Mistral-7B-Instruct-v0.1"

[models.device]
cpu = true

[[models]]
kind = "diffusion"
model_id = "black-forest-labs/FLUX.1"
"""
GENERIC = """
[server]
host = "127.0.0.1"
enable_cors = true
[model]
path = "/m/a.gguf"
context_size = 2048
gpu_layers = 20
[generation]
default_temperature = 0.7
top_p = 0.9
max_tokens = 512
max_tokens_limit = 4096
[limits]
rate_limit_max = 10
rate_limit_window = 30
request_timeout_ms = 30000
[tls]
enabled = false
cert_path = "/c.pem"
key_path = "/k.pem"
[otel]
endpoint = "http://collector:4317"
service_name = "llm"
"""


def translated(tmp_path: Path, text: str) -> tuple[Migration, dict[str, Any]]:
    file = tmp_path / "config.toml"
    file.write_text(text, encoding="utf-8")
    file.chmod(0o600)
    found = migrate(open_document(file))
    made = tmp_path / "llmkit.toml"
    made.write_text(found.text, encoding="utf-8")
    made.chmod(0o600)
    assert faults_of(made) == [], found.text
    read_settings({}, made, {})
    return found, tomllib.loads(found.text)


def left(found: Migration) -> dict[str, str]:
    return {entry.theirs: entry.why for entry in found.left}


def test_a_service_around_mistralrs(tmp_path: Path) -> None:
    found, ours = translated(tmp_path, SERVICE)
    assert ours == {
        "host": "0.0.0.0",
        "port": 8080,
        "log_level": "warning",
        "models_dir": "/models",
        "n_gpu_layers": 0,
        "n_slots": 10,
        "cors_origins": ["https://chat.example.org"],
        "max_prompt_chars": 8192,
        "max_tokens_limit": 2048,
        "max_sessions": 100,
        "session_ttl_s": 3600.0,
        "rate": "60/minute",
        "metrics": True,
        "models": {
            "Qwen/Qwen2.5-0.5B-Instruct": {
                "model": "Qwen/Qwen2.5-0.5B-Instruct",
                "aliases": ["qwen"],
                "lazy": True,
                "quantize": "Q4_K_M",
                "n_ctx": 4096,
            },
            "microsoft/Phi-3.5-mini-instruct": {
                "model": "/models/phi.gguf",
                "aliases": ["phi"],
                "lazy": True,
            },
        },
        "keys": {
            "ann": {
                "key_sha256": hashlib.sha256(b"sk-secret").hexdigest(),
                "rate": "100/minute",
                "enabled": True,
            }
        },
    }
    assert "sk-secret" not in found.text
    assert left(found).keys() == {
        "models.available_models[1].license",
        "observability.enable_tracing",
        "observability.metrics_path",
    }
    assert any("Qwen2.5-0.5B-Instruct-GGUF" in note for note in found.notes)


def test_keys_count_only_where_they_did(tmp_path: Path) -> None:
    found, ours = translated(tmp_path, SERVICE.replace("enable_auth = true", "enable_auth = false"))
    assert "keys" not in ours
    assert left(found)["security.api_keys[0]"] == "security.enable_auth is false"
    assert any("llmkit keys add" in note for note in found.notes)


def test_mistralrs_own_file(tmp_path: Path) -> None:
    found, ours = translated(tmp_path, MISTRALRS)
    name = "TheBloke/Mistral-7B-Instruct-v0.1-GGUF"
    assert ours == {
        "default_model": name,
        "host": "127.0.0.1",
        "port": 1234,
        "n_slots": 32,
        "n_ctx": 8192,
        "kv_type": "q8_0",
        "models": {
            name: {
                "model": f"{name}:mistral-7b-instruct-v0.1.Q4_K_M.gguf",
                "lazy": True,
                "n_gpu_layers": 0,
            }
        },
    }
    why = left(found)
    assert "by the name of its file" in why["models[1] black-forest-labs/FLUX.1"]
    assert {"command", "global.seed", "server.ui", "paged_attn.mode"} <= why.keys()


def test_the_obvious_sections(tmp_path: Path) -> None:
    found, ours = translated(tmp_path, GENERIC)
    assert ours == {
        "host": "127.0.0.1",
        "cors_origins": ["*"],
        "model": ["/m/a.gguf"],
        "n_ctx": 2048,
        "n_gpu_layers": 20,
        "default_max_tokens": 512,
        "max_tokens_limit": 4096,
        "rate": "10/30s",
        "request_timeout_s": 30.0,
        "otlp_endpoint": "http://collector:4317",
        "service_name": "llm",
        "sampling": {"temperature": 0.7, "top_p": 0.9},
    }
    assert left(found)["tls.cert_path"] == "is turned off"
    assert any("4318" in note for note in found.notes)


def test_values_mean_what_they_meant_there(tmp_path: Path) -> None:
    text = """
[model]
path = "/m/a.gguf"
context_size = 0
[limits]
max_concurrent_requests = 1000
requests_per_minute = 0
[logging]
format = "compact"
"""
    found, ours = translated(tmp_path, text)
    assert ours == {"model": ["/m/a.gguf"], "n_slots": 256, "log_format": "pretty"}
    assert left(found) == {
        "model.context_size": "0 is the default of n_ctx",
        "limits.requests_per_minute": "0 is the default of rate",
    }


@pytest.mark.parametrize(
    ("text", "key", "why"),
    [
        ("[server]\nport = 70000", "server.port", "65535"),
        ("[server]\nport = 'http'", "server.port", "must be an integer, not 'http'"),
        ("[server]\nport = 1\nhostname = '0.0.0.1'\nhost = '0.0.0.2'", "server.host", "already"),
        ("[server]\nport = 1\nlog_level = 'loud'", "server.log_level", "must have a level"),
        ("[server]\nport = 1\n[tls]\ncert = '/c'", "tls.cert", "needs tls_key"),
        ("[server]\nport = 1\n[tls]\nenabled = true", "tls.enabled", "nothing says"),
        (
            "[generation]\nmax_tokens = 9\nmax_tokens_limit = 8",
            "generation.max_tokens",
            "must be at most",
        ),
        ("[server]\nport = 1\n[odd]\n'a\\nb' = 1", "odd.a\\nb", "no counterpart"),
        ('[server]\nport = 1\n[odd]\n"a\\n[x]" = 1', "odd.a\\n[x]", "no counterpart"),
        ("[server]\nport = 1\n[models]\nmodels = [1, {}]", "models.models[1]", "has no name"),
        ("default_model_id = 'x'\nmodels = ['y/z']", "default_model_id", "must be one of"),
    ],
)
def test_what_does_not_fit_is_left_out_with_the_reason(
    tmp_path: Path, text: str, key: str, why: str
) -> None:
    found, _ = translated(tmp_path, text)
    assert why in left(found)[key]


@pytest.mark.parametrize("text", ["", "x = 1", "[tool.ruff]\nline-length = 100"])
def test_a_file_of_something_else_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "other.toml"
    file.write_text(text)
    with pytest.raises(InvalidRequestError, match="nothing in"):
        migrate(open_document(file))


def test_targets_are_settings() -> None:
    for target, _ in [*KEYS.values(), *ENTRY_KEYS.values()]:
        rows = SAMPLING_OPTIONS if target.startswith("sampling.") else TOP
        assert target.rpartition(".")[2] in rows, target


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "config.toml"
    file.write_text(SERVICE)
    file.chmod(0o600)
    out = tmp_path / "llmkit.toml"
    assert main(["config", "migrate", str(file), "-o", str(out)]) == 0
    report = capsys.readouterr().out
    assert "translated (" in report and "not translated (3)" in report and "sk-secret" not in report
    assert stat.S_IMODE(out.stat().st_mode) == 0o600
    assert main(["config", "check", str(out)]) == 0
    capsys.readouterr()
    assert main(["config", "migrate", str(file), "-o", str(out)]) == 1
    assert "exists already" in capsys.readouterr().err
    assert main(["config", "migrate", str(file)]) == 0
    printed = capsys.readouterr()
    assert printed.out == out.read_text() and "translated (" in printed.err
    assert main(["config", "migrate", str(file), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["text"] == out.read_text()
    assert {"from": "server.port", "to": "port", "value": 8080} in found["taken"]
    assert main(["config", "migrate", str(tmp_path / "none.toml")]) == 1
