"""Help that fits a screen: commands by what they are for, and of many options the common ones.

Plain text: rich's panels would cost a tenth of a second and twice the lines. ``--help-all`` shows
every option of a command that has many.
"""

from __future__ import annotations

import re
import shutil
import textwrap
from collections.abc import Iterable
from itertools import groupby
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

__all__ = ["HelpGroup", "use_everywhere"]

# Of the options that come from the tables of settings, those that most people want.
COMMON = (
    "host", "port", "api_key", "models_dir", "default_model", "lazy", "name", "n_ctx", "n_slots",
    "n_gpu_layers", "threads", "rate", "tls_cert", "admin", "log_level",
)  # fmt: skip
MANY = 20
ALL = "--help-all"
ALSO = "Also: --version, -h"
STATUS = "Exit status: 0 done, 1 an error or a failed check, 2 wrong usage, 130 Ctrl-C"
MIN_WIDTH, MAX_WIDTH = 50, 100
MOST_CHOICES = 36


def use_everywhere(app: typer.Typer) -> None:
    """Give every command of an app, and of its groups, this help."""
    for command in app.registered_commands:
        if command.cls in (None, TyperCommand):
            command.cls = HelpCommand
    for group in app.registered_groups:
        if group.typer_instance is not None:
            use_everywhere(group.typer_instance)


def _width() -> int:
    return max(MIN_WIDTH, min(MAX_WIDTH, shutil.get_terminal_size((80, 24)).columns))


def _cut(text: str, width: int) -> str:
    """The first clause, or what fits of it.

    >>> _cut("Show what is set, and where it came from; secrets are masked.", 30)
    'Show what is set'
    """
    text = " ".join(text.split()).partition("; ")[0].partition(" (default")[0].rstrip(".;")
    if len(text) <= width:
        return text
    clause = re.match(
        rf"(.{{{width // 2},{width}}}), (?:and|or|for|with|without|such|which) ", text
    )
    if clause and clause[1].count("(") == clause[1].count(")"):
        return clause[1]
    return textwrap.shorten(text, width, placeholder=" …")


class HelpGroup(TyperGroup):
    """The root: one line for each command, under what it is for."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        commands = [c for name in self.list_commands(ctx) if (c := self.get_command(ctx, name))]
        shown = [command for command in commands if not command.hidden]
        panels = dict.fromkeys(_panel(command) for command in shown)
        in_order = sorted(shown, key=lambda command: [*panels].index(_panel(command)))
        heads, names = max(map(len, panels)), max(len(c.name or "") for c in shown)
        room = _width() - heads - names - 4
        write = formatter.write
        write(f"Usage: {ctx.command_path} COMMAND [OPTIONS] [ARGUMENTS]\n")
        for line in textwrap.wrap(self.help or "", _width()):
            write(line + "\n")
        write("\n")
        for panel, group in groupby(in_order, _panel):
            for i, command in enumerate(group):
                help_ = _cut((command.help or "").strip().split("\n\n")[0], room)
                write(f"{'' if i else panel:{heads}}  {command.name:{names}}  {help_}\n")
        write("\n")
        for text in (f"{ctx.command_path} COMMAND --help explains a command. {ALSO}", STATUS):
            write(textwrap.fill(text, _width()) + "\n")


def _panel(command: Any) -> str:
    return str(getattr(command, "rich_help_panel", None) or "Other")


class HelpCommand(TyperCommand):
    """A command: its arguments, and its options under the headings of the tables."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        given = args[: args.index("--")] if "--" in args else args
        if ALL in given and not ctx.resilient_parsing and self._has_many(ctx):
            ctx.meta[ALL] = True
            typer.echo(ctx.get_help())
            ctx.exit()
        return super().parse_args(ctx, args)

    def _options(self, ctx: Any) -> list[Any]:
        options = [p for p in self.get_params(ctx) if p.param_type_name == "option"]
        return [option for option in options if not getattr(option, "hidden", False)]

    def _has_many(self, ctx: Any) -> bool:
        return len(self._options(ctx)) > MANY

    def format_help(self, ctx: Any, formatter: Any) -> None:
        self.format_usage(ctx, formatter)
        for paragraph in textwrap.dedent(self.help or "").strip().split("\n\n"):
            formatter.write("\n" + textwrap.fill(" ".join(paragraph.split()), _width()) + "\n")
        arguments = [p for p in self.get_params(ctx) if p.param_type_name == "argument"]
        rows = [row for a in arguments if (row := a.get_help_record(ctx)) and row[1]]
        if rows:
            formatter.write("\n")
            _table(formatter, rows)
        options = self._options(ctx)
        if self._has_many(ctx) and not ctx.meta.get(ALL):
            common = [o for o in options if o.rich_help_panel is None or o.name in COMMON]
            formatter.write("\nOptions:\n")
            names = [(", ".join(sorted(o.opts, key=len)), o.get_help_record(ctx)) for o in common]
            _table(formatter, ((name, row[1]) for name, row in names if row), whole=False)
            formatter.write(f"  {ALL}: all {len(options)} options\n")
            return
        for panel in dict.fromkeys(o.rich_help_panel for o in options):
            formatter.write(f"\n{panel or 'Options'}:\n")
            group = [o for o in options if o.rich_help_panel == panel]
            _table(formatter, (o.get_help_record(ctx) for o in group))


def _without_choices(name: str, help_: str) -> tuple[str, str]:
    """Many choices go from the name into the sentence."""
    choices = re.search(r" <(\w+(?:\|\w+)+)>$", name)
    if not choices or len(choices[1]) < MOST_CHOICES:
        return name, help_
    return name[: choices.start()], f"{help_} ({choices[1].replace('|', ', ')})"


def _table(
    formatter: Any, records: Iterable[tuple[str, str] | None], *, whole: bool = True
) -> None:
    """Names and sentences side by side; ``whole`` False cuts a sentence at the end of its line."""
    rows = [_without_choices(*record) for record in records if record]
    column = min(max((len(name) for name, _ in rows), default=0), 26) + 4
    room = _width() - column
    for name, help_ in rows:
        lines = textwrap.wrap(" ".join(help_.split()), room) if whole else [_cut(help_, room)]
        start = f"  {name}"
        if len(start) > column - 2:
            formatter.write(start + "\n")
            start = ""
        for line in lines or [""]:
            formatter.write(f"{start:{column}}{line}".rstrip() + "\n")
            start = ""
