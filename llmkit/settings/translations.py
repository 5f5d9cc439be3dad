"""What the keys of another service's TOML file are called here. Data, and nothing else.

The file is that of Rust services around mistral.rs, or mistral.rs's own; other spellings of the
same are taken as well.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from llmkit.settings import foreign

__all__ = ["ENTRY_KEYS", "KEYS", "KEY_KEYS", "REASONS", "SWITCHES", "same"]

Read = Callable[[Any], Any]


def same(value: Any) -> Any:
    """The value as it is."""
    return value


def _milliseconds(value: Any) -> float:
    return foreign.as_number(value) / 1000


def _layers_of(device: Any) -> Any:
    return 0 if str(device).strip().lower() == "cpu" else "auto"


def _cpu_layers(value: Any) -> Any:
    return 0 if foreign.as_flag(value) else "auto"


def _kv_type(value: Any) -> str:
    kinds = {"auto": "f16", "f16": "f16", "f8e4m3": "q8_0", "fp8": "q8_0", "q8_0": "q8_0"}
    try:
        return kinds[str(value).lower()]
    except KeyError:
        raise ValueError("must be auto or f8e4m3") from None


# Our setting, how its value is read, and what it is called elsewhere.
TABLE: tuple[tuple[str, Read, str], ...] = (
    ("host", same, "server.host server.hostname server.address server.bind_address host"),
    ("port", foreign.as_integer, "server.port port"),
    ("api_key", same, "server.api_key security.api_key auth.api_key"),
    (
        "cors_origins",
        foreign.as_list,
        "security.allowed_origins security.cors_origins server.cors_origins server.allowed_origins "
        "server.cors_allowed_origins cors.allowed_origins cors.origins",
    ),
    ("tls_cert", same, "tls.cert tls.cert_path tls.cert_file tls.server_cert_path server.tls_cert"),
    ("tls_key", same, "tls.key tls.key_path tls.key_file tls.server_key_path server.tls_key"),
    ("db_url", same, "database.url storage.database_url sessions.db_url"),
    ("max_sessions", foreign.as_integer, "limits.max_sessions sessions.max_sessions"),
    (
        "session_ttl_s",
        foreign.as_number,
        "limits.session_ttl_seconds limits.session_ttl_secs sessions.ttl_seconds",
    ),
    (
        "log_level",
        foreign.as_log_level,
        "server.log_level logging.level log.level observability.log_level telemetry.log_level",
    ),
    (
        "log_format",
        foreign.as_log_format,
        "server.log_format logging.format log.format observability.log_format telemetry.log_format",
    ),
    (
        "metrics",
        foreign.as_flag,
        "observability.enable_metrics observability.metrics telemetry.enable_metrics",
    ),
    (
        "otlp_endpoint",
        same,
        "observability.otlp_endpoint telemetry.otlp_endpoint telemetry.endpoint otel.endpoint "
        "otel.otlp_endpoint otel.exporter_otlp_endpoint",
    ),
    ("service_name", same, "telemetry.service_name otel.service_name observability.service_name"),
    ("model", foreign.as_list, "model.path model.model_path model.file model.model_id model.repo"),
    ("name", same, "model.name model.alias"),
    (
        "models_dir",
        same,
        "models.model_dir models.models_dir models.dir model.dir server.models_dir",
    ),
    ("default_model", same, "default_model_id models.default_model models.default"),
    ("default_max_tokens", foreign.as_integer, "generation.default_max_tokens sampling.max_tokens "
     "generation.max_tokens limits.default_max_tokens"),
    ("max_tokens_limit", foreign.as_integer, "generation.max_tokens_limit limits.max_tokens_limit "
     "limits.max_response_tokens limits.max_tokens"),
    ("max_prompt_chars", foreign.as_integer, "limits.max_prompt_length limits.max_prompt_chars"),
    ("max_queue", foreign.as_integer, "limits.max_queue_size limits.max_queue queue.max_size "
     "server.max_queue_size batching.max_queue_size"),
    ("request_timeout_s", foreign.as_number, "limits.request_timeout_seconds "
     "limits.request_timeout_secs server.request_timeout_seconds server.timeout_seconds"),
    ("request_timeout_s", _milliseconds, "limits.request_timeout_ms server.request_timeout_ms"),
    ("rate", foreign.as_rate, "limits.default_rate_limit_per_minute limits.default_rate_limit "
     "limits.rate_limit_per_minute limits.requests_per_minute rate_limit.requests_per_minute "
     "rate_limit.per_minute rate_limit.max limits.rate_limit_max"),
    ("n_ctx", foreign.as_context, "model.context_size model.context_length model.max_seq_len "
     "model.n_ctx inference.context_size paged_attn.context_len"),
    ("n_slots", foreign.as_slots, "models.max_concurrent_requests limits.max_concurrent_requests "
     "server.max_concurrent_requests runtime.max_seqs inference.max_concurrent_requests"),
    ("n_gpu_layers", foreign.as_integer, "model.gpu_layers model.n_gpu_layers "
     "inference.gpu_layers"),
    ("n_gpu_layers", _layers_of, "models.default_device model.device inference.device"),
    ("threads", foreign.as_integer, "model.threads model.n_threads inference.threads"),
    ("kv_type", _kv_type, "paged_attn.cache_type"),
    ("quantize", foreign.as_weights, "model.isq model.isq_type model.quantization "
     "models.default_quantization"),
    ("batching", foreign.as_flag, "batching.enabled batching.enable_continuous_batching"),
    ("batch_requests", foreign.as_integer, "batching.max_batch_size"),
    ("batch_wait_ms", foreign.as_number, "batching.timeout_ms batching.batch_timeout_ms"),
    ("batch_tokens", foreign.as_integer, "model.batch_size inference.batch_size"),
    ("sampling.temperature", foreign.as_number, "generation.default_temperature "
     "generation.temperature sampling.temperature"),
    ("sampling.top_p", foreign.as_number, "generation.default_top_p generation.top_p "
     "sampling.top_p"),
    ("sampling.top_k", foreign.as_integer, "generation.default_top_k generation.top_k "
     "sampling.top_k"),
    ("sampling.min_p", foreign.as_number, "generation.min_p sampling.min_p"),
    ("sampling.repeat_penalty", foreign.as_number, "generation.repeat_penalty "
     "generation.repetition_penalty sampling.repeat_penalty sampling.repetition_penalty"),
    ("sampling.seed", foreign.as_integer, "generation.seed sampling.seed"),
)  # fmt: skip

KEYS: Mapping[str, tuple[str, Read]] = {
    key: (target, read) for target, read, keys in TABLE for key in keys.split()
}

# In a table of one model.
ENTRY_TABLE: tuple[tuple[str, Read, str], ...] = (
    ("n_ctx", foreign.as_context, "context_length context_size max_seq_len device.max_seq_len"),
    ("n_gpu_layers", foreign.as_integer, "gpu_layers n_gpu_layers"),
    ("n_gpu_layers", _cpu_layers, "device.cpu"),
    ("quantize", foreign.as_weights, "quantization isq quantization.in_situ_quant"),
    ("batch_requests", foreign.as_integer, "device.max_batch_size"),
    ("lora", lambda value: [p for p in str(value).split(";") if p], "adapter.lora"),
)
ENTRY_KEYS: Mapping[str, tuple[str, Read]] = {
    key: (target, read) for target, read, keys in ENTRY_TABLE for key in keys.split()
}
# In a table of one key.
KEY_KEYS: Mapping[str, tuple[str, Read]] = {
    "rate_limit_per_minute": ("rate", foreign.as_rate),
    "rate_limit": ("rate", foreign.as_rate),
    "enabled": ("enabled", foreign.as_flag),
}

# What is off takes its settings along.
SWITCHES: Mapping[str, tuple[str, ...]] = {
    "security.enable_cors": ("cors_origins",),
    "server.enable_cors": ("cors_origins",),
    "cors.enabled": ("cors_origins",),
    "tls.enabled": ("tls_cert", "tls_key"),
    "rate_limit.enabled": ("rate",),
    "limits.enable_rate_limit": ("rate",),
    "telemetry.enabled": ("otlp_endpoint",),
    "otel.enabled": ("otlp_endpoint",),
}

# Why something has no counterpart, where more can be said.
REASONS: Mapping[str, str] = {
    "command": "`llmkit serve` is meant",
    "observability.enable_tracing": "logs are always written; otlp_endpoint exports traces",
    "observability.metrics_path": "metrics are at /metrics",
    "global.seed": "a seed for all requests gives the same draws again: see [sampling] seed",
    "global.token_source": "the variable HF_TOKEN, or `hf auth login`, opens the Hub",
    "global.log": "requests are logged on standard error, without their texts",
    "server.ui": "the page is always there",
    "runtime.prefix_cache_n": "prefixes are always kept: host_cache_mb says how much of them",
    "runtime.no_kv_cache": "there is always a KV cache",
    "runtime.chat_template": "the template of the GGUF file counts",
    "runtime.enable_search": "models do not search the web here",
    "paged_attn.mode": "the KV cache is llama.cpp's: see kv_unified",
    "paged_attn.block_size": "the KV cache is llama.cpp's: see kv_unified",
    "models.available_models.kind": "the file says what kind of model it is",
    "models.kind": "the file says what kind of model it is",
    "models.dtype": "the weights have the type of the file: see quantize",
    "models.tokenizer": "a GGUF file brings its tokenizer",
    "models.chat_template": "the template of the GGUF file counts",
    "models.format.format": "only GGUF is loaded",
    "models.format.tok_model_id": "a GGUF file brings its tokenizer",
    "models.device.hf_cache": "the variable HF_HOME says where the cache is",
    "models.device.device_layers": "n_gpu_layers and tensor_split say how layers are spread",
}
