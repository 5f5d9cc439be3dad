"""`llmkit config migrate`: the settings file of another service, as one of ours."""

from __future__ import annotations

import json as json_format
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmkit.cli.terminal import stripped
from llmkit.errors import InvalidRequestError

if TYPE_CHECKING:
    from llmkit.settings.migration import Migration

__all__ = ["migrate"]

COLUMNS = 44


def migrate(
    file: Annotated[Path, typer.Argument(help="TOML file of another service.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Where to write; else standard output.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> int:
    """Turn the settings file of another service into one of ours.

    Prints what was translated and what has no counterpart, on standard error unless --output names
    a file. Takes files with [server], [models], [limits] and the like, and those of mistral.rs.
    """
    from llmkit.settings.document import open_document
    from llmkit.settings.migration import migrate as translated

    found = translated(open_document(file))
    if output is not None:
        _write(output, found.text)
    if json:
        print(json_format.dumps({**_object(found), "text": found.text}, indent=2))
        return 0
    if output is None:
        print(found.text, end="")
    to = sys.stderr if output is None else sys.stdout
    for line in _report(found):
        print(stripped(line), file=to)
    if output is not None:
        print(f"written: {output}; `llmkit serve --config {output}`")
    return 0


def _write(output: Path, text: str) -> None:
    """For its owner only: it may hold keys."""
    try:
        descriptor = os.open(output.expanduser(), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise InvalidRequestError(
            f"{output} exists already; remove it, or choose another file with --output.", "output"
        ) from None
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)


def _object(found: Migration) -> dict[str, object]:
    return {
        "taken": [{"from": t.theirs, "to": t.key, "value": t.shown} for t in found.taken],
        "left": [{"from": left.theirs, "why": left.why} for left in found.left],
        "notes": found.notes,
    }


def _report(found: Migration) -> Iterator[str]:
    from llmkit.settings.listing import as_toml

    yield f"translated ({len(found.taken)})"
    for taken in found.taken:
        yield f"  {taken.theirs:<{COLUMNS}} {taken.key} = {as_toml(taken.shown)}"
    if found.left:
        yield f"not translated ({len(found.left)})"
        for left in found.left:
            yield f"  {left.theirs:<{COLUMNS}} {left.why}"
    for note in found.notes:
        yield f"note: {note}"
