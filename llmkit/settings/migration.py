"""A settings file of another service turned into one of ours. Pure.

Nothing is left out in silence: what is not translated is named with the reason.
"""

from __future__ import annotations

import hashlib
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmkit.errors import InvalidRequestError
from llmkit.settings import foreign
from llmkit.settings.document import Document
from llmkit.settings.entries import KEY_OPTIONS, MODEL_OPTIONS
from llmkit.settings.listing import as_toml
from llmkit.settings.reading import ENGINE_OPTIONS, TOP, dotted
from llmkit.settings.sampling import SAMPLING_OPTIONS
from llmkit.settings.serving import faults_in
from llmkit.settings.table import Option
from llmkit.settings.translations import ENTRY_KEYS, KEY_KEYS, KEYS, REASONS, SWITCHES, same
from llmkit.system.text import printable

__all__ = ["Left", "Migration", "Taken", "migrate"]

MAX_KEY = 200
NO_COUNTERPART = "has no counterpart"
LOCAL = ("127.0.0.1", "localhost", "::1")
LISTS = ("models.available_models", "models.models", "models", "security.api_keys", "api_keys")
WINDOWS = ("rate_limit.window_seconds", "rate_limit.window", "limits.rate_limit_window")
ENTRY = {**MODEL_OPTIONS, **ENGINE_OPTIONS}
ROWS: Mapping[str, Mapping[str, Option]] = {"": TOP, "sampling": SAMPLING_OPTIONS}
KeyPath = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Taken:
    """``theirs`` is now ``path`` = ``value`` here."""

    theirs: str
    path: KeyPath
    value: Any

    @property
    def key(self) -> str:
        return dotted(*self.path)

    @property
    def shown(self) -> Any:
        """The value, without what is secret."""
        return "***" if self.path[-1] in ("api_key", "key_sha256") else self.value


@dataclass(frozen=True, slots=True)
class Left:
    """``theirs`` is not translated, and ``why``."""

    theirs: str
    why: str


@dataclass(slots=True)
class Migration:
    """What was translated and what was not; ``text`` is the file."""

    taken: list[Taken] = field(default_factory=list)
    left: list[Left] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        """A settings file, valid as it stands."""
        lines = ["# Settings of `llmkit serve`, translated by `llmkit config migrate`."]
        tables: dict[KeyPath, list[Taken]] = {}
        for taken in self.taken:
            tables.setdefault(taken.path[:-1], []).append(taken)
        order = [(), ("sampling",), *sorted(t for t in tables if len(t) > 1)]
        for table in order:
            if table in tables:
                lines += ["", f"[{dotted(*table)}]"] if table else [""]
                lines += [_line(taken) for taken in tables[table]]
        if self.left:
            lines += ["", "# Not translated:"]
            lines += [f"# {left.theirs}: {left.why}" for left in self.left]
        return "\n".join(lines) + "\n"


def _line(taken: Taken) -> str:
    return f"{dotted(taken.path[-1])} = {as_toml(taken.value)}  # {taken.theirs}"


def migrate(document: Document) -> Migration:
    """Translate a file. Raises `InvalidRequestError` if nothing in it is known."""
    found = _Translator(document.values).translate()
    if not found.taken and all(left.theirs not in KEYS for left in found.left):
        raise InvalidRequestError(
            f"nothing in {document.path} is known; it should be the TOML file of a service around "
            "mistral.rs, with [server], [models] and the like.",
            "file",
        )
    _drop_faults(found)
    return found


def _drop_faults(found: Migration) -> None:
    """Leave out what does not fit together here."""
    for _ in range(len(found.taken)):
        faults = faults_in(Document(Path("migrated"), tomllib.loads(found.text)))
        if not faults:
            return
        fault = faults[0]
        dropped = [t for t in found.taken if t.key == fault.key]
        dropped = dropped or [t for t in found.taken if f"{t.key}.".startswith(f"{fault.key}.")]
        dropped = dropped or found.taken[-1:]
        found.taken = [t for t in found.taken if t not in dropped]
        found.left += [Left(t.theirs, printable(fault.message)) for t in dropped]


