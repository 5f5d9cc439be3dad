"""Settings that are read again while a server runs: what changed, and what can change now.

`reload` runs on the gateway's loop; the rest is pure.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from llmkit.errors import LLMKitError
from llmkit.settings.entries import MODEL_OPTIONS, ModelEntry
from llmkit.settings.gateway import GATEWAY_OPTIONS
from llmkit.settings.listing import Setting, as_toml, listed
from llmkit.settings.reading import dotted
from llmkit.settings.serving import ServeSettings

__all__ = ["Change", "changes", "reload", "taken_over"]

logger = logging.getLogger("llmkit.gateway")

TABLES = ("models", "keys")
KeyPath = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Change:
    """A setting that is another one now, in words; what is secret is not shown.

    ``live``: it can change while the server runs; else with its next start.
    """

    key: str
    what: str
    live: bool

    def __str__(self) -> str:
        return f"{self.key} {self.what}"


def changes(old: ServeSettings, new: ServeSettings) -> list[Change]:
    """What differs.

    >>> from llmkit.settings.gateway import GatewayOptions
    >>> new = ServeSettings(GatewayOptions(port=4000, log_level="debug"))
    >>> [(str(change), change.live) for change in changes(ServeSettings(), new)]
    [('port 3000 -> 4000', False), ('log_level "info" -> "debug"', True)]
    """
    before = {setting.path: setting for setting in listed(old)}
    after = {setting.path: setting for setting in listed(new)}
    found: list[Change] = []
    for path in dict.fromkeys((*before, *after)):
        had, has = before.get(path), after.get(path)
        if path[0] in TABLES:
            entry = path[:2]
            was_there, is_there = _is_in(before, entry), _is_in(after, entry)
            if was_there != is_there:
                what = "is new" if is_there else "is gone"
                change = Change(dotted(*entry), what, path[0] == "keys")
                found += [] if change in found else [change]
                continue
        what = _difference(had, has)
        if what:
            row = (had or has or after[path]).row
            found.append(Change(dotted(*path), what, row.live))
    return found


def _is_in(settings: Mapping[KeyPath, Setting], entry: KeyPath) -> bool:
    # A table is there if the one of its keys is that is always listed.
    return (*entry, "model") in settings or (*entry, "enabled") in settings


def _difference(had: Setting | None, has: Setting | None) -> str:
    """What became of a value; empty if it is the same."""
    row = (had or has).row  # type: ignore[union-attr]  # one of them is there
    old = row.default if had is None else had.value
    new = row.default if has is None else has.value
    if old == new:
        return ""
    shown = [_words(row, value, s) for value, s in ((old, had), (new, has))]
    return "is another one" if shown[0] == shown[1] else f"{shown[0]} -> {shown[1]}"


def _words(row: Any, value: Any, setting: Setting | None) -> str:
    shown = setting.shown if setting is not None else Setting((row.name,), row, value).shown
    return "unset" if shown is None else as_toml(shown)


def reload(
    settings: ServeSettings,
    read: Callable[[], ServeSettings],
    apply: Callable[[ServeSettings], None],
) -> ServeSettings:
    """Read the settings again, have ``apply`` take over what can change now, and log all of it.

    ``apply`` is called also when nothing changed: certificates may have. Returns the settings that
    count from now on: after an error those of before.
    """
    try:
        new = read()
        found = changes(settings, new)
        current = taken_over(settings, new)
        apply(current)
    except (LLMKitError, OSError) as error:
        logger.error("the settings stay as they were: %s", error)
        return settings
    now = [str(change) for change in found if change.live]
    later = [str(change) for change in found if not change.live]
    logger.info("the settings were read again: %s", "; ".join(now) or "nothing changes")
    if later:
        logger.warning("these settings change with a restart only: %s", "; ".join(later))
    return current


def taken_over(old: ServeSettings, new: ServeSettings) -> ServeSettings:
    """The old settings with what can change at run time from the new ones."""
    live = {
        row.attribute: getattr(new.gateway, row.attribute)
        for row in GATEWAY_OPTIONS.values()
        if row.live
    }
    renewed = {_identity(model): model for model in new.models}
    models = tuple(_renewed(model, renewed.get(_identity(model))) for model in old.models)
    settings = replace(
        old,
        gateway=replace(old.gateway, **live),
        models=models,
        keys=new.keys,
        sampling=new.sampling,
        hub=new.hub,
        quotas=new.quotas,
    )
    is_live = {each.key for each in (*listed(old), *listed(new)) if each.row.live}
    sources = {key: place for key, place in old.sources.items() if key not in is_live}
    sources |= {key: place for key, place in new.sources.items() if key in is_live}
    return replace(settings, sources=sources)


def _identity(model: ModelEntry) -> tuple[str | None, str]:
    return model.name, model.model


def _renewed(old: ModelEntry, new: ModelEntry | None) -> ModelEntry:
    if new is None:
        return old
    live = {r.attribute: getattr(new, r.attribute) for r in MODEL_OPTIONS.values() if r.live}
    return replace(old, sampling=new.sampling, **live)
