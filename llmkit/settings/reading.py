"""Settings gathered from file, environment and command line, each with its place and faults. Pure.

Every fault is found, not only the first.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmkit.errors import InvalidRequestError
from llmkit.settings.document import Document
from llmkit.settings.entries import KEY_OPTIONS, MODEL_OPTIONS
from llmkit.settings.gateway import GATEWAY_OPTIONS
from llmkit.settings.hub import HUB_OPTIONS
from llmkit.settings.options import OPTIONS
from llmkit.settings.quotas import QUOTA_OPTIONS
from llmkit.settings.sampling import SAMPLING_OPTIONS
from llmkit.settings.table import LISTS, Option
from llmkit.settings.values import from_text

__all__ = [
    "COMMAND_LINE",
    "ENGINE_OPTIONS",
    "ENVIRONMENT",
    "TABLES",
    "TOP",
    "Fault",
    "Reading",
    "dotted",
]

ENVIRONMENT, COMMAND_LINE = "LLMKIT_", "command line"
NOT_SETTINGS = ("CONFIG", "BACKEND", "HUB_URL", "JOIN")  # variables that others read
ENGINE_OPTIONS: Mapping[str, Option] = {k: v for k, v in OPTIONS.items() if k != "isolated"}
TOP: Mapping[str, Option] = {**GATEWAY_OPTIONS, **HUB_OPTIONS, **ENGINE_OPTIONS}
ENTRY: Mapping[str, Option] = {**MODEL_OPTIONS, **ENGINE_OPTIONS}
TABLES: Mapping[str, Mapping[str, Option]] = {
    "sampling": SAMPLING_OPTIONS,
    "models": ENTRY,
    "keys": KEY_OPTIONS,
    "quota": QUOTA_OPTIONS,
}
# How the tables are written.
FORMS = {
    "sampling": "[sampling]",
    "models": "[models.NAME]",
    "keys": "[keys.NAME]",
    "quota": "[quota.default] or [quota.groups.NAME]",
}
SPLIT = ("globs", "origins", "networks")  # lists with commas on the command line; paths have some
BARE, MAX_KEY = re.compile(r"[A-Za-z0-9_-]{1,200}"), 200
# What other programs call it.
ELSEWHERE = {
    "model": "path file model_path filename",
    "n_ctx": "ctx_size context context_length context_size max_model_len num_ctx",
    "n_slots": "parallel n_parallel num_parallel max_num_seqs",
    "n_gpu_layers": "gpu_layers ngl num_gpu",
    "threads": "n_threads num_threads",
    "kv_type": "cache_type_k cache_type_v kv_cache_dtype",
    "flash_attention": "flash_attn",
    "cors_origins": "cors origins allowed_origins allow_origins",
    "tls_cert": "ssl_certfile ssl_cert certfile",
    "tls_key": "ssl_keyfile ssl_key keyfile",
    "base_path": "root_path url_prefix prefix",
    "idle_unload_s": "keep_alive",
    "repeat_penalty": "repetition_penalty",
    "default_max_tokens": "max_tokens",
    "name": "served_model_name alias",
    "rate": "rate_limit",
    "key_sha256": "sha256 hash",
    "expires": "expiry expires_at",
    "request_timeout_s": "timeout request_timeout",
    "db_url": "database database_url",
    "redis_url": "redis",
}
SYNONYMS = {other: name for name, others in ELSEWHERE.items() for other in others.split()}


def dotted(*keys: str) -> str:
    """A path of keys as TOML spells it, safe to print.

    >>> dotted("models", "qwen2.5", "n_ctx")
    'models."qwen2.5".n_ctx'
    """
    return ".".join(
        key
        if BARE.fullmatch(key)
        else json.dumps(key[:MAX_KEY], ensure_ascii=not key.isprintable())
        for key in keys
    )


@dataclass(frozen=True, slots=True)
class Fault:
    """What is wrong: a sentence that names the key, where it stands, and the line of a file."""

    key: str
    message: str
    place: str = COMMAND_LINE
    line: int | None = None

    def __str__(self) -> str:
        at = "" if self.place == COMMAND_LINE else self.place
        at += "" if self.line is None else f", line {self.line}"
        return f"{self.message.rstrip('.')} ({at})." if at else self.message


@dataclass(slots=True)
class Reading:
    """What was set: ``top`` settings by name, ``tables`` by table and entry, ``sources`` by key.

    Later calls of ``take_…`` take precedence over earlier ones.
    """

    top: dict[str, Any] = field(default_factory=dict)
    sampling: dict[str, Any] = field(default_factory=dict)
    models: dict[str, dict[str, Any]] = field(default_factory=dict)
    keys: dict[str, dict[str, Any]] = field(default_factory=dict)
    quota: dict[str, Any] = field(default_factory=dict)  # of those in no group
    quotas: dict[str, dict[str, Any]] = field(default_factory=dict)  # by group
    sources: dict[str, str] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    document: Document | None = None

    def take_document(self, document: Document) -> None:
        """The settings of a file."""
        self.document = document
        place = str(document.path)
        for key, value in document.values.items():
            if key == "quota":
                self._take_quota(value, place)
            elif key in TABLES:
                self._take_table(key, value, place)
            elif isinstance(value, dict) and key != "lora":
                self._refuse_table(key, value, place)
            else:
                self._take((), key, value, TOP, self.top, place)

    def take_environment(self, environment: Mapping[str, str]) -> None:
        """The variables ``LLMKIT_…``. Unknown ones are faults: typos must not be silent."""
        for variable, text in environment.items():
            name = variable.upper().removeprefix(ENVIRONMENT)
            if name == variable.upper() or name in NOT_SETTINGS:
                continue
            key, place = name.lower(), f"${variable}"
            if key not in TOP:
                known = [each.upper() for each in (*TOP, *NOT_SETTINGS)]
                near = difflib.get_close_matches(name, known, n=1)
                hint = f" Did you mean {ENVIRONMENT}{near[0]}?" if near else _reason(key)
                if key in SAMPLING_OPTIONS:
                    hint = f" {key} belongs in the table [sampling] of a settings file."
                message = f"the environment variable {variable} is not a setting of llmkit.{hint}"
                self.faults.append(Fault(variable, message))
            else:
                self._take((), key, from_text(text, TOP[key].kind), TOP, self.top, place)

    def take_given(self, given: Mapping[str, Any]) -> None:
        """The options of the command line, typed or as texts."""
        for key, value in given.items():
            row = TOP.get(key)
            if row is not None and isinstance(value, str) and row.kind != "texts":
                value = from_text(value, row.kind)
            elif row is not None and row.kind in SPLIT and isinstance(value, list | tuple):
                value = [part for each in value for part in from_text(str(each), row.kind)]
            if value is not None:
                self._take((), key, value, TOP, self.top, COMMAND_LINE)

    def fail(self, path: tuple[str, ...], error: InvalidRequestError) -> None:
        """Note what is wrong with several settings together."""
        key = (*path, error.param) if error.param else path
        place = self.sources.get(dotted(*key))
        if place is None and path:
            place = str(self.document.path) if self.document is not None else None
        self._fault(key, str(error), place or COMMAND_LINE)

    def _take_table(self, table: str, value: Any, place: str) -> None:
        rows = TABLES[table]
        if table == "sampling" and isinstance(value, dict):
            self._take_values((table,), value, rows, self.sampling, place)
            return
        if not isinstance(value, dict):
            what = "a table" if table == "sampling" else f"tables [{table}.NAME]"
            more = '; a list of models is model = ["a", "b"]' if table == "models" else ""
            self._fault((table,), f"{table} must be {what}{more}.", place)
            return
        entries = self.models if table == "models" else self.keys
        for name, values in value.items():
            if isinstance(values, dict):
                self._take_values((table, name), values, rows, entries.setdefault(name, {}), place)
            else:
                at = dotted(table, name)
                self._fault((table, name), f"{at} must be a table: [{at}].", place)

    def _take_quota(self, value: Any, place: str) -> None:
        tables = value if isinstance(value, dict) else {"": value}
        for name, given in tables.items():
            groups = {"": given} if name != "groups" or not isinstance(given, dict) else given
            for group, values in groups.items():
                path = ("quota", name, group) if group else ("quota", name)
                if not isinstance(values, dict) or not (group or name == "default"):
                    known = FORMS["quota"]
                    at = tuple(key for key in path if key)
                    self._fault(at, f"{dotted(*at)}: quotas belong in tables {known}.", place)
                    continue
                into = self.quotas.setdefault(group, {}) if group else self.quota
                self._take_values(path, values, QUOTA_OPTIONS, into, place)

    def _take_values(
        self,
        path: tuple[str, ...],
        given: Mapping[str, Any],
        rows: Mapping[str, Option],
        into: dict[str, Any],
        place: str,
    ) -> None:
        for key, value in given.items():
            if key == "sampling" and path[0] == "models" and isinstance(value, dict):
                chosen: dict[str, Any] = {}
                self._take_values((*path, key), value, SAMPLING_OPTIONS, chosen, place)
                into[key] = chosen
            elif isinstance(value, dict) and key not in rows and path[0] in ("models", "keys"):
                message = (
                    f"{dotted(*path, key)} is no table of settings; a name with a dot needs "
                    f"quotes: [{dotted(path[0], f'{path[1]}.{key}')}]."
                )
                self._fault((*path, key), message, place)
            else:
                self._take(path, key, value, rows, into, place)

    def _take(
        self,
        path: tuple[str, ...],
        key: str,
        value: Any,
        rows: Mapping[str, Option],
        into: dict[str, Any],
        place: str,
    ) -> None:
        """One setting, if it is right."""
        row = rows.get(key)
        if row is None:
            hint = _near(key, path, rows)
            self._fault((*path, key), f"{dotted(*path, key)} is not a setting{hint}", place)
            return
        if isinstance(value, str) and row.kind in LISTS:
            value = [value]
        if isinstance(value, list) and row.kind in LISTS:
            value = tuple(value)
        if row.kind == "path" and isinstance(value, str):
            value = _expanded(value)
        try:
            row.check(value)
        except InvalidRequestError as error:
            self._fault((*path, key), str(error), place)
            return
        into[key] = value
        self.sources[dotted(*path, key)] = place

    def _refuse_table(self, key: str, value: Mapping[str, Any], place: str) -> None:
        if key in TOP:
            near = f"; tables are [models.NAME] and [keys.NAME], say [{key}s.NAME]" * (
                f"{key}s" in TABLES
            )
            self._fault((key,), f"{key} is a setting, not a table{near}.", place)
            return
        close = difflib.get_close_matches(key, TABLES, n=1)
        known = f"did you mean [{close[0]}]?" if close else f"tables are {', '.join(TABLES)}."
        if not close and (found := next((name for name in value if name in TOP), None)):
            known = f"{found} belongs at the top of the file, before the first [table]."
        self._fault((key,), f"{dotted(key)} is not a table of settings; {known}", place)

    def _fault(self, key: tuple[str, ...], message: str, place: str) -> None:
        """Name the whole key, and find its line."""
        at = dotted(*key)
        if len(key) > 1 and message.startswith((f"{key[-1]} ", f"{key[-1]}: ")):
            message = f"{dotted(*key[:-1])}.{message}"
        elif key and not message.startswith(at):
            message = f"{at}: {message}"
        in_file = self.document is not None and place == str(self.document.path)
        line = self.document.line_of(key) if in_file and self.document is not None else None
        self.faults.append(Fault(at, message, place, line))


def _near(key: str, path: tuple[str, ...], rows: Mapping[str, Option]) -> str:
    """Where a key belongs that is not in these rows, or which one was meant."""
    plain = key.lower().replace("-", "_")
    if plain in rows:
        return f"; did you mean {plain}?"
    if SYNONYMS.get(plain) in rows:
        return f"; did you mean {SYNONYMS[plain]}?"
    if plain == "isolated":
        return _reason(plain)
    if path and plain in TOP:
        return "; it belongs at the top of the file, before the first [table]."
    for table, others in TABLES.items():
        if plain in others and (not path or table != path[0]):
            return f"; it belongs into {FORMS[table]}."
    close = difflib.get_close_matches(plain, _names(path, rows), n=1)
    return f"; did you mean {close[0]}?" if close else "."


def _names(path: tuple[str, ...], rows: Mapping[str, Option]) -> Iterable[str]:
    if not path:
        return [*rows, *TABLES]
    return [*rows, "sampling"] if path[0] == "models" and len(path) == 2 else list(rows)


def _reason(key: str) -> str:
    if key == "isolated":
        return ": a served model always has a process of its own; leave it out."
    return ""


def _expanded(path: str) -> str:
    try:
        return str(Path(path).expanduser()) if path.startswith("~") else path
    except RuntimeError:
        return path  # no such user: whoever opens it says so