class _Translator:
    def __init__(self, values: Mapping[str, Any]) -> None:
        self._lists: dict[str, list[Any]] = {}
        self._leaves = dict(self._flat((), values))
        self._found = Migration()
        self._is_set: set[KeyPath] = set()

    def _flat(self, path: KeyPath, value: Any) -> Iterator[tuple[str, Any]]:
        """Their keys with dots; lists of tables are kept apart."""
        key = ".".join(path)
        if isinstance(value, Mapping):
            for name, below in value.items():
                yield from self._flat((*path, str(name).lower().replace("-", "_")), below)
        elif isinstance(value, list) and key in LISTS:
            self._lists[key] = value
        else:
            yield key, value

    def translate(self) -> Migration:
        off = self._off()
        for key, value in self._leaves.items():
            if key in KEYS:
                self._take_plain(key, value, off)
            elif key in SWITCHES or key in WINDOWS or key == "security.enable_auth":
                continue
            else:
                self._leave(key)
        for key, entries in self._lists.items():
            for i, entry in enumerate(entries):
                if key.endswith("api_keys"):
                    self._take_key(f"{key}[{i}]", entry)
                else:
                    self._take_model(key, i, entry, len(entries))
        self._note()
        return self._found

    def _off(self) -> set[str]:
        """Settings that a switch turns off; one that is on without them says what it means."""
        off: set[str] = set()
        for switch, targets in SWITCHES.items():
            if switch not in self._leaves:
                continue
            is_on = self._leaves[switch] is not False
            has_values = any(KEYS[k][0] in targets for k in self._leaves if k in KEYS)
            if is_on and not has_values and targets == ("cors_origins",):
                self._put(switch, ("cors_origins",), ["*"], TOP)
            elif is_on and not has_values:
                self._left(switch, f"is on, but nothing says {' and '.join(targets)}")
            elif not is_on:
                off.update(targets)
        return off

    def _take_plain(self, key: str, value: Any, off: set[str]) -> None:
        target, read = KEYS[key]
        if target in off:
            self._left(key, "is turned off")
            return
        table, _, name = target.rpartition(".")
        rows = ROWS[table]
        if name not in rows:
            self._leave(key)
            return
        if target == "rate":
            window = next((w for w in WINDOWS if w in self._leaves), None)
            if window is not None:
                self._put_read(
                    key,
                    (name,),
                    value,
                    lambda given: foreign.as_rate(given, foreign.as_seconds(self._leaves[window])),
                    rows,
                )
                return
        self._put_read(key, (table, name) if table else (name,), value, read, rows)

    def _put_read(
        self, theirs: str, path: KeyPath, value: Any, read: Any, rows: Mapping[str, Option]
    ) -> None:
        try:
            ours = read(value)
            if ours is None:
                self._left(theirs, f"{value!r:.60} is the default of {path[-1]}")
            else:
                self._put(theirs, path, ours, rows)
        except ValueError as error:  # ours too: a setting that does not take it
            why = str(error)
            self._left(theirs, f"{why}, not {value!r:.60}" if why.startswith("must") else why)

    def _put(self, theirs: str, path: KeyPath, value: Any, rows: Mapping[str, Option]) -> None:
        if path in self._is_set:
            self._left(theirs, f"{dotted(*path)} is set by another key already")
            return
        rows[path[-1]].check(value)
        self._is_set.add(path)
        self._found.taken.append(Taken(printable(theirs), path, value))

    def _take_model(self, key: str, index: int, entry: Any, count: int) -> None:
        """A model of a list: a name, or a table."""
        theirs = f"{key}[{index}]"
        given = dict(self._flat((), entry if isinstance(entry, Mapping) else {"name": str(entry)}))
        names = [str(given.pop(k)) for k in ("name", "model_id", "id") if given.get(k)]
        place = given.pop("path", None) or given.pop("model_path", None)
        if not names and place:
            names = [Path(str(place)).stem]
        if not names:
            self._left(theirs, "has no name")
            return
        if str(given.get("kind", "")) in ("diffusion", "speech"):
            self._left(f"{theirs} {names[0]}", "draws or speaks: serve it by the name of its file")
            return
        name, *others = dict.fromkeys(names)
        table = ("models", name)
        model = str(place or name)
        file = str(given.pop("format.quantized_file", "") or "").split(";")[0]
        if file and not place:
            model = f"{name}:{file}"
        self._put_read(theirs, (*table, "model"), model, same, ENTRY)
        if others:
            self._put_read(f"{theirs}.id", (*table, "aliases"), others, same, ENTRY)
        if count > 1:
            self._put_read(f"{theirs}, one of several", (*table, "lazy"), True, same, ENTRY)
        for own, value in given.items():
            target = ENTRY_KEYS.get(own)
            if target is None:
                self._left(f"{theirs}.{own}", REASONS.get(f"models.{own}", NO_COUNTERPART))
            else:
                self._put_read(f"{theirs}.{own}", (*table, target[0]), value, target[1], ENTRY)
        if not place and not file and "/" in name and not name.lower().endswith("gguf"):
            self._found.notes.append(
                f"{name} may hold safetensors only: if it cannot be converted here, name a GGUF "
                f'file in [{dotted(*table)}], such as model = "{name}-GGUF:Q4_K_M"'
            )

    def _take_key(self, theirs: str, entry: Any) -> None:
        """A key of a list, kept as its SHA-256."""
        given = dict(entry) if isinstance(entry, Mapping) else {"key": entry}
        secret = given.pop("key", None)
        name = str(given.pop("name", "") or theirs.strip("]").replace("[", "-").rpartition(".")[2])
        if self._leaves.get("security.enable_auth") is False:
            self._left(theirs, "security.enable_auth is false")
            return
        if not isinstance(secret, str) or not secret:
            self._left(theirs, "has no key")
            return
        table = ("keys", name.replace("_", "-"))
        digest = hashlib.sha256(secret.encode()).hexdigest()
        self._put_read(theirs, (*table, "key_sha256"), digest, same, KEY_OPTIONS)
        for own, value in given.items():
            target = KEY_KEYS.get(own)
            if target is None:
                self._left(f"{theirs}.{own}", NO_COUNTERPART)
            else:
                self._put_read(
                    f"{theirs}.{own}", (*table, target[0]), value, target[1], KEY_OPTIONS
                )

    def _leave(self, key: str) -> None:
        self._left(key, REASONS.get(key, NO_COUNTERPART))

    def _left(self, theirs: str, why: str) -> None:
        self._found.left.append(Left(printable(theirs)[:MAX_KEY], printable(why)))

    def _note(self) -> None:
        """What else a reader should know."""
        values = {taken.path: taken.value for taken in self._found.taken}
        has_key = ("api_key",) in values or _has_table(values, "keys")
        if values.get(("host",), "127.0.0.1") not in LOCAL and not has_key:
            self._found.notes.append(
                "on this host a key is required: `llmkit keys add NAME`, or $LLMKIT_API_KEY"
            )
        if has_key and self._leaves.get("security.enable_auth") is None:
            self._found.notes.append("callers must send a key")
        if ("otlp_endpoint",) in values:
            said = foreign.collector_note(str(values["otlp_endpoint",]))
            self._found.notes += [f"otlp_endpoint: {said}"] if said else []


def _has_table(paths: Iterable[KeyPath], table: str) -> bool:
    return any(path[0] == table and len(path) > 1 for path in paths)
