"""Settings of `llmkit serve`: command line, environment (``LLMKIT_PORT=…``) and TOML file.

They take precedence in that order, and before the variables of other services. Unknown keys are
errors. Rows come from the tables of options.
"""

from __future__ import annotations

import difflib
import hashlib
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from llmkit.errors import InvalidRequestError
from llmkit.settings.compat_env import take_compat
from llmkit.settings.document import Document, open_document
from llmkit.settings.entries import KEY_OPTIONS, MODEL_OPTIONS, KeyEntry, ModelEntry
from llmkit.settings.gateway import GATEWAY_OPTIONS, GatewayOptions
from llmkit.settings.hub import HUB_OPTIONS, HubOptions
from llmkit.settings.options import EngineOptions
from llmkit.settings.quotas import Quotas
from llmkit.settings.reading import ENGINE_OPTIONS, Fault, Reading, dotted
from llmkit.settings.values import has_password

__all__ = ["CONFIG", "ServeSettings", "faults_in", "faults_of", "ignored", "read_settings"]

CONFIG = "LLMKIT_CONFIG"
VARIABLE = "the environment variable "  # how a fault of one begins
AT_LINE = re.compile(r"\(at line ([0-9]+), column [0-9]+\)$")  # as tomllib says it


@dataclass(frozen=True, slots=True)
class ServeSettings:
    """Everything that `llmkit serve` or `llmkit hub` was told.

    ``engine`` holds the options for the engines of all models that were set, ``models`` those to
    serve, the named ones first, ``sampling`` the defaults that were set. ``hub`` and ``quotas`` are
    for a hub's service. ``sources`` says where a value came from, by its key
    (``models.small.n_ctx``): a file, ``$LLMKIT_PORT``, "command line" or ``PORT (compat)``; what is
    missing there has its default. ``notes`` say what of other services' variables cannot be
    honoured.
    """

    gateway: GatewayOptions = field(default_factory=GatewayOptions)
    engine: dict[str, Any] = field(default_factory=dict)
    models: tuple[ModelEntry, ...] = ()
    keys: tuple[KeyEntry, ...] = ()
    sampling: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    file: Path | None = None
    notes: tuple[str, ...] = ()
    hub: HubOptions = field(default_factory=HubOptions)
    quotas: Quotas = field(default_factory=Quotas)


