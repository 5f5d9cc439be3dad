"""Settings of `llmkit serve`, from the command line, the environment (``LLMKIT_PORT=…``) and a TOML file, in that order. Unknown keys are errors."""

from __future__ import annotations

import difflib
import os
import tomllib
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from llmkit.errors import InvalidRequestError
from llmkit.files import open_plain
from llmkit.reporting import report

__all__ = ["ENGINE_OPTIONS", "ServeSettings", "read_settings"]

# What `llmkit engine` and `llmkit serve` hand on to `load`.
ENGINE_OPTIONS = (
    "name",
    "n_ctx",
    "n_slots",
    "n_gpu_layers",
    "threads",
    "kv_type",
    "prefix_dir",
    "target_itl_ms",
    "draft",
    "context_shift",
    "tuned",
    "share_prefixes",
)
ENVIRONMENT = "LLMKIT_"
MAX_FILE_BYTES = 1 << 20


class ServeSettings(BaseSettings):
    """What `llmkit serve` runs with."""

    model_config = SettingsConfigDict(env_prefix=ENVIRONMENT, extra="forbid")

    model: str | None = Field(None, description="alias or path of a GGUF file; none exposes all running engines")
    host: str = Field("127.0.0.1", description="address to listen on; others than loopback need a key")
    port: int = Field(3000, ge=0, le=65535, description="port to listen on; 0 takes a free one")
    api_key: SecretStr | None = Field(None, description="key that callers must send")
    strict: bool = Field(False, description="refuse fields that would otherwise be accepted and ignored")
    drain_s: float = Field(30.0, ge=0, description="seconds that running requests may still take after SIGTERM")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="how much is logged on standard error")
    name: str | None = Field(None, description="name of the model for callers")
    n_ctx: int | None = Field(None, ge=1, description="most tokens of one request")
    n_slots: int | None = Field(None, ge=1, description="requests computed at once")
    n_gpu_layers: int | Literal["auto"] = Field("auto", description="layers on the GPU; -1 means all, auto as many as fit")
    threads: int | None = Field(None, ge=1, description="compute threads; none means all cores")
    kv_type: Literal["f16", "q8_0", "q4_0"] | None = Field(None, description="type of the KV cache's numbers")
    prefix_dir: str | None = Field(None, description="folder where computed prefixes outlive the process")
    draft: str | None = Field(None, description="a smaller model of the same vocabulary that guesses tokens")
    context_shift: bool | None = Field(None, description="whether a request that fills its context goes on without the older half of it")
    target_itl_ms: float | None = Field(None, gt=0, description="time between two tokens of a stream that prompts of others must not stretch")
    share_prefixes: bool | None = Field(None, description="whether all callers share cached beginnings of prompts")
    tuned: bool | None = Field(None, description="use what llmkit.tune() found best on this machine")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings


def read_settings(given: dict[str, Any], file: Path | None = None) -> ServeSettings:
    """Settings by precedence: ``given`` (what the command line said), environment, ``file``.

    Raises `InvalidRequestError` that names the key.
    """
    _check_environment()
    try:
        known = ServeSettings(**given)
        if file is None:
            return known
        _check_owner(file)
        with open_plain(file) as opened:
            values = tomllib.loads(opened.read(MAX_FILE_BYTES).decode("utf-8"))
        return ServeSettings(**{**values, **known.model_dump(exclude_unset=True)})
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise InvalidRequestError(f"cannot read the settings file {file}: {error}") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"]))
        raise InvalidRequestError(f"setting {key}: {first['msg']}", key) from None


def _check_owner(file: Path) -> None:
    """A file that others may write says what they want; one that holds a key is for its owner's eyes. Raises `InvalidRequestError` for the first."""
    if not hasattr(os, "getuid"):
        return
    status = file.stat()
    if status.st_mode & 0o002:
        raise InvalidRequestError(f"the settings file {file} can be written by everybody; run `chmod o-w {file}` first.", "config")
    if status.st_uid not in (os.getuid(), 0) or status.st_mode & 0o020:
        report(f"the settings file {file} can be written by others.")
    if status.st_mode & 0o044:
        with open_plain(file) as opened:
            holds_key = b"api_key" in opened.read(MAX_FILE_BYTES)
        if holds_key:
            report(f"the settings file {file} holds the key, and others may read it: chmod 600 {file}")


def _check_environment() -> None:
    """pydantic-settings passes over variables that it does not know; a typing error must not be silent."""
    known = {f"{ENVIRONMENT}{name.upper()}" for name in ServeSettings.model_fields}
    for name in os.environ:
        if name.upper().startswith(ENVIRONMENT) and name.upper() not in known:
            near = difflib.get_close_matches(name.upper(), known, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise InvalidRequestError(f"the environment variable {name} is no setting of llmkit.{hint}", name)
