"""The command's entry: the groups put together, and errors as one clear line.

Nothing heavy is imported before a command runs, so that help and completion are quick; and of the
groups only the one whose command is asked for: the options of all of them take a tenth of a second.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Annotated

import typer

from llmkit.cli.help import HelpGroup, use_everywhere
from llmkit.cli.terminal import stripped
from llmkit.errors import LLMKitError
from llmkit.version import __version__

__all__ = ["built", "main"]

# The modules that register commands, in the order of the help, and the commands of each. (The
# command `models` is not of the module of that name, whose commands make files of models.)
GROUPS = {
    "chatting": ("run", "chat"),
    "serving": ("serve", "engine"),
    "hub": ("hub",),
    "ray": ("ray",),
    "configuring": ("config",),
    "keys": ("keys",),
    "models": ("tune", "convert", "quantize"),
    "storage": ("models",),
    "measuring": ("estimate", "profile", "bench"),
    "doctor": ("doctor",),
    "smoke": ("smoke",),
    "completing": ("completion",),
}


def _version(wanted: bool) -> None:
    if wanted:
        print(f"llmkit {__version__}")
        raise typer.Exit


def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None: ...


def built(command: str | None = None) -> typer.Typer:
    """All commands; or, of a known command, only those of its module."""
    return _built(next((m for m, commands in GROUPS.items() if command in commands), None))


@cache
def _built(module: str | None) -> typer.Typer:
    app = typer.Typer(
        name="llmkit",
        help="Run a GGUF model, and let programs use it through an OpenAI-compatible endpoint.",
        cls=HelpGroup,
        rich_markup_mode=None,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_root)
    for name in GROUPS if module is None else (module,):
        importlib.import_module(f"llmkit.cli.{name}").register(app)
    use_everywhere(app)
    return app


@contextlib.contextmanager
def _plain_warnings() -> Iterator[None]:
    """Warnings as one line, without the line of source that gave them."""
    before = warnings.formatwarning
    warnings.formatwarning = lambda message, *_, **__: f"llmkit: {stripped(str(message))}\n"
    try:
        yield
    finally:
        warnings.formatwarning = before


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; 0 on success, 1 for an error (one clear line on standard error), 2 for wrong
    usage, 130 after Ctrl-C."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the shell: `>&-`
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    given = sys.argv[1:] if argv is None else argv
    app = built(given[0] if given else None)
    try:
        with _plain_warnings():
            code = app(
                args=None if argv is None else list(argv), prog_name="llmkit", standalone_mode=False
            )
    except typer.Abort:
        return 130
    except LLMKitError as error:
        print(f"llmkit: {stripped(str(error))}", file=sys.stderr)  # it may be an endpoint's text
        return 1
    except OSError as error:
        message = f"llmkit: {error.strerror or error}: {error.filename or ''}".rstrip(": ")
        print(stripped(message), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if not hasattr(error, "exit_code") or not hasattr(error, "show"):
            raise
        error.show()  # wrong usage, in click's words
        return int(error.exit_code)
    return code if isinstance(code, int) else 0