def read_settings(
    given: Mapping[str, Any],
    file: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> ServeSettings:
    """Settings by precedence: ``given`` (the command line), environment, ``file``.

    The file is ``$LLMKIT_CONFIG`` if none is named. Raises `InvalidRequestError` naming the key.
    """
    environment = os.environ if environment is None else environment
    if file is None and environment.get(CONFIG):
        file = Path(environment[CONFIG])
    reading = Reading()
    if file is not None:
        reading.take_document(open_document(file))
    reading.take_environment(environment)
    reading.take_given(given)
    notes = take_compat(reading, environment) if reading.top.get("compat_env") else []
    settings = replace(_assembled(reading), notes=tuple(notes))
    if reading.faults:
        first, others = reading.faults[0], len(reading.faults) - 1
        more = f" There are {others} more: `llmkit config check`." if others else ""
        what = "" if first.message.startswith(VARIABLE) else "setting "
        raise InvalidRequestError(f"{what}{first}{more}", first.key)
    if reading.document is not None and _holds_secret(reading):
        reading.document.warn_if_readable()
    return settings


def ignored(settings: ServeSettings, names: Collection[str], why: str) -> tuple[str, ...]:
    """A note on each of the settings and tables ``names`` that was set: it has no effect."""
    return tuple(
        f"{key} ({place}) has no effect: {why}"
        for key, place in settings.sources.items()
        if key.partition(".")[0] in names
    )


def faults_of(file: Path) -> list[Fault]:
    """Everything that is wrong with a settings file, whatever the environment says."""
    try:
        document = open_document(file)
    except InvalidRequestError as error:
        line = AT_LINE.search(str(error))
        return [Fault("", str(error), str(file), int(line[1]) if line else None)]
    reading = _read(document)
    if _holds_secret(reading):
        document.warn_if_readable()
    return sorted(reading.faults, key=lambda fault: fault.line or 0)


def faults_in(document: Document) -> list[Fault]:
    """Everything that is wrong with settings that are not in a file yet."""
    return _read(document).faults


def _read(document: Document) -> Reading:
    reading = Reading()
    reading.take_document(document)
    _assembled(reading)
    return reading


def _assembled(reading: Reading) -> ServeSettings:
    """The settings; what does not fit together is noted as faults."""
    faulty = ServeSettings()
    top = reading.top
    try:
        gateway = GatewayOptions(**_fields(top, GATEWAY_OPTIONS))
    except InvalidRequestError as error:
        reading.fail((), error)
        gateway = faulty.gateway
    engine = {k: v for k, v in top.items() if k in ENGINE_OPTIONS}
    try:
        EngineOptions(**engine)
    except InvalidRequestError as error:
        reading.fail((), error)
        engine = {}
    return ServeSettings(
        gateway,
        engine,
        _models(reading, gateway, engine),
        _keys(reading, gateway.api_key),
        reading.sampling,
        reading.sources,
        None if reading.document is None else reading.document.path,
        hub=HubOptions(**_fields(top, HUB_OPTIONS)),
        quotas=Quotas.of(reading.quota, reading.quotas),
    )


def _fields(values: Mapping[str, Any], rows: Mapping[str, Any]) -> dict[str, Any]:
    return {row.attribute: values[key] for key, row in rows.items() if key in values}


def _models(
    reading: Reading, gateway: GatewayOptions, engine: dict[str, Any]
) -> tuple[ModelEntry, ...]:
    """Those that were listed, then the other tables."""
    general: dict[str, Any] = {
        "lazy": gateway.lazy,
        "idle_unload_s": gateway.idle_unload_s,
        "tuned": gateway.tuned,
        "force": gateway.force,
        "replicas": gateway.replicas,
    }
    tables: dict[str, ModelEntry] = {}
    for name, values in reading.models.items():
        given = general | {"model": name} | _fields(values, MODEL_OPTIONS)
        own = {k: v for k, v in values.items() if k in ENGINE_OPTIONS}
        path = ("models", name)
        try:
            EngineOptions(**{**engine, **own})
            tables[name] = ModelEntry(
                name=name, engine={**engine, **own}, sampling=values.get("sampling", {}), **given
            )
        except InvalidRequestError as error:
            reading.fail(path, error)
    listed: dict[str, ModelEntry] = {}
    for model in gateway.models:
        if model in listed:
            message = f"model names {model!r:.80} twice."
            reading.fail((), InvalidRequestError(message, "model"))
        elif model in reading.models:
            if gateway.name is not None:
                message = f"name is for a model without a table, and {model!r:.80} has one."
                reading.fail((), InvalidRequestError(message, "name"))
            if model in tables:
                listed[model] = tables.pop(model)
        else:
            try:
                listed[model] = ModelEntry(name=gateway.name, engine=engine, model=model, **general)
            except InvalidRequestError as error:
                reading.fail((), InvalidRequestError(str(error), "name"))
    models = (*listed.values(), *tables.values())
    _check_names(reading, models)
    _check_default(reading, gateway, models)
    return models


def _check_names(reading: Reading, models: tuple[ModelEntry, ...]) -> None:
    """No name may stand for two models."""
    owners: dict[str, ModelEntry] = {}
    for model in models:
        for name in (model.name, *model.aliases):
            if name is None:
                continue
            if name in owners:
                other = owners[name].name or owners[name].model
                message = f"aliases: {name!r:.80} is a name of {other!r:.80} already."
                path = ("models", model.name or model.model)
                reading.fail(path, InvalidRequestError(message, "aliases"))
            owners[name] = model


def _check_default(
    reading: Reading, gateway: GatewayOptions, models: tuple[ModelEntry, ...]
) -> None:
    """The default must be one of the models, where all of their names are known here."""
    if gateway.default_model is None or gateway.models_dir is not None or not models:
        return
    names = [name for model in models for name in (model.name, *model.aliases)]
    known = [name for name in names if name is not None]
    if len(known) < len(names) or gateway.default_model in known:
        return
    near = difflib.get_close_matches(gateway.default_model, known, n=1)
    hint = f"; did you mean {near[0]!r:.80}?" if near else f": {', '.join(known):.200}."
    message = f"default_model must be one of the models{hint}"
    reading.fail((), InvalidRequestError(message, "default_model"))


def _keys(reading: Reading, api_key: str | None) -> tuple[KeyEntry, ...]:
    found: dict[str, KeyEntry] = {}
    faulty = {fault.key for fault in reading.faults}
    owner = None if api_key is None else hashlib.sha256(api_key.encode()).hexdigest()
    for name, values in reading.keys.items():
        path = ("keys", name)
        if faulty & {dotted(*path, "key"), dotted(*path, "key_sha256")}:
            continue  # it has no right key, which was said
        try:
            entry = KeyEntry(name=name, **_fields(values, KEY_OPTIONS))
        except InvalidRequestError as error:
            reading.fail(path, error)
            continue
        if entry.sha256 == owner:  # which would open everything
            message = "this key is also api_key, which has no limits; each needs its own."
            reading.fail(path, InvalidRequestError(message, "key"))
        other = found.setdefault(entry.sha256, entry)
        if other is not entry:
            message = f"the key is that of {other.name!r} too; each needs its own."
            reading.fail(path, InvalidRequestError(message, "key"))
    return tuple(found.values())


def _holds_secret(reading: Reading) -> bool:
    """Whether the file holds what others may not read."""
    document = reading.document
    if document is None:
        return False
    urls = (document.values.get(key) for key, row in GATEWAY_OPTIONS.items() if row.kind == "url")
    return (
        "api_key" in document.values
        or any(entry.get("key") is not None for entry in reading.keys.values())
        or any(isinstance(url, str) and has_password(url) for url in urls)
    )
