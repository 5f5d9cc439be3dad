"""`llmkit hub`: the gateway as a service of a JupyterHub."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmkit.cli.options import with_options
from llmkit.errors import InvalidRequestError
from llmkit.settings.gateway import GATEWAY_OPTIONS
from llmkit.settings.hub import HUB_OPTIONS
from llmkit.settings.options import OPTIONS

if TYPE_CHECKING:
    from llmkit.settings.hub_place import HubPlace
    from llmkit.settings.serving import ServeSettings

__all__ = ["register"]

# Of the gateway's, what is the hub's to say, or has no meaning where the hub knows all callers.
NOT_HERE = ("model", "api_key", "rate", "base_path", "admin", "compat_env")


def register(app: typer.Typer) -> None:
    gateway = [row for name, row in GATEWAY_OPTIONS.items() if name not in NOT_HERE]
    engine = [row for name, row in OPTIONS.items() if name != "isolated"]
    rows = [*HUB_OPTIONS.values(), *gateway, *engine]
    app.command(rich_help_panel="Serving")(with_options(hub, rows))


def hub(
    model: Annotated[
        list[str] | None,
        typer.Argument(metavar="MODEL", help=GATEWAY_OPTIONS["model"].help),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="TOML file of settings; else $LLMKIT_CONFIG.")
    ] = None,
    **given: Any,
) -> int:
    """Serve models to the users of a JupyterHub, as its service.

    The hub says who calls. It is found by the variables JUPYTERHUB_API_URL and
    JUPYTERHUB_API_TOKEN, which a hub sets where it starts this itself.
    """
    import os

    from llmkit.bridge import child
    from llmkit.cli import offering
    from llmkit.settings.hub_place import HubPlace
    from llmkit.settings.serving import read_settings
    from llmkit.system.reporting import report
    from llmkit.workers import engine as worker

    place = HubPlace.of(os.environ)

    def read() -> ServeSettings:
        found = read_settings({**given, "model": list(model)} if model else given, config)
        return settled(found, place)

    settings = read()
    for note in (*settings.notes, *offering.idle_fleet(settings)):
        report(note)
    echo = offering.echo(settings)
    offered = () if echo is not None else offering.offered(settings)
    if offered and not all(each.lazy for each in offered):
        child.prepare(worker.TARGET)  # it starts while the gateway is imported
    from llmkit.gateway import standalone

    return standalone.serve(
        settings,
        offered,
        find=offering.finder(settings),
        budget=offering.budget(settings),
        read=read,
        echo=echo,
        hub=place,
    )


def settled(settings: ServeSettings, place: HubPlace) -> ServeSettings:
    """The settings with what the hub says: where to listen, under which path, for whom; notes say
    what of them that leaves without effect.

    Raises `InvalidRequestError` for keys, which a hub's service has none of.
    """
    from llmkit.settings.serving import ignored

    options = settings.gateway
    if settings.keys or options.api_key is not None:
        raise InvalidRequestError(
            "llmkit hub has no keys of its own: the hub says who calls, and tables [quota…] how "
            "much they may use. Leave out api_key ($LLMKIT_API_KEY) and [keys.NAME].",
            "keys" if settings.keys else "api_key",
        )
    host, port = options.host, options.port
    notes = [
        *settings.notes,
        *ignored(settings, ["rate"], "tables [quota…] say how much the hub's users may use."),
        *ignored(settings, ["base_path"], f"the hub has this service at {place.prefix}/."),
    ]
    if options.trusted_proxies:
        notes += ignored(settings, ["hub_proxies"], "trusted_proxies names all proxies.")
    if not options.admin:
        notes += ignored(
            settings, ["admin"], "the hub's scope custom:llmkit:admin says who may administer."
        )
    if place.listen is not None:
        host, port = place.listen
        why = f"the hub expects this service at http://{host}:{port}, as its configuration says."
        notes += ignored(settings, ["host", "port"], why)
    return replace(
        settings,
        notes=tuple(notes),
        gateway=replace(
            options,
            host=host,
            port=port,
            base_path=place.prefix,
            admin=True,  # for those with the scope custom:llmkit:admin
        ),
    )
