"""`llmkit serve` and `llmkit engine`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from llmkit.cli.options import with_options
from llmkit.errors import InvalidRequestError
from llmkit.settings.gateway import GATEWAY_OPTIONS
from llmkit.settings.hub import HUB_OPTIONS
from llmkit.settings.options import OPTIONS

__all__ = ["register"]

ENGINE = [row for name, row in OPTIONS.items() if name != "isolated"]
HUBS = (*HUB_OPTIONS, "quota")
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
    named: Annotated[
        list[str] | None,
        typer.Option(
            "--model", "-m", help="The same as MODEL, as other servers say it.", hidden=True
        ),
    ] = None,
    attach: Annotated[
        int | None,
        typer.Option(metavar="PID", help="Serve only the engines of this process; end with it."),
    ] = None,
    **given: Any,
) -> int:
    """Serve models, all your running engines, or `echo` without a model, over HTTP.

    OpenAI's routes are at http://HOST:PORT/v1.
    """
    from llmkit.bridge import child
    from llmkit.cli import offering
    from llmkit.settings.serving import ServeSettings, ignored, read_settings
    from llmkit.system.reporting import report
    from llmkit.workers import engine as worker

    models = [*(model or ()), *(named or ())]

    def read() -> ServeSettings:
        return read_settings({**given, "model": models} if models else given, config)

    settings = read()
    of_hub = ignored(settings, HUBS, "it is for `llmkit hub`.")
    for note in (*settings.notes, *of_hub, *offering.idle_fleet(settings)):
        report(note)
    echo = offering.echo(settings)
    offered = () if echo is not None else offering.offered(settings)
    if all(each.lazy for each in offered):
        child.release(worker.TARGET)
    else:
        child.prepare(worker.TARGET)  # it starts while the gateway is imported
    from llmkit.gateway import standalone

    return standalone.serve(
        settings,
        offered,
        find=offering.finder(settings),
        budget=offering.budget(settings),
        read=read,
        attach_pid=attach,
        echo=echo,
    )


def engine(
    model: Annotated[str, typer.Argument(help="Alias or path of a GGUF file.")],
    report_fd: Annotated[
        int | None,
        typer.Option(hidden=True, help="A pipe: how it is, each second; ends with its reader."),
    ] = None,
    join: Annotated[
        list[str] | None,
        typer.Option(
            envvar="LLMKIT_JOIN",
            metavar="ADDRESS",
            help="A gateway's fleet_listen, tcp://HOST:7100, to be announced to; once for each.",
        ),
    ] = None,
    listen: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS", help="Where gateways connect: tcp://HOST:PORT; default a free port."
        ),
    ] = None,
    advertise: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="The same as gateways see it, behind a NAT, say."),
    ] = None,
    fleet_key_file: Annotated[
        str | None,
        typer.Option(envvar="LLMKIT_FLEET_KEY_FILE", help="Key of the fleet, as gateways have it."),
    ] = None,
    drain_s: Annotated[
        float,
        typer.Option(min=0, max=86_400, help="Seconds for what runs to finish after SIGTERM."),
    ] = 30.0,
    **given: Any,
) -> int:
    """Hold a model for gateways and notebooks, without HTTP; ends with its standard input.

    With --join it serves the gateways of other hosts instead, and ends with SIGTERM.
    """
    if join:
        from llmkit.cli.joining import Joining, hold_joined

        joining = Joining.read(join, listen, advertise, fleet_key_file, drain_s)
        return hold_joined(model, given, joining, report_fd)
    if listen is not None or advertise is not None:
        raise InvalidRequestError("listen and advertise are for engines that --join a gateway.")
    if fleet_key_file is not None:
        from llmkit.system.reporting import report

        report("fleet_key_file has no effect: only engines that --join a gateway need it.")
    from llmkit.cli.holding import hold

    return hold(model, given, report_fd)
