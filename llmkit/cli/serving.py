"""`llmkit serve` and `llmkit engine`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from llmkit.cli.options import with_options
from llmkit.settings.gateway import GATEWAY_OPTIONS
from llmkit.settings.options import OPTIONS

__all__ = ["register"]

ENGINE = [row for name, row in OPTIONS.items() if name != "isolated"]
HELD = [GATEWAY_OPTIONS[name] for name in ("name", "tuned", "force")]


def register(app: typer.Typer) -> None:
    gateway = [row for name, row in GATEWAY_OPTIONS.items() if name != "model"]
    app.command(rich_help_panel="Serving")(with_options(serve, [*gateway, *ENGINE]))
    app.command(rich_help_panel="Serving")(with_options(engine, [*HELD, *ENGINE]))


def serve(
    model: Annotated[
        list[str] | None,
        typer.Argument(metavar="MODEL", help=GATEWAY_OPTIONS["model"].help),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="TOML file of settings; else $LLMKIT_CONFIG.")
    ] = None,
    attach: Annotated[
        int | None,
        typer.Option(metavar="PID", help="Serve only the engines of this process; end with it."),
    ] = None,
    **given: Any,
) -> int:
    """Serve models, or all your running engines, over HTTP.

    OpenAI's routes are at http://HOST:PORT/v1.
    """
    from llmkit.cli.offering import budget, finder, offered
    from llmkit.gateway import standalone
    from llmkit.settings.serving import ServeSettings, read_settings

    def read() -> ServeSettings:
        return read_settings({**given, "model": model} if model else given, config)

    settings = read()
    return standalone.serve(
        settings,
        offered(settings),
        find=finder(settings),
        budget=budget(settings),
        read=read,
        attach_pid=attach,
    )


def engine(
    model: Annotated[str, typer.Argument(help="Alias or path of a GGUF file.")], **given: Any
) -> int:
    """Hold a model for gateways and notebooks, without HTTP; ends with its standard input."""
    from llmkit.cli.holding import hold

    return hold(model, given)
