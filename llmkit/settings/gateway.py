"""The options of a standalone gateway, beside those of its engine. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass

from llmkit.settings import table
from llmkit.settings.table import Option, option

__all__ = ["GATEWAY_OPTIONS", "GatewayOptions"]

GATEWAY, MODEL = "Gateway", "Model"
LOG_LEVELS = ("debug", "info", "warning", "error")


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayOptions:
    """What `llmkit serve` runs with."""

    model: str | None = option(
        "text", None, "Alias or path of a GGUF file; without it, all your running engines.", MODEL
    )
    host: str = option(
        "text",
        "127.0.0.1",
        "Address to listen on; a key is required unless it is loopback.",
        GATEWAY,
    )
    port: int = option(
        "integer", 3000, "Port to listen on; 0 picks a free one.", GATEWAY, low=0, high=65535
    )
    api_key: str | None = option(
        "secret", None, "Key that callers must send; $LLMKIT_API_KEY keeps it out of `ps`.", GATEWAY
    )
    strict: bool = option(
        "flag",
        False,
        "Refuse request fields that are otherwise accepted and ignored.",
        GATEWAY,
    )
    drain_s: float = option(
        "number", 30.0, "Seconds for running requests to finish after SIGTERM.", GATEWAY,
        low=0.0, high=86_400.0, unit="s",
    )  # fmt: skip
    log_level: str = option(
        "choice", "info", "How much to log on standard error.", GATEWAY, choices=LOG_LEVELS
    )
    name: str | None = option("text", None, "Model name for callers.", MODEL)
    tuned: bool = option(
        "flag", False, "Use the settings that `llmkit tune` found on this machine.", MODEL
    )
    force: bool = option(
        "flag", False, "Load a model even if it is not expected to fit into memory.", MODEL
    )


GATEWAY_OPTIONS: dict[str, Option] = table.table(GatewayOptions)
