"""The example of a settings file: every key of every table, with what it means. Pure."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from llmkit.settings.entries import KEY_OPTIONS, MODEL_OPTIONS
from llmkit.settings.gateway import GATEWAY_OPTIONS
from llmkit.settings.hub import HUB_OPTIONS
from llmkit.settings.listing import as_toml
from llmkit.settings.quotas import QUOTA_OPTIONS
from llmkit.settings.reading import ENGINE_OPTIONS
from llmkit.settings.sampling import SAMPLING_OPTIONS
from llmkit.settings.table import Option

__all__ = ["example"]

COLUMNS = 100
HEAD = """\
Settings of `llmkit serve` and `llmkit hub`. `llmkit config example` writes this file.

Lines with ## explain; remove the # of a line that you change. `llmkit config check FILE` finds
mistakes, `llmkit config show --config FILE` shows what counts and where it comes from.

A setting is also a variable (port: LLMKIT_PORT) and an option of the command (--port), which take
precedence in that order. In a variable, commas separate the parts of a list. What is live can
change while the server runs, on SIGHUP; the rest with its next start.

Keep the file to its owner when it holds keys: chmod 600."""
SECRET = "REPLACE-THIS-BY-A-SECRET"
# Values for what has no default, or none that shows how it is written.
SAMPLES: Mapping[str, Any] = {
    "base_path": "/llm",
    "api_key": SECRET,
    "cors_origins": ["https://chat.example.org"],
    "trusted_proxies": ["10.0.0.0/8", "127.0.0.1"],
    "hub_proxies": ["10.0.0.7"],
    "tls_cert": "/etc/llmkit/tls.crt",
    "tls_key": "/etc/llmkit/tls.key",
    "db_url": "sqlite:////var/lib/llmkit/llmkit.db",
    "media_hosts": ["images.example.org"],
    "redis_url": "redis://127.0.0.1:6379",
    "fleet_listen": "tcp://10.0.0.5:7100",
    "fleet_key_file": "/etc/llmkit/fleet.key",
    "session_ttl_s": 2_592_000.0,
    "otlp_endpoint": "http://127.0.0.1:4318",
    "model": ["smollm2"],
    "models_dir": "/var/lib/llmkit/models",
    "default_model": "assistant",
    "allowed_models": ["assistant", "qwen*"],
    "memory_budget_gb": 24.0,
    "gpu_budget_gb": 16.0,
    "idle_unload_s": 1800.0,
    "name": "assistant",
    "default_max_tokens": 1024,
    "max_tokens_limit": 4096,
    "max_prompt_chars": 200_000,
    "max_concurrent": 8,
    "max_queue": 256,
    "request_timeout_s": 600.0,
    "rate": "60/minute",
    "n_ctx": 4096,
    "n_slots": 4,
    "tensor_split": [3, 1],
    "quantize": "Q4_K_M",
    "threads": 8,
    "kv_unified": True,
    "kv_tokens": 16_384,
    "flash_attention": True,
    "rope_scaling": 2.0,
    "lora": ["/var/lib/llmkit/style.gguf"],
    "batch_requests": 4,
    "batch_tokens": 512,
    "prefix_dir": "/var/lib/llmkit/prefixes",
    "draft": "/var/lib/llmkit/models/draft.gguf",
    "projector": "/var/lib/llmkit/models/mmproj.gguf",
    "temperature": 0.7,
    "top_p": 0.95,
    "top_k": 40,
    "min_p": 0.05,
    "repeat_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "seed": 42,
}
MODEL_SAMPLES = {"model": "unsloth/Qwen3-0.6B-GGUF:Q4_K_M", "aliases": ["qwen", "qwen3"]}
KEY_SAMPLES = {
    "key": SECRET + "-OF-BOB",
    "key_sha256": "0" * 64,
    "models": ["assistant", "qwen*"],
    "concurrent": 4,
    "tokens_per_day": 1_000_000,
    "tokens_per_month": 20_000_000,
    "expires": "2099-12-31",
}

QUOTA_SAMPLES = {"tokens_per_day": 200_000, "requests_per_minute": 30, "concurrent": 2}


def example() -> str:
    """The text of the file: all of it is commented out, and valid when it is not."""
    lines = list(_prose(HEAD))
    for rows in (GATEWAY_OPTIONS, HUB_OPTIONS, ENGINE_OPTIONS):
        for group in dict.fromkeys(row.group for row in rows.values()):
            what = ", of all models" if rows is ENGINE_OPTIONS else ""
            lines += ["", *_prose(f"{group}{what}\n{'-' * len(group + what)}")]
            for row in rows.values():
                lines += _explained(row, SAMPLES) if row.group == group else []
    lines += _table("sampling", "What a request is sampled with that does not say.")
    lines += _settings(SAMPLING_OPTIONS.values(), SAMPLES)
    lines += _table("models.small", "A model and its name, to serve beside those of `model`.")
    lines += _settings(MODEL_OPTIONS.values(), {**SAMPLES, **MODEL_SAMPLES})
    lines += ["", *_prose("Every option of an engine, as above, for this model alone:")]
    lines += [_setting(row, SAMPLES) for row in ENGINE_OPTIONS.values()]
    lines += _table("models.small.sampling", "Its own defaults of sampling.")
    lines += [_setting(row, SAMPLES) for row in SAMPLING_OPTIONS.values()]
    lines += _table("keys.ann", "A key, known by its SHA-256. `llmkit keys add` makes others.")
    known = [row for row in KEY_OPTIONS.values() if row.name != "key"]
    lines += _settings(known, {**SAMPLES, **KEY_SAMPLES})
    lines += _table("keys.bob", "A key in clear.")
    lines += _settings([KEY_OPTIONS["key"]], KEY_SAMPLES)
    lines += _table("quota.default", "What each user of a hub may use (`llmkit hub`).")
    lines += _settings(QUOTA_OPTIONS.values(), QUOTA_SAMPLES)
    what = "Other limits for a group of the hub; of several groups the most generous counts."
    lines += _table("quota.groups.students", what)
    lines += [_setting(row, QUOTA_SAMPLES) for row in QUOTA_OPTIONS.values()]
    return "\n".join(lines) + "\n"


def _table(name: str, sentence: str) -> list[str]:
    return ["", *_prose(sentence), f"# [{name}]"]


def _settings(rows: Iterable[Option], samples: Mapping[str, Any]) -> Iterator[str]:
    for row in rows:
        yield from _explained(row, samples)


def _explained(row: Option, samples: Mapping[str, Any]) -> Iterator[str]:
    facts = [f"{row.range} {row.unit}".strip()] if row.range or row.unit else []
    if row.default not in (None, (), ""):
        facts.append(f"default {as_toml(row.default)}")
    facts += ["live"] if row.live else []
    yield ""
    yield from _prose(f"{row.help} ({'; '.join(facts)})" if facts else row.help)
    yield _setting(row, samples)


def _setting(row: Option, samples: Mapping[str, Any]) -> str:
    return f"# {row.name} = {as_toml(samples.get(row.name, row.default))}"


def _prose(text: str) -> Iterator[str]:
    for line in text.split("\n"):
        wrapped = textwrap.wrap(line, COLUMNS - 3, break_long_words=False) or [""]
        yield from (f"## {part}".rstrip() for part in wrapped)
