"""Options of the command line, from the tables of `llmkit.settings`."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable
from typing import Annotated, Any

import typer

from llmkit.settings.table import Option

__all__ = ["parameters", "with_options"]


def parameters(rows: Iterable[Option]) -> list[inspect.Parameter]:
    """One option of the command line for each row."""
    return [_parameter(row) for row in rows]


def _parameter(row: Option) -> inspect.Parameter:
    flag = row.name.replace("_", "-")
    switch = row.kind in ("flag", "switch")
    text = row.described + (f" [{row.range}]" if row.range and not row.choices else "")
    option = typer.Option(
        f"--{flag}/--no-{flag}" if switch else f"--{flag}",
        help=text,
        rich_help_panel=row.group,
        show_default=False,
    )
    kind: Any = str if row.kind == "layers" else row.annotation
    annotation = Annotated[kind | None, option]
    return inspect.Parameter(
        row.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation
    )


def with_options(function: Callable[..., int], rows: Iterable[Option]) -> Callable[..., int]:
    """The function, whose ``**given`` are these options; those that were not given are left out."""
    own = [
        parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for parameter in inspect.signature(function, eval_str=True).parameters.values()
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD
    ]

    def command(**values: Any) -> int:
        own_values = {p.name: values.pop(p.name) for p in own}
        given = {name: v for name, v in values.items() if v is not None and v != []}
        layers = given.get("n_gpu_layers")
        if layers is not None and re.fullmatch(r"-?[0-9]{1,6}", layers):
            given["n_gpu_layers"] = int(layers)
        return function(**own_values, **given)

    command.__name__, command.__doc__ = function.__name__, function.__doc__
    signature = [*own, *parameters(rows)]
    command.__signature__ = inspect.Signature(signature)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in signature}
    return command
