"""OpenTelemetry, if it is asked for: which endpoint, and what is missing. Imports it only then."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from llmkit.errors import InvalidRequestError

if TYPE_CHECKING:
    from llmkit.gateway.ops.tracing import Tracer

__all__ = ["start_telemetry", "wants_telemetry"]

logger = logging.getLogger("llmkit.gateway")

# Any of these says where to export to, or that it is wanted at all.
ENDPOINTS = (
    "OTEL_EXPORTER_OTLP_ENDPOINT",
    "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT",
    "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT",
)
EXPORTERS = ("OTEL_TRACES_EXPORTER", "OTEL_METRICS_EXPORTER")
PROTOCOLS = (
    "OTEL_EXPORTER_OTLP_PROTOCOL",
    "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL",
    "OTEL_EXPORTER_OTLP_METRICS_PROTOCOL",
)
INSTALL = "pip install 'llmkit[otel]'"


def wants_telemetry(endpoint: str | None, environment: Mapping[str, str] | None = None) -> bool:
    """Whether the setting or the standard variables ask for an export.

    >>> wants_telemetry(None, {"OTEL_SERVICE_NAME": "gateway"})
    False
    >>> wants_telemetry(None, {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://localhost:4318"})
    True
    """
    environment = os.environ if environment is None else environment
    if environment.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return False
    return bool(
        endpoint
        or any(environment.get(name) for name in ENDPOINTS)
        or any("otlp" in environment.get(name, "") for name in EXPORTERS)
    )


def start_telemetry(
    endpoint: str | None,
    environment: Mapping[str, str] | None = None,
    *,
    service_name: str = "llmkit",
) -> Tracer | None:
    """A tracer that exports by OTLP over HTTP; None if nobody asked for one.

    ``endpoint`` is the collector's address, such as http://localhost:4318; None leaves it to the
    standard variables, which go before ``service_name`` too. Raises `InvalidRequestError` for an
    address that cannot be one, and if OpenTelemetry is not installed, unless only the environment
    asks for it.
    """
    environment = os.environ if environment is None else environment
    if not wants_telemetry(endpoint, environment):
        return None
    if endpoint is not None:
        _check(endpoint)
    for name in PROTOCOLS:
        if environment.get(name, "").startswith("grpc"):
            logger.warning(
                "%s asks for gRPC; llmkit exports by HTTP (http/protobuf) all the same, usually "
                "to port 4318",
                name,
            )
    try:
        from llmkit.gateway.ops.tracing import Tracer
    except ImportError as error:
        message = f"traces need OpenTelemetry, which is not installed: {INSTALL} ({error})."
        if endpoint is not None:
            raise InvalidRequestError(message, "otlp_endpoint") from error
        logger.warning("%s Going on without.", message)
        return None
    try:
        return Tracer(endpoint, environment, service_name)
    except ValueError as error:
        message = f"OpenTelemetry refuses what an OTEL_ variable says: {error}"
        raise InvalidRequestError(message, "otlp_endpoint") from error


def _check(endpoint: str) -> None:
    try:
        parts = urlsplit(endpoint)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname)
        port = parts.port
    except ValueError:
        valid, port = False, None
    if not valid or not endpoint.isprintable():
        raise InvalidRequestError(
            "otlp_endpoint must be the address of a collector, such as http://localhost:4318, "
            f"not {endpoint!r:.100}.",
            "otlp_endpoint",
        )
    if port == 4317:
        logger.warning(
            "otlp_endpoint has the port 4317, where collectors usually speak gRPC; "
            "their port for HTTP is 4318"
        )
