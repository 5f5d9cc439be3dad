"""The life of a gateway without Jupyter, on its loop: sockets, signals, draining."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
import time
from collections.abc import Callable, Iterator
from socket import socket

from llmkit.gateway.app import Gateway, make_server
from llmkit.gateway.bodies import build_all
from llmkit.gateway.composition import Composition
from llmkit.gateway.directory import EngineDirectory
from llmkit.gateway.ops.logs import log_to
from llmkit.gateway.server import MAX_CONNECTIONS, SPARE_DESCRIPTORS, raise_descriptors
from llmkit.gateway.workers import Workers, say
from llmkit.settings.hub_place import HubPlace
from llmkit.settings.reload import reload
from llmkit.settings.serving import ServeSettings
from llmkit.system import collecting
from llmkit.system.notify import Notifier

__all__ = ["Server"]

POLL_S = 0.5
SETTLE_S = 2.0


class Server:
    """One run of the gateway, on its loop."""

    def __init__(
        self,
        settings: ServeSettings,
        read: Callable[[], ServeSettings] | None,
        sockets: list[socket],
        workers: Workers | None,
        directory: EngineDirectory,
        *,
        shared: bool,
        hub: HubPlace | None = None,
    ) -> None:
        self._settings, self._read, self._sockets = settings, read, sockets
        self._shared, self._hub = shared, hub
        self._workers = workers
        self._directory = directory
        self._notifier = Notifier()
        log_to(settings.gateway.log_format, settings.gateway.log_level)
        raise_descriptors()

    async def run(self, is_attached: Callable[[], bool]) -> int:
        self._stop, self._at_once = asyncio.Event(), asyncio.Event()
        parts = Composition(
            self._settings, self._directory, self._workers, shared=self._shared, hub=self._hub
        )
        most = min(MAX_CONNECTIONS, max(16, raise_descriptors() - SPARE_DESCRIPTORS))
        server = make_server(parts.app(), most, edge=parts.access.edge, tls=parts.tls)
        beside = [
            asyncio.ensure_future(parts.keep(server)),
            asyncio.ensure_future(self._notifier.watch()),
            asyncio.ensure_future(self._settle()),
        ]
        try:
            with self._signals(parts):
                server.add_sockets(self._sockets)
                self._announce()
                if self._workers is not None:
                    self._workers.listen(parts.changed)
                while not self._stop.is_set() and is_attached():
                    if self._workers is not None:
                        self._workers.manager.check()
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(POLL_S):
                            await self._stop.wait()
                self._notifier.stopping()
                server.stop()
                if self._stop.is_set():
                    await self._drain(parts.gateway)
                await self._end()
        finally:
            server.stop()
            for task in beside:
                task.cancel()
            self._directory.close()
            await parts.close()
            await parts.gateway.sockets.close()
            await server.close_all_connections()
            self._notifier.close()
        return 0

    async def _settle(self) -> None:
        """What first requests would wait for, once a small model is loaded and has answered."""
        collecting.resume()
        await asyncio.sleep(SETTLE_S)
        await build_all()
        collecting.settle()

    @contextlib.contextmanager
    def _signals(self, parts: Composition) -> Iterator[None]:
        """SIGTERM and SIGINT end the server, a second one at once; SIGHUP reads the settings."""
        loop = asyncio.get_running_loop()

        def ends() -> None:
            (self._at_once if self._stop.is_set() else self._stop).set()

        def reads() -> None:
            if self._read is not None:
                self._notifier.reloading()
                self._settings = reload(self._settings, self._read, parts.apply)
                self._notifier.ready()

        numbers = {signal.SIGINT: ends, signal.SIGTERM: ends}
        if hasattr(signal, "SIGHUP"):
            numbers[signal.SIGHUP] = reads
        for number, action in numbers.items():
            with contextlib.suppress(NotImplementedError):
                loop.add_signal_handler(number, action)
        try:
            yield
        finally:
            for number in numbers:
                with contextlib.suppress(NotImplementedError):
                    loop.remove_signal_handler(number)

    def _announce(self) -> None:
        options = self._settings.gateway
        host = f"[{options.host}]" if ":" in options.host else options.host
        scheme = "http" if options.tls_cert is None else "https"
        port = self._sockets[0].getsockname()[1]
        address = f"{scheme}://{host}:{port}{options.base_path}/v1"
        say(f"llmkit gateway at {address}", sys.stdout)
        self._notifier.ready(address)

    async def _drain(self, gateway: Gateway) -> None:
        """Let running requests finish, until ``drain_s`` are over or a second signal."""
        gateway.draining = True
        gateway.sockets.drain()
        most_s = self._settings.gateway.drain_s
        if gateway.num_running:
            say(
                f"llmkit: finishing {gateway.num_running} requests, {most_s:.0f} s at most "
                "(a second signal ends at once)"
            )
        end = time.monotonic() + most_s
        while gateway.num_running and time.monotonic() < end and not self._at_once.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.05):
                    await self._at_once.wait()
        await gateway.turns.stop_all()  # while their engines are still there

    async def _end(self) -> None:
        """Unload all models; a second signal kills their processes."""
        if self._workers is None:
            return
        closing = asyncio.ensure_future(asyncio.to_thread(self._workers.close))
        hurry = asyncio.ensure_future(self._at_once.wait())
        await asyncio.wait({closing, hurry}, return_when=asyncio.FIRST_COMPLETED)
        hurry.cancel()
        if not closing.done():
            self._workers.manager.kill()
        await closing
