"""The options of a standalone gateway, beside those of its engines. Standard library only."""

from __future__ import annotations

import re
from dataclasses import dataclass

from llmkit.errors import InvalidRequestError
from llmkit.settings import table
from llmkit.settings.table import Option, option
from llmkit.settings.values import check_tokens

__all__ = ["GATEWAY_OPTIONS", "GatewayOptions"]

GATEWAY, LOG, MODELS = "Gateway", "Logs and metrics", "Models"
GENERATION, LIMITS, CACHE = "Generation", "Limits", "Response cache"
SESSIONS = "Sessions"
DIALECTS, SERVICES = ("auto", "ollama", "llms"), ("none", "otron")
LOG_LEVELS = ("debug", "info", "warning", "error")
MOST_TOKENS = 2**31 - 1
DAY_S = 86_400.0
HOST = r"[A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?"


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayOptions:
    """What `llmkit serve` runs with.

    Raises `InvalidRequestError` naming the option.
    """

    host: str = option(
        "text",
        "127.0.0.1",
        "Address to listen on; a key is required unless it is loopback.",
        GATEWAY,
    )
    port: int = option(
        "integer", 3000, "Port to listen on; 0 picks a free one.", GATEWAY, low=0, high=65535
    )
    base_path: str = option(
        "text", "", "Path before all routes, behind a proxy say, such as /llm.", GATEWAY,
        pattern=r"(/(?!\.{1,2}(?:/|$))[A-Za-z0-9._~-]+)*",
        wanted="a path such as /llm, without a slash at its end",
    )  # fmt: skip
    api_key: str | None = option(
        "secret", None, "Key that callers must send; $LLMKIT_API_KEY keeps it out of `ps`.",
        GATEWAY, live=True,
    )  # fmt: skip
    cors_origins: tuple[str, ...] = option(
        "origins", (), "Websites whose pages may read answers, such as https://chat.example.org; "
        "* is all of them.", GATEWAY, live=True,
    )  # fmt: skip
    trusted_proxies: tuple[str, ...] = option(
        "networks", (), "Proxies whose headers say who a client is: addresses or networks, such "
        "as 10.0.0.0/8.", GATEWAY,
    )  # fmt: skip
    tls_cert: str | None = option(
        "path", None, "Certificate chain (PEM), for HTTPS; read again when it changes.",
        GATEWAY, live=True,
    )  # fmt: skip
    tls_key: str | None = option(
        "path", None, "Private key (PEM) of tls_cert, readable by its owner only.",
        GATEWAY, live=True,
    )  # fmt: skip
    db_url: str | None = option(
        "url", None, "Database of keys, use and sessions: sqlite:////path/to/llmkit.db or "
        "postgresql://user@host/name; by default a file in your data folder.", GATEWAY,
        schemes=("sqlite", "postgresql", "postgresql+psycopg"),
    )  # fmt: skip
    redis_url: str | None = option(
        "url", None, "Redis or Valkey, where several gateways share their rates: "
        "redis://host:6379; by default rates are counted in memory.", GATEWAY,
        schemes=("redis", "rediss", "valkey", "valkeys", "unix"),
    )  # fmt: skip
    admin: bool = option(
        "flag", False, "Offer the routes that load, unload, download and delete models.", GATEWAY
    )
    strict: bool = option(
        "flag",
        False,
        "Refuse request fields that are otherwise accepted and ignored.",
        GATEWAY,
    )
    compat_env: bool = option(
        "flag", False, "Read variables of other services, such as MODEL_PATH and PORT, for what "
        "is not set otherwise.", GATEWAY,
    )  # fmt: skip
    api_dialect: str = option(
        "choice", "auto", "What /api/generate and /api/chat speak: Ollama's, or that of services "
        "with /api/llms; auto tells by the fields of a request.", GATEWAY, choices=DIALECTS,
    )  # fmt: skip
    compat: str = option(
        "choice", "none", "The service whose ways to take over: otron refuses unknown models with "
        "400 and stops repetition.", GATEWAY, choices=SERVICES,
    )  # fmt: skip
    drain_s: float = option(
        "number", 30.0, "Seconds for running requests to finish after SIGTERM.", GATEWAY,
        low=0.0, high=DAY_S, unit="s",
    )  # fmt: skip
    fleet_listen: str | None = option(
        "text", None, "Where engines of other hosts announce themselves, such as "
        "tcp://10.0.0.5:7100; needs fleet_key_file.", GATEWAY,
        pattern=r"tcp://(\*|[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]):[0-9]{1,5}",
        wanted="an address such as tcp://10.0.0.5:7100",
    )  # fmt: skip
    fleet_key_file: str | None = option(
        "path", None, "Key that gateways and engines share, readable by its owner only; `llmkit "
        "keys fleet FILE` makes one.", GATEWAY,
    )  # fmt: skip
    body_mb: float = option(
        "number", 16.0, "Largest body of a request.", GATEWAY, low=0.001, high=1024.0, unit="MB"
    )
    media_body_mb: float = option(
        "number", 64.0, "Largest body of a chat, where a model takes pictures or sound.", GATEWAY,
        low=0.001, high=1024.0, unit="MB",
    )  # fmt: skip
    media_hosts: tuple[str, ...] = option(
        "texts", (), "Hosts from which pictures and sounds may be fetched, such as "
        "images.example.org; by default they must be sent along.", GATEWAY, live=True,
    )  # fmt: skip
    audio_mb: float = option(
        "number", 25.0, "Largest file of a transcription.", GATEWAY,
        low=0.001, high=1024.0, unit="MB",
    )  # fmt: skip
    audio_minutes: float = option(
        "number", 60.0, "Longest sound of a transcription.", GATEWAY,
        low=0.1, high=1440.0, unit="minutes",
    )  # fmt: skip

    sessions: bool = option(
        "flag", True, "Keep conversations and responses for their callers in the database, which "
        "is made when the first is kept.", SESSIONS,
    )  # fmt: skip
    max_sessions: int = option(
        "integer", 1000, "Sessions of a caller; the least recently used makes way.", SESSIONS,
        low=1, high=1_000_000,
    )  # fmt: skip
    session_ttl_s: float | None = option(
        "number", None, "How long a session is kept after its last use; by default for ever.",
        SESSIONS, low=1.0, high=1e9, unit="s",
    )  # fmt: skip

    log_level: str = option(
        "choice", "info", "How much to log on standard error.", LOG, choices=LOG_LEVELS, live=True
    )
    log_format: str = option(
        "choice", "pretty", "How to log: for people, or one JSON object a line.", LOG,
        choices=("pretty", "json"),
    )  # fmt: skip
    access_log: bool = option(
        "flag", True, "Log each request: who, what, how long, how many tokens; no texts.", LOG,
        live=True,
    )  # fmt: skip
    metrics: bool = option("flag", True, "Offer /metrics to Prometheus.", LOG)
    otlp_endpoint: str | None = option(
        "url", None, "Where to send OpenTelemetry's spans and metrics, such as "
        "http://127.0.0.1:4318; needs llmkit[otel].", LOG, schemes=("http", "https"),
    )  # fmt: skip
    service_name: str = option(
        "text", "llmkit", "What OpenTelemetry calls this service; OTEL_SERVICE_NAME goes before.",
        LOG,
    )  # fmt: skip

    models: tuple[str, ...] = option(
        "texts", (), "Models to serve: aliases, paths of GGUF files, org/repo:Q4_K_M of the Hub; "
        "without any, all your running engines.", MODELS, key="model",
    )  # fmt: skip
    models_dir: str | None = option(
        "path", None, "Folder whose models can be asked for by name.", MODELS
    )
    default_model: str | None = option(
        "text", None, "Model behind the name default; else the first one.", MODELS, live=True
    )
    allowed_models: tuple[str, ...] = option(
        "globs", (), "Models that may be asked for, as names or globs such as qwen*; by default "
        "all.", MODELS, live=True,
    )  # fmt: skip
    lazy: bool = option("flag", False, "Load models when they are first asked for.", MODELS)
    replicas: int = option(
        "integer", 1, "Processes for each model; requests go to the one that answers soonest, "
        "and on elsewhere when one dies.", MODELS, low=1, high=256,
    )  # fmt: skip
    memory_budget_gb: float | None = option(
        "number", None, "RAM for all models; by default what the machine has left.", MODELS,
        low=0.01, high=1e6, unit="GB",
    )  # fmt: skip
    gpu_budget_gb: float | None = option(
        "number", None, "GPU memory for all models together; by default not bounded.", MODELS,
        low=0.01, high=1e6, unit="GB",
    )  # fmt: skip
    idle_unload_s: float | None = option(
        "number", None, "Unload a model after so long without a request; by default never.",
        MODELS, low=1.0, high=365 * DAY_S, unit="s",
    )  # fmt: skip
    name: str | None = option(
        "text", None, "Model name for callers; for several use [models.NAME].", MODELS
    )
    tuned: bool = option(
        "flag", False, "Use the settings that `llmkit tune` found on this machine.", MODELS
    )
    force: bool = option(
        "flag", False, "Load a model even if it is not expected to fit into memory.", MODELS
    )

    default_max_tokens: int | None = option(
        "integer", None, "Longest answer of a request that does not say; by default as its "
        "interface has it.", GENERATION, low=1, high=MOST_TOKENS, unit="tokens", live=True,
    )  # fmt: skip
    max_tokens_limit: int | None = option(
        "integer", None, "Longest answer that a request may ask for.", GENERATION,
        low=1, high=MOST_TOKENS, unit="tokens", live=True,
    )  # fmt: skip
    over_limit: str = option(
        "choice", "clamp", "A request that asks for more than max_tokens_limit: give it the "
        "limit, or refuse it.", GENERATION, choices=("clamp", "refuse"), live=True,
    )  # fmt: skip
    max_prompt_chars: int | None = option(
        "integer", None, "Longest prompt or conversation.", GENERATION,
        low=1, high=1 << 30, unit="characters", live=True,
    )  # fmt: skip

    max_concurrent: int | None = option(
        "integer", None, "Requests at once of each caller; more are refused.", LIMITS,
        low=1, high=100_000, live=True,
    )  # fmt: skip
    max_queue: int | None = option(
        "integer", None, "Requests that may wait, of all callers together; more are refused. By "
        "default max_waiting of each model.", LIMITS, low=1, high=1_000_000, live=True,
    )  # fmt: skip
    request_timeout_s: float | None = option(
        "number", None, "Longest time for a request; by default without end.", LIMITS,
        low=0.1, high=7 * DAY_S, unit="s", live=True,
    )  # fmt: skip
    rate: str | None = option(
        "rate", None, "Requests of callers without a key, for each address, such as 60/minute.",
        LIMITS, live=True,
    )  # fmt: skip

    response_cache_mb: float = option(
        "number", 0.0, "Memory for answers that are given again to the same deterministic "
        "request; 0 is off.", CACHE, low=0.0, high=1e6, unit="MB",
    )  # fmt: skip
    response_cache_s: float = option(
        "number", 3600.0, "Oldest answer that is given again.", CACHE,
        low=1.0, high=365 * DAY_S, unit="s",
    )  # fmt: skip
    response_cache_shared: bool = option(
        "flag", False, "Share stored answers among all callers.", CACHE
    )

    def __post_init__(self) -> None:
        table.check(self)
        if (self.tls_cert is None) != (self.tls_key is None):
            given, other = (
                ("tls_cert", "tls_key") if self.tls_key is None else ("tls_key", "tls_cert")
            )
            raise InvalidRequestError(f"{given} needs {other} as well.", given)
        if self.fleet_listen is not None and self.fleet_key_file is None:
            raise InvalidRequestError(
                "fleet_listen needs fleet_key_file as well: `llmkit keys fleet FILE` makes a key.",
                "fleet_listen",
            )
        if self.name is not None and len(self.models) > 1:
            raise InvalidRequestError(
                "name is for one model; give several their names by tables [models.NAME].", "name"
            )
        wrong = next((h for h in self.media_hosts if not re.fullmatch(HOST, h)), None)
        if wrong is not None:
            raise InvalidRequestError(
                f"media_hosts: {wrong!r:.80} is no host; name it as in images.example.org, without "
                "https:// and without a port.",
                "media_hosts",
            )
        check_tokens(self.default_max_tokens, self.max_tokens_limit)

    @property
    def model(self) -> str | None:
        """The first of the models."""
        return self.models[0] if self.models else None


GATEWAY_OPTIONS: dict[str, Option] = table.table(GatewayOptions)
