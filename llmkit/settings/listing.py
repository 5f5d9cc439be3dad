"""Every setting with its value and where that came from, secrets masked. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import date
from typing import Any

from llmkit.settings.entries import KEY_OPTIONS, MODEL_OPTIONS
from llmkit.settings.gateway import GATEWAY_OPTIONS
from llmkit.settings.hub import HUB_OPTIONS
from llmkit.settings.quotas import QUOTA_OPTIONS, Quota
from llmkit.settings.reading import ENGINE_OPTIONS, dotted
from llmkit.settings.sampling import SAMPLING_OPTIONS
from llmkit.settings.serving import ServeSettings
from llmkit.settings.table import Option
from llmkit.settings.values import MASK, mask

__all__ = ["DEFAULT", "Setting", "as_toml", "listed"]

DEFAULT = "default"
SHOWN_DIGITS = 8  # of a SHA-256: enough to recognise it, too few to look for its key
ENTRY: Mapping[str, Option] = {**MODEL_OPTIONS, **ENGINE_OPTIONS}


@dataclass(frozen=True, slots=True)
class Setting:
    """``path`` is its key, ``source`` a file, ``$LLMKIT_PORT``, "command line" or "default"."""

    path: tuple[str, ...]
    row: Option
    value: Any
    source: str = DEFAULT

    @property
    def key(self) -> str:
        return dotted(*self.path)

    @property
    def table(self) -> str:
        """The table it stands in; empty at the top."""
        return dotted(*self.path[:-1])

    @property
    def shown(self) -> Any:
        """The value as JSON has it, without what is secret."""
        value = self.value
        if self.row.kind == "secret":
            return None if value is None else MASK
        if self.row.name == "key_sha256" and isinstance(value, str):
            return f"{value[:SHOWN_DIGITS]}…"
        if self.row.kind == "url" and isinstance(value, str):
            return mask(value)
        return _plain(value)


def listed(settings: ServeSettings) -> list[Setting]:
    """All settings; of tables [models.NAME], [keys.NAME] and [quota…] those that were set."""
    return list(_all(settings))


def _all(settings: ServeSettings) -> Iterator[Setting]:
    sources = settings.sources

    def setting(path: tuple[str, ...], row: Option, value: Any) -> Setting:
        return Setting(path, row, value, sources.get(dotted(*path), DEFAULT))

    for key, row in GATEWAY_OPTIONS.items():
        yield setting((key,), row, getattr(settings.gateway, row.attribute))
    for key, row in HUB_OPTIONS.items():
        yield setting((key,), row, getattr(settings.hub, row.attribute))
    for key, row in ENGINE_OPTIONS.items():
        yield setting((key,), row, settings.engine.get(key, row.default))
    for key, row in SAMPLING_OPTIONS.items():
        yield setting(("sampling", key), row, settings.sampling.get(key))
    for model in settings.models:
        if model.name in (None, settings.gateway.name):
            continue  # listed as `model`, so it has no table
        table = ("models", str(model.name))
        for key, row in ENTRY.items():
            if key == "model" or dotted(*table, key) in sources:
                value = getattr(model, row.attribute) if key in MODEL_OPTIONS else model.engine[key]
                yield setting((*table, key), row, value)
        for key, row in SAMPLING_OPTIONS.items():
            if key in model.sampling:
                yield setting((*table, "sampling", key), row, model.sampling[key])
    for entry in settings.keys:
        for key, row in KEY_OPTIONS.items():
            path = ("keys", entry.name, key)
            if key == "enabled" or dotted(*path) in sources:
                yield setting(path, row, getattr(entry, row.attribute))
    quotas: dict[tuple[str, ...], Quota] = {("quota", "default"): settings.quotas.default}
    for name, quota in settings.quotas.groups.items():
        quotas["quota", "groups", name] = quota
    for at, quota in quotas.items():
        for key, row in QUOTA_OPTIONS.items():
            if dotted(*at, key) in sources:
                yield setting((*at, key), row, getattr(quota, row.attribute))


def _plain(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return [_plain(each) for each in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    return value.isoformat() if isinstance(value, date) else value


def as_toml(value: Any) -> str:
    """A value as a settings file spells it.

    >>> as_toml(["a", 1.5, True])
    '["a", 1.5, true]'
    """
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, date):
        return value.isoformat()
    if isinstance(value, list | tuple):
        return f"[{', '.join(as_toml(each) for each in value)}]"
    if isinstance(value, Mapping):
        pairs = (f"{dotted(str(key))} = {as_toml(each)}" for key, each in value.items())
        return f"{{ {', '.join(pairs)} }}"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=not value.isprintable())
    return str(value)
