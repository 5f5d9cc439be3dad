"""`llmkit serve`: the gateway without Jupyter, from its start.

The models begin to load, each in its worker, before most of the gateway is imported.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
from collections.abc import Callable, Sequence
from pathlib import Path
from socket import socket
from typing import TYPE_CHECKING

from llmkit.errors import InvalidRequestError
from llmkit.gateway.workers import Finder, Workers
from llmkit.protocol import Origin
from llmkit.protocol.client import EngineClient
from llmkit.settings.gateway import GatewayOptions
from llmkit.settings.serving import ServeSettings
from llmkit.system.process import process_start_time
from llmkit.workers.budget import Budget
from llmkit.workers.place import ServedModel

if TYPE_CHECKING:
    from llmkit.cluster.fleet import Fleet
    from llmkit.settings.hub_place import HubPlace

__all__ = ["serve"]


def serve(
    settings: ServeSettings,
    models: Sequence[ServedModel] = (),
    *,
    find: Finder | None = None,
    budget: Budget | None = None,
    read: Callable[[], ServeSettings] | None = None,
    attach_pid: int | None = None,
    echo: EngineClient | None = None,
    hub: HubPlace | None = None,
) -> int:
    """Serve until a signal: these ``models`` and those that ``find`` names, within a ``budget``,
    or an ``echo``, or, without any, all engines found: with ``fleet_listen`` those that announce
    themselves there, which are served beside ``models`` too.

    ``read`` reads the settings again, at SIGHUP. With ``attach_pid`` only that process's engines,
    until it ends. With ``hub`` it is that hub's service. Raises `InvalidRequestError` (address,
    key, certificate) and `StoreError`, with nothing left loaded, and `ModelLoadError` if no model
    can be loaded.
    """
    options = settings.gateway
    if attach_pid is not None and (models or echo is not None):
        raise InvalidRequestError("name a model or --attach a process, not both.", "attach")
    started = process_start_time(attach_pid) if attach_pid is not None else None
    if attach_pid is not None and started is None:
        raise InvalidRequestError(f"there is no process {attach_pid} to attach to.", "attach")

    def is_attached() -> bool:
        return attach_pid is None or process_start_time(attach_pid) == started

    def accepts(origin: Origin) -> bool:
        return attach_pid is None or origin.pid == attach_pid

    # Bind first: do not load a model only to find the port taken.
    with contextlib.ExitStack() as ending:
        sockets = _bound(options)
        for each in sockets:
            ending.callback(each.close)
        fleet = _fleet(options, ending) if echo is None and attach_pid is None else None
        workers = None
        if echo is None and (models or find):
            workers = Workers(options, models, find, budget)
            ending.callback(workers.close)
        from llmkit.gateway.directory import EngineDirectory
        from llmkit.gateway.echoes import EchoDirectory
        from llmkit.gateway.pools import Pooled
        from llmkit.gateway.running import Server
        from llmkit.gateway.sources import ConnectionFiles

        directory: EngineDirectory
        if workers is not None:
            directory = workers.directory
            if fleet is not None:
                directory.add(Pooled([fleet]), fleet.absent)
        elif echo is not None:
            directory = EchoDirectory(echo)
        elif fleet is not None:
            directory = EngineDirectory([Pooled([fleet])], absent=fleet.absent)
        else:
            directory = EngineDirectory([ConnectionFiles(accepts)])
        is_shared = attach_pid is None
        server = Server(settings, read, sockets, workers, directory, shared=is_shared, hub=hub)
        return asyncio.run(server.run(is_attached))


def _bound(options: GatewayOptions) -> list[socket]:
    """Sockets at the address. Raises `InvalidRequestError` if that is not to be had."""
    from tornado.netutil import bind_sockets

    host, port = options.host, options.port
    try:
        return bind_sockets(port, host)
    except OSError as error:
        why, name = error.strerror or str(error), "host"
        if error.errno == errno.EADDRINUSE:
            why, name = "another process uses it; choose another port, or 0 for a free one", "port"
        elif isinstance(error, PermissionError) and 0 < port < 1024:
            why, name = "ports below 1024 need root, or CAP_NET_BIND_SERVICE", "port"
        raise InvalidRequestError(f"cannot listen on {host} port {port}: {why}.", name) from None


def _fleet(options: GatewayOptions, ending: contextlib.ExitStack) -> Fleet | None:
    """The engines of other hosts. Raises `InvalidRequestError`."""
    if options.fleet_listen is None or options.fleet_key_file is None:
        return None
    from llmkit.cluster.fleet import Fleet
    from llmkit.cluster.fleet_key import gateway_keys, read_key

    fleet = Fleet(options.fleet_listen, gateway_keys(read_key(Path(options.fleet_key_file))))
    ending.callback(fleet.close)
    return fleet
