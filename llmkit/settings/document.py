"""The settings file: opened with care, parsed, and where in it a key stands. Any thread."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from llmkit.errors import InvalidRequestError
from llmkit.system.files import open_plain
from llmkit.system.reporting import report

__all__ = ["Document", "open_document"]

MAX_FILE_BYTES = 1 << 20
MAX_VALUE_LINES = 1000  # of a value whose line is found


@dataclass(frozen=True)
class Document:
    """A settings file as it was read; ``is_private`` when only its owner can read it."""

    path: Path
    values: dict[str, Any]
    is_private: bool = True
    text: str = field(default="", repr=False)

    def line_of(self, key: tuple[str, ...]) -> int | None:
        """The line, from 1, where a key is set, or the table that it is missing in."""
        while key and key not in self._lines:
            key = key[:-1]
        return self._lines.get(key)

    def warn_if_readable(self) -> None:
        """Say that others can read the secrets in it."""
        if not self.is_private:
            report(
                f"the settings file {self.path} holds a key or password and others can read it: "
                f"chmod 600 {self.path}"
            )

    @cached_property
    def _lines(self) -> Mapping[tuple[str, ...], int]:
        """Where each key is first set. A TOML statement is TOML of its own: it ends with the first
        line with which it can be parsed."""
        lines: dict[tuple[str, ...], int] = {}
        table: tuple[str, ...] = ()
        statement: list[str] = []
        for number, line in enumerate(self.text.split("\n"), 1):
            statement.append(line)
            if len(statement) > MAX_VALUE_LINES:
                return lines
            try:
                values = tomllib.loads("\n".join(statement))
            except (ValueError, RecursionError):
                continue
            keys = list(_keys(values))
            begin = number - len(statement) + 1
            if statement[0].lstrip().startswith("["):
                table = keys[-1]
                keys = [table[:i] for i in range(1, len(table) + 1)]
            else:
                keys = [(*table, *key) for key in keys]
            for key in keys:
                lines.setdefault(key, begin)
            statement = []
        return lines


def _keys(values: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    for key, value in values.items():
        yield (key,)
        if isinstance(value, dict):
            for below in _keys(value):
                yield (key, *below)


def open_document(path: Path) -> Document:
    """Read a TOML file of settings.

    Raises `InvalidRequestError`: it cannot be read or is not TOML, or everyone can write it.
    """
    try:
        with open_plain(path) as opened:
            is_private = _check_owner(path, os.fstat(opened.fileno()))
            data = opened.read(MAX_FILE_BYTES + 1)
        if len(data) > MAX_FILE_BYTES:
            raise ValueError(f"it is larger than {MAX_FILE_BYTES >> 10} KiB")
        text = data.decode("utf-8-sig").replace("\r\n", "\n")
        return Document(path, tomllib.loads(text), is_private, text)
    except InvalidRequestError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        reason: object = getattr(error, "strerror", None) or error
        if isinstance(error, UnicodeDecodeError):
            reason = "it is not text in UTF-8"
        if isinstance(error, RecursionError):
            reason = "it is nested too deeply"
        raise InvalidRequestError(
            f"cannot read the settings file {path}: {reason}", "config"
        ) from None


def _check_owner(path: Path, status: os.stat_result) -> bool:
    """Check that others cannot change a file; whether others cannot read it.

    Raises `InvalidRequestError` if everyone can write it, and warns of other writers.
    """
    if not hasattr(os, "getuid"):
        return True
    if status.st_mode & 0o002:
        message = f"the settings file {path} is writable by everyone; run `chmod o-w {path}` first."
        raise InvalidRequestError(message, "config")
    if status.st_uid not in (os.getuid(), 0) or status.st_mode & 0o020:
        report(f"the settings file {path} is writable by others.")
    # What systemd hands to a service is readable by its group, which is the service's own.
    if os.environ.get("CREDENTIALS_DIRECTORY") == str(path.parent):
        return True
    return not status.st_mode & 0o044
