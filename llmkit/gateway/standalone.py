"""`llmkit serve`: the gateway without Jupyter, and the supervised workers behind it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from llmkit.errors import InvalidRequestError
from llmkit.gateway.access.keys import Keys
from llmkit.gateway.app import Gateway, make_app, make_server
from llmkit.gateway.directory import EngineDirectory
from llmkit.gateway.ops.models import ModelRoutes
from llmkit.gateway.served import Served
from llmkit.gateway.server import MAX_CONNECTIONS, SPARE_DESCRIPTORS, raise_descriptors
from llmkit.gateway.sources import ConnectionFiles
from llmkit.protocol import Origin
from llmkit.settings.gateway import GatewayOptions
from llmkit.system.process import process_start_time
from llmkit.workers.models import ModelManager
from llmkit.workers.place import ModelStatus, ServedModel

__all__ = ["Workers", "serve"]

POLL_S = 0.5

Offer = Callable[[str], ServedModel | None]


def serve(
    options: GatewayOptions,
    models: Sequence[ServedModel] = (),
    *,
    find: Offer | None = None,
    attach_pid: int | None = None,
) -> int:
    """Serve until a signal: these ``models`` and those that ``find`` names, or, without any, all
    engines found.

    With ``attach_pid`` only that process's engines, until it ends. Raises `InvalidRequestError`
    (address, key) before anything is loaded, and `ModelLoadError` if no model can be loaded.
    """
    logging.basicConfig(
        level=options.log_level.upper(),
        format="%(asctime)s %(levelname)s %(message)s",
        stream=sys.stderr,
    )
    if attach_pid is not None and models:
        raise InvalidRequestError("name a model or --attach a process, not both.", "attach")
    raise_descriptors()
    keys = Keys(options.api_key, options.host)
    return asyncio.run(_serve(options, keys, models, find, attach_pid))


async def _drain(gateway: Gateway, at_once: asyncio.Event, most_s: float) -> None:
    """Let running requests finish, for ``most_s`` or until a second signal."""
    gateway.draining = True
    if gateway.num_running:
        _say(
            f"llmkit: finishing {gateway.num_running} requests, {most_s:.0f} s at most "
            "(a second signal ends at once)"
        )
    end = time.monotonic() + most_s
    while gateway.num_running and time.monotonic() < end and not at_once.is_set():
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.05):
                await at_once.wait()


async def _end(workers: Workers, at_once: asyncio.Event) -> None:
    """Unload all models; a second signal kills their processes."""
    closing = asyncio.ensure_future(asyncio.to_thread(workers.close))
    hurry = asyncio.ensure_future(at_once.wait())
    await asyncio.wait({closing, hurry}, return_when=asyncio.FIRST_COMPLETED)
    hurry.cancel()
    if not closing.done():
        workers.manager.kill()
    await closing


def _say(text: str, to: Any = None) -> None:
    """On standard error, which may be gone."""
    with contextlib.suppress(OSError, ValueError):
        print(text, file=to or sys.stderr, flush=True)


class Workers:
    """The models of this server, and the directory that finds their engines."""

    def __init__(
        self, options: GatewayOptions, models: Sequence[ServedModel], find: Offer | None
    ) -> None:
        self.manager = ModelManager(
            models,
            drain_s=options.drain_s,
            find=find or (lambda _: None),
            is_busy=self._is_busy,
            on_change=self._changed,
        )
        self.served = served = Served(self.manager)
        self.directory = EngineDirectory(
            [ConnectionFiles(lambda origin: origin.pid in self.manager.pids())],
            default=lambda: self.manager.default,
            names=served.names,
            absent=served.absent,
            offered=served.offered,
        )

    def gateway_options(self) -> dict[str, Any]:
        """What the `Gateway` needs to know of them."""
        return {
            "routes": ModelRoutes(self.served).routes(),
            "admissions": [self.served.admit],
            "offered": self.manager.statuses,
        }

    def close(self) -> None:
        """Unload all models."""
        self.manager.close()

    def _is_busy(self, name: str) -> bool:
        engine = self.directory.engine_of(name)
        if engine is None:
            return False
        stats = engine.stats()
        return stats.num_running + stats.num_waiting > 0

    @staticmethod
    def _changed(status: ModelStatus) -> None:
        if status.phase == "ready":
            _say(f"llmkit: the model {status.name!r} is ready", sys.stdout)
        elif status.phase == "failed":
            _say(f"llmkit: the model {status.name!r} cannot be served: {status.reason}")
        elif status.phase == "unloaded" and status.loads:
            _say(f"llmkit: the model {status.name!r} is unloaded")


async def _serve(
    options: GatewayOptions,
    keys: Keys,
    models: Sequence[ServedModel],
    find: Offer | None,
    attach_pid: int | None,
) -> int:
    started = process_start_time(attach_pid) if attach_pid is not None else None
    if attach_pid is not None and started is None:
        raise InvalidRequestError(f"there is no process {attach_pid} to attach to.", "attach")
    stop, at_once = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    def asked_to_end() -> None:
        (at_once if stop.is_set() else stop).set()

    for number in (signal.SIGINT, signal.SIGTERM):
        with contextlib.suppress(NotImplementedError):
            loop.add_signal_handler(number, asked_to_end)
    # Bind first: do not load a model only to find the port taken.
    from tornado.netutil import bind_sockets

    sockets = bind_sockets(options.port, options.host)
    workers = Workers(options, models, find) if models or find else None
    if workers is not None:
        directory = workers.directory
        gateway = Gateway(directory, strict=options.strict, **workers.gateway_options())
    else:

        def is_ours(origin: Origin) -> bool:
            return attach_pid is None or origin.pid == attach_pid

        directory = EngineDirectory([ConnectionFiles(is_ours)])
        gateway = Gateway(directory, strict=options.strict)
    server = make_server(
        make_app(gateway, keys),
        min(MAX_CONNECTIONS, max(16, raise_descriptors() - SPARE_DESCRIPTORS)),
    )
    try:
        server.add_sockets(sockets)
        host = f"[{options.host}]" if ":" in options.host else options.host
        print(f"llmkit gateway at http://{host}:{sockets[0].getsockname()[1]}/v1", flush=True)
        while not stop.is_set():
            if workers is not None:
                workers.manager.check()
            if attach_pid is not None and process_start_time(attach_pid) != started:
                break
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(POLL_S):
                    await stop.wait()
        if stop.is_set():
            server.stop()
            await _drain(gateway, at_once, options.drain_s)
    finally:
        server.stop()
        directory.close()
        if workers is not None:
            await _end(workers, at_once)
        await server.close_all_connections()
    return 0
