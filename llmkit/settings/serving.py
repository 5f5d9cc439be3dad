"""Settings of `llmkit serve`: command line, environment (``LLMKIT_PORT=…``) and TOML file.

They take precedence in that order. Unknown keys are errors. Rows come from the tables of options.
"""

from __future__ import annotations

import difflib
import os
import tomllib
from pathlib import Path
from typing import Any

from pydantic import Field, SecretStr, ValidationError, create_model
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from llmkit.errors import InvalidRequestError
from llmkit.settings.gateway import GATEWAY_OPTIONS, GatewayOptions
from llmkit.settings.options import OPTIONS, EngineOptions
from llmkit.settings.table import Option, check
from llmkit.system.files import open_plain
from llmkit.system.reporting import report

__all__ = ["ServeSettings", "read_settings"]

ENVIRONMENT = "LLMKIT_"
MAX_FILE_BYTES = 1 << 20


class ServeSettings:
    """The options of the ``gateway``, and those of the ``engine`` that were set."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.gateway = GatewayOptions(**{k: v for k, v in values.items() if k in GATEWAY_OPTIONS})
        self.engine = {k: v for k, v in values.items() if k in OPTIONS}
        check(self.gateway)
        EngineOptions(**self.engine)


class _Sources(BaseSettings):
    model_config = SettingsConfigDict(env_prefix=ENVIRONMENT, extra="forbid")

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


def _row(row: Option) -> Any:
    kind: Any = SecretStr if row.kind == "secret" else row.annotation
    if row.kind == "adapters":
        kind = list[str] | dict[str, float] | str
    return (kind | None, Field(None, description=row.help))


_ROWS = {name: _row(row) for name, row in {**GATEWAY_OPTIONS, **OPTIONS}.items()}
_Settings: type[BaseSettings] = create_model("_Settings", __base__=_Sources, **_ROWS)


def read_settings(given: dict[str, Any], file: Path | None = None) -> ServeSettings:
    """Settings by precedence: ``given`` (the command line), environment, ``file``.

    Raises `InvalidRequestError` naming the key.
    """
    _check_environment()
    try:
        values: dict[str, Any] = {}
        if file is not None:
            _check_owner(file)
            with open_plain(file) as opened:
                values = tomllib.loads(opened.read(MAX_FILE_BYTES).decode("utf-8"))
            values = _known(values)
        values |= _known(given)
        return ServeSettings(values)
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise InvalidRequestError(f"cannot read the settings file {file}: {error}") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = str(first["loc"][0]) if first["loc"] else ""
        hint = _near(key) if first["type"] == "extra_forbidden" else ""
        raise InvalidRequestError(f"setting {key}: {first['msg']}{hint}", key) from None
    except InvalidRequestError as error:
        raise InvalidRequestError(f"setting {error}", error.param) from None


def _known(given: dict[str, Any]) -> dict[str, Any]:
    """The values that were set, by ``given`` or else the environment."""
    values = _Settings(**given).model_dump(exclude_unset=True)
    return {
        name: value.get_secret_value() if isinstance(value, SecretStr) else value
        for name, value in values.items()
        if value is not None
    }


def _near(key: str) -> str:
    near = difflib.get_close_matches(key, list(_ROWS), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _check_owner(file: Path) -> None:
    """Check that others cannot change the file, nor read a key in it.

    Raises `InvalidRequestError` if everyone can write it; warns otherwise.
    """
    if not hasattr(os, "getuid"):
        return
    status = file.stat()
    if status.st_mode & 0o002:
        message = f"the settings file {file} is writable by everyone; run `chmod o-w {file}` first."
        raise InvalidRequestError(message, "config")
    if status.st_uid not in (os.getuid(), 0) or status.st_mode & 0o020:
        report(f"the settings file {file} is writable by others.")
    if status.st_mode & 0o044:
        with open_plain(file) as opened:
            holds_key = b"api_key" in opened.read(MAX_FILE_BYTES)
        if holds_key:
            report(
                f"the settings file {file} contains the key and others can read it: "
                f"chmod 600 {file}"
            )


def _check_environment() -> None:
    """Refuse unknown variables, which pydantic-settings ignores: typos must not be silent."""
    known = {f"{ENVIRONMENT}{name.upper()}" for name in _ROWS}
    for name in os.environ:
        if name.upper().startswith(ENVIRONMENT) and name.upper() not in known:
            near = difflib.get_close_matches(name.upper(), known, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise InvalidRequestError(
                f"the environment variable {name} is not a setting of llmkit.{hint}", name
            )
