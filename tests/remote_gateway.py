"""A gateway with all its rules on a thread of its own, so that a test can attach to it."""

from __future__ import annotations

import asyncio
import ssl
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from typing import Any

import pytest
from access_client import entry
from fake_runner import FakeRunner
from fakes import FakeClient
from tornado.netutil import bind_sockets

from llmkit.bridge.server import BridgeServer
from llmkit.cluster.address import Address
from llmkit.cluster.remote import RemoteEngine
from llmkit.gateway.app import make_server
from llmkit.gateway.composition import Composition
from llmkit.gateway.directory import EngineDirectory
from llmkit.settings.entries import KeyEntry
from llmkit.settings.gateway import GatewayOptions
from llmkit.settings.serving import ServeSettings

ANN, BOB, OWNER = "secret-ann", "secret-bob", "secret-owner"


class RemoteGateway:
    """In front of this user's engines. ``options`` are those of `GatewayOptions`; ``stop`` closes
    all connections, as the end of its process would."""

    def __init__(
        self, keys: Sequence[KeyEntry] = (), *, port: int = 0, shared: bool = False, **options: Any
    ) -> None:
        self._settings = ServeSettings(GatewayOptions(**options), keys=tuple(keys))
        self._shared = shared
        self._port, self._ready = port, Future[int]()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)
        self._thread.start()
        self.port = self._ready.result(30)
        scheme = "https" if options.get("tls_cert") else "http"
        self.url = f"{scheme}://127.0.0.1:{self.port}{options.get('base_path', '')}"

    async def _serve(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        directory = EngineDirectory()
        try:
            self.parts = Composition(self._settings, directory, shared=self._shared)
            tls: ssl.SSLContext | None = self.parts.tls
            server = make_server(self.parts.app(), edge=self.parts.access.edge, tls=tls)
            sockets = bind_sockets(self._port, "127.0.0.1", reuse_port=False)
            server.add_sockets(sockets)
        except BaseException as error:
            self._ready.set_exception(error)
            raise
        self._ready.set_result(sockets[0].getsockname()[1])
        await self._stop.wait()
        server.stop()
        await server.close_all_connections()
        await self.parts.close()
        directory.close()

    def stop(self) -> None:
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join(30)


@pytest.fixture
def slow() -> Iterator[FakeClient]:
    client = FakeClient(runner=FakeRunner(n_ctx=5000, step_s=0.002))
    bridge = BridgeServer(client)
    yield client
    bridge.close()
    client.close()


@pytest.fixture
def gateway(slow: FakeClient) -> Iterator[RemoteGateway]:
    made = RemoteGateway(
        [entry("ann"), entry("bob"), entry("owner", scopes=("inference", "admin"))],
        base_path="/services/llmkit",
        admin=True,
    )
    yield made
    made.stop()


@pytest.fixture
def remote(gateway: RemoteGateway) -> Iterator[RemoteEngine]:
    client = RemoteEngine(Address.of(gateway.url, ANN))
    yield client
    client.close()


def by(gateway: RemoteGateway, key: str) -> RemoteEngine:
    return RemoteEngine(Address.of(gateway.url, key))
