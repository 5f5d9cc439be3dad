"""The variables of other services, read as fallbacks where ``compat_env`` says so. Pure.

One table says which setting each of them is. Whatever a file, ``LLMKIT_…`` or the command line sets
goes before; of two variables for one setting the first in the table counts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from llmkit.errors import InvalidRequestError
from llmkit.settings import foreign
from llmkit.settings.entries import ModelEntry
from llmkit.settings.reading import TOP, Fault, Reading, dotted
from llmkit.settings.sampling import SAMPLING_OPTIONS

__all__ = ["SWITCHES", "VARIABLES", "Variable", "source_of", "take_compat"]

MODELS, ALL = "LLM_ALLOWED_MODELS", "*"


@dataclass(frozen=True, slots=True)
class Variable:
    """``key`` is our setting; without one, ``why`` says what becomes of the variable.

    ``read`` turns its text into our value, None if the default is meant; ``note`` gives what is to
    be said of it. It counts only if its ``switch`` is on.
    """

    name: str
    key: str = ""
    read: Callable[[str], Any] = str
    switch: str = ""
    why: str = ""
    note: Callable[[str], str] = lambda _: ""


@dataclass(frozen=True, slots=True)
class Switch:
    """A variable that turns others on: whether it is on unless it says, and what it needs."""

    is_on: bool
    needs: tuple[str, ...] = ()


SWITCHES: Mapping[str, Switch] = {
    "ENABLE_CORS": Switch(True),
    "ENABLE_RATE_LIMIT": Switch(True, ("RATE_LIMIT_MAX",)),
    "ENABLE_CONTINUOUS_BATCHING": Switch(True),
    "LLM_ENABLE_ISQ": Switch(False, ("LLM_ISQ_TYPE",)),
    "SERVER_SSL_ENABLED": Switch(False, ("TLS_SERVER_CERT_PATH", "TLS_SERVER_KEY_PATH")),
}


def _layers(text: str) -> Any:
    return text if text == "auto" else foreign.as_integer(text)


def _origins(text: str) -> list[str]:
    return [origin.rstrip("/") or origin for origin in foreign.as_list(text)]


def _any_origin(text: str) -> list[str]:
    return ["*"] if foreign.as_flag(text) else []


VARIABLES: tuple[Variable, ...] = (
    Variable("LLM_INFERENCE_HOSTNAME", "host"),
    Variable("HOST", "host"),
    Variable("LLM_INFERENCE_PORT", "port", foreign.as_integer),
    Variable("SERVER_PORT", "port", foreign.as_integer),
    Variable("PORT", "port", foreign.as_integer),
    Variable("CORS_ALLOWED_ORIGINS", "cors_origins", _origins, "ENABLE_CORS"),
    Variable("ENABLE_CORS", "cors_origins", _any_origin),
    Variable("TLS_SERVER_CERT_PATH", "tls_cert", switch="SERVER_SSL_ENABLED"),
    Variable("TLS_SERVER_KEY_PATH", "tls_key", switch="SERVER_SSL_ENABLED"),
    Variable("SERVER_SSL_ENABLED", why="turns TLS_SERVER_CERT_PATH and TLS_SERVER_KEY_PATH on"),
    Variable("MODEL_PATH", "model"),
    Variable("LLAMA_MODEL_PATH", "model"),
    Variable("MODELS_DIR", "models_dir"),
    Variable("LLM_MODEL_PATH", "models_dir"),
    Variable(MODELS, "allowed_models", foreign.as_list),
    Variable("GPU_LAYERS", "n_gpu_layers", _layers),
    Variable("CONTEXT_SIZE", "n_ctx", foreign.as_context),
    Variable("BATCH_SIZE", "batch_tokens", foreign.as_integer),
    Variable("ENABLE_CONTINUOUS_BATCHING", "batching", foreign.as_flag),
    Variable("MAX_BATCH_SIZE", "batch_requests", foreign.as_integer, "ENABLE_CONTINUOUS_BATCHING"),
    Variable("BATCH_TIMEOUT_MS", "batch_wait_ms", foreign.as_number, "ENABLE_CONTINUOUS_BATCHING"),
    Variable("LLM_ISQ_TYPE", "quantize", foreign.as_weights, "LLM_ENABLE_ISQ"),
    Variable("LLM_ENABLE_ISQ", why="turns LLM_ISQ_TYPE on"),
    Variable("MAX_QUEUE_SIZE", "max_queue", foreign.as_integer),
    Variable("LLM_MAX_CONCURRENT_REQUESTS", "n_slots", foreign.as_slots, note=foreign.slots_note),
    Variable("RATE_LIMIT_MAX", "rate", switch="ENABLE_RATE_LIMIT"),
    Variable("RATE_LIMIT_WINDOW", why="the seconds of RATE_LIMIT_MAX; 60 without it"),
    Variable("ENABLE_RATE_LIMIT", why="turns RATE_LIMIT_MAX on"),
    Variable("LLM_DEFAULT_MAX_TOKENS", "default_max_tokens", foreign.as_integer),
    Variable("LLM_MAX_TOKENS_LIMIT", "max_tokens_limit", foreign.as_integer),
    Variable("LLM_DEFAULT_TEMPERATURE", "sampling.temperature", foreign.as_number),
    Variable("LLM_DEFAULT_TOP_P", "sampling.top_p", foreign.as_number),
    Variable("OTEL_EXPORTER_OTLP_ENDPOINT", "otlp_endpoint", note=foreign.collector_note),
    Variable("LOG_FORMAT", "log_format", foreign.as_log_format),
    Variable("RUST_LOG", "log_level", foreign.as_log_level),
    Variable("HF_HOME", why="read by huggingface_hub in any case"),
    Variable("HF_ENDPOINT", why="read by huggingface_hub in any case"),
    Variable("SERVICE_NAME", "service_name"),
)


def source_of(variable: str) -> str:
    """Where a value came from, as `llmkit config show` says it."""
    return f"{variable} (compat)"


def take_compat(reading: Reading, environment: Mapping[str, str]) -> list[str]:
    """Take the variables for what nothing else has set. Returns what cannot be honoured, and notes
    values that make no sense as faults."""
    given = {v.name: t for v in VARIABLES if (t := environment.get(v.name, "").strip())}
    return _Compat(reading, given).take()


class _Compat:
    def __init__(self, reading: Reading, given: Mapping[str, str]) -> None:
        self._reading, self._given = reading, given
        self._notes: list[str] = []
        # Before anything is taken: a variable must not keep another of its own kind out.
        self._has_models = bool(reading.top.get("model") or reading.models)

    def take(self) -> list[str]:
        is_on = {name: self._is_on(name) for name in SWITCHES}
        window_s = self._window_s()
        for variable in VARIABLES:
            text = self._given.get(variable.name)
            if text is None:
                continue
            if variable.switch and not is_on[variable.switch]:
                self._say_unused(variable)
            elif variable.name == MODELS:
                self._take_models(text)
            elif variable.key:
                read = self._rate(window_s) if variable.key == "rate" else variable.read
                self._take(variable, self._placed(variable, text), text, read)
        return self._notes

    def _is_on(self, name: str) -> bool:
        """Whether a switch is on, with what it needs."""
        switch, text = SWITCHES[name], self._given.get(name)
        if text is None:
            return switch.is_on
        try:
            is_on = foreign.as_flag(text)
        except ValueError as error:
            self._fault(name, f"{error}, not {text!r:.60}")
            return False
        for needed in switch.needs:
            if is_on and needed not in self._given and not self._is_set(_key_of(needed)):
                self._fault(name, f"needs {needed} as well")
        return is_on

    def _is_set(self, key: str) -> bool:
        return key in self._reading.top

    def _say_unused(self, variable: Variable) -> None:
        if variable.switch not in self._given:
            self._notes.append(f"{variable.name} is not used: {variable.switch} is not true")

    def _placed(self, variable: Variable, text: str) -> str:
        """The key of a setting: a file where a folder is usual is a model."""
        if variable.name == "LLM_MODEL_PATH" and text.lower().endswith(".gguf"):
            return "model"
        return variable.key

    def _take(self, variable: Variable, key: str, text: str, read: Callable[[str], Any]) -> None:
        table, _, name = key.rpartition(".")
        rows, into = (
            (SAMPLING_OPTIONS, self._reading.sampling) if table else (TOP, self._reading.top)
        )
        if name in into or (key == "model" and self._has_models):
            return
        try:
            value = [text] if key == "model" else read(text)
            if value is None:  # the default is meant
                return
            rows[name].check(value)
            if said := variable.note(text):
                self._notes.append(f"{variable.name}: {said}")
        except InvalidRequestError as error:
            self._fault(variable.name, f"is for a setting that does not take it: {error}")
            return
        except ValueError as error:
            self._fault(variable.name, f"{error}, not {text!r:.60}")
            return
        into[name] = tuple(value) if isinstance(value, list) else value
        self._reading.sources[key] = source_of(variable.name)

    def _window_s(self) -> int:
        text = self._given.get("RATE_LIMIT_WINDOW", "60")
        try:
            return foreign.as_seconds(text)
        except ValueError as error:
            self._fault("RATE_LIMIT_WINDOW", f"{error}, not {text!r:.60}")
            return 60

    @staticmethod
    def _rate(window_s: int) -> Callable[[str], str | None]:
        return lambda text: foreign.as_rate(text, window_s)

    def _take_models(self, text: str) -> None:
        """Models that may be asked for; those that are named in full are served too."""
        names = list(dict.fromkeys(foreign.as_list(text)))
        if ALL in names:
            return
        variable = next(v for v in VARIABLES if v.name == MODELS)
        self._take(variable, variable.key, ",".join(names), variable.read)
        if self._has_models:
            return
        served = [name for name in names if "/" in name or name.endswith(".gguf")]
        for name in served:
            entry: dict[str, Any] = {"model": name, "lazy": len(served) > 1}
            try:
                ModelEntry(name=name, **entry)
            except InvalidRequestError as error:
                self._fault(MODELS, f"names a model that cannot be: {error}")
                continue
            self._reading.models[name] = entry
            for key in entry:
                self._reading.sources[dotted("models", name, key)] = source_of(MODELS)

    def _fault(self, name: str, what: str) -> None:
        message = f"the environment variable {name} (compat) {what.rstrip('.')}."
        self._reading.faults.append(Fault(name, message))


def _key_of(name: str) -> str:
    return next(v.key for v in VARIABLES if v.name == name)
