"""`llmkit serve`: the gateway without Jupyter, and the supervised worker behind it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import sys
import time
from typing import Any

from llmkit.errors import InvalidRequestError
from llmkit.gateway.access.keys import Keys
from llmkit.gateway.app import Gateway, make_app, make_server
from llmkit.gateway.directory import EngineDirectory
from llmkit.gateway.server import MAX_CONNECTIONS, SPARE_DESCRIPTORS, raise_descriptors
from llmkit.gateway.sources import ConnectionFiles
from llmkit.protocol import Origin
from llmkit.settings.gateway import GatewayOptions
from llmkit.system.process import process_start_time
from llmkit.workers.supervisor import Supervisor

__all__ = ["serve"]

POLL_S = 0.5


def serve(
    options: GatewayOptions, task: dict[str, Any] | None, *, attach_pid: int | None = None
) -> int:
    """Serve until a signal: the model of a `llmkit.workers.engine` ``task``, or all engines found.

    With ``attach_pid`` only that process's engines, until it ends. Raises `InvalidRequestError`
    (address, key) before anything is loaded, and `ModelLoadError` if the model cannot be loaded.
    """
    logging.basicConfig(
        level=options.log_level.upper(),
        format="%(asctime)s %(levelname)s %(message)s",
        stream=sys.stderr,
    )
    if attach_pid is not None and task is not None:
        raise InvalidRequestError("name a model or --attach a process, not both.", "attach")
    raise_descriptors()
    keys = Keys(options.api_key, options.host)
    return asyncio.run(_serve(options, keys, task, attach_pid))


async def _drain(gateway: Gateway, at_once: asyncio.Event, most_s: float) -> None:
    """Let running requests finish, for ``most_s`` or until a second signal."""
    gateway.draining = True
    if gateway.num_running:
        print(
            f"llmkit: finishing {gateway.num_running} requests, {most_s:.0f} s at most "
            "(a second signal ends at once)",
            file=sys.stderr,
            flush=True,
        )
    end = time.monotonic() + most_s
    while gateway.num_running and time.monotonic() < end and not at_once.is_set():
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.05):
                await at_once.wait()


async def _serve(
    options: GatewayOptions, keys: Keys, task: dict[str, Any] | None, attach_pid: int | None
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
    worker = (
        Supervisor(task, on_ready=lambda: print("llmkit: the model is ready", flush=True))
        if task is not None
        else None
    )

    def is_ours(origin: Origin) -> bool:
        if worker is not None:
            return origin.pid == worker.pid
        return attach_pid is None or origin.pid == attach_pid

    def loading() -> str | None:
        state = None if worker is None else worker.state
        return state.reason if state is not None and state.phase == "loading" else None

    directory = EngineDirectory([ConnectionFiles(is_ours)], loading=loading)
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
            if worker is not None:
                worker.check()
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
        if worker is not None:
            await asyncio.to_thread(worker.close)
        await server.close_all_connections()
    return 0
