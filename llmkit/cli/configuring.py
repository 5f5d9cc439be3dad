"""`llmkit config`: what is set and where it came from, what is wrong with a file, an example, and
other services' files."""

from __future__ import annotations

import json as json_format
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmkit.cli.migrating import migrate
from llmkit.cli.options import with_options
from llmkit.settings.gateway import GATEWAY_OPTIONS
from llmkit.settings.hub import HUB_OPTIONS
from llmkit.settings.options import OPTIONS

if TYPE_CHECKING:
    from llmkit.settings.listing import Setting

__all__ = ["register"]

Json = Annotated[bool, typer.Option("--json", help="As JSON.")]
KEY_COLUMNS, VALUE_COLUMNS = 28, 34


def register(app: typer.Typer) -> None:
    group = typer.Typer(
        name="config",
        help="Show where settings come from; check, write or translate a file of them.",
        no_args_is_help=True,
    )
    rows = {**GATEWAY_OPTIONS, **HUB_OPTIONS, **OPTIONS}
    given = [row for name, row in rows.items() if name not in ("model", "isolated")]
    group.command()(with_options(show, given))
    group.command()(check)
    group.command()(example)
    group.command()(migrate)
    app.add_typer(group, rich_help_panel="Serving")


def show(
    model: Annotated[
        list[str] | None, typer.Argument(metavar="MODEL", help=GATEWAY_OPTIONS["model"].help)
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="TOML file of settings; else $LLMKIT_CONFIG.")
    ] = None,
    json: Json = False,
    **given: Any,
) -> int:
    """Print each setting and where it came from.

    Takes what `llmkit serve` takes. Keys and passwords are masked.
    """
    from llmkit.settings.listing import listed
    from llmkit.settings.serving import read_settings
    from llmkit.system.reporting import report

    found = read_settings({**given, "model": model} if model else given, config)
    settings = listed(found)
    for note in found.notes:
        report(note)
    if json:
        print(json_format.dumps({s.key: _object(s) for s in settings}, indent=2))
        return 0
    for heading, group in groupby(settings, _heading):
        print(f"\n{heading}" if heading != _heading(settings[0]) else heading)
        for setting in group:
            print(_line(setting))
    return 0


def _object(setting: Setting) -> dict[str, Any]:
    return {"value": setting.shown, "source": setting.source, "live": setting.row.live}


def _heading(setting: Setting) -> str:
    path = setting.path
    return setting.row.group if len(path) == 1 else f"[{setting.table}]"


def _line(setting: Setting) -> str:
    from llmkit.settings.listing import as_toml

    value = "" if setting.shown is None else as_toml(setting.shown)
    return f"  {setting.path[-1]:<{KEY_COLUMNS}} {value:<{VALUE_COLUMNS}}  {setting.source}"


def check(
    file: Annotated[Path, typer.Argument(help="TOML file of settings.")], json: Json = False
) -> int:
    """Print every fault of a settings file.

    The exit status is 1 if there is one.
    """
    from llmkit.settings.serving import faults_of

    faults = faults_of(file)
    if json:
        found = [{"key": f.key, "message": f.message, "line": f.line} for f in faults]
        print(json_format.dumps({"file": str(file), "faults": found}, indent=2))
    else:
        for fault in faults:
            print(f"{file}{'' if fault.line is None else f':{fault.line}'}: {fault.message}")
        if not faults:
            print(f"{file}: no fault")
    return int(bool(faults))


def example() -> int:
    """Print a settings file with every setting explained."""
    from llmkit.settings.example import example as text

    print(text(), end="")
    return 0
