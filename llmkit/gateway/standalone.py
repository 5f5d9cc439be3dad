"""`llmkit serve`: the gateway without Jupyter, from its start.

The models begin to load, each in its worker, before most of the gateway is imported.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence

from llmkit.errors import InvalidRequestError
from llmkit.gateway.workers import Finder, Workers
from llmkit.protocol import Origin
from llmkit.protocol.client import EngineClient
from llmkit.settings.serving import ServeSettings
from llmkit.system.process import process_start_time
from llmkit.workers.budget import Budget
from llmkit.workers.place import ServedModel

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
) -> int:
    """Serve until a signal: these ``models`` and those that ``find`` names, within a ``budget``,
    or an ``echo``, or, without any, all engines found.

    ``read`` reads the settings again, at SIGHUP. With ``attach_pid`` only that process's engines,
    until it ends. Raises `InvalidRequestError` (address, key, certificate) and `StoreError`, with
    nothing left loaded, and `ModelLoadError` if no model can be loaded.
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
    from tornado.netutil import bind_sockets

    with contextlib.ExitStack() as ending:
        sockets = bind_sockets(options.port, options.host)
        for each in sockets:
            ending.callback(each.close)
        workers = None
        if echo is None and (models or find):
            workers = Workers(options, models, find, budget)
            ending.callback(workers.close)
        from llmkit.gateway.directory import EngineDirectory
        from llmkit.gateway.echoes import EchoDirectory
        from llmkit.gateway.running import Server
        from llmkit.gateway.sources import ConnectionFiles

        directory: EngineDirectory
        if workers is not None:
            directory = workers.directory
        elif echo is not None:
            directory = EchoDirectory(echo)
        else:
            directory = EngineDirectory([ConnectionFiles(accepts)])
        server = Server(settings, read, sockets, workers, directory, shared=attach_pid is None)
        return asyncio.run(server.run(is_attached))
