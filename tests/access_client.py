"""A gateway with access put together from settings, as `llmkit serve` does."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import tempfile
from collections.abc import AsyncIterator, Sequence
from typing import Any

from gateway_client import Api, sessions_in
from tornado.netutil import bind_sockets

from llmkit.gateway.access.clock import SteadyClock
from llmkit.gateway.access.opening import Access
from llmkit.gateway.access.overload import Overload
from llmkit.gateway.app import Gateway, make_app, make_server
from llmkit.gateway.directory import EngineDirectory
from llmkit.settings.entries import KeyEntry
from llmkit.settings.gateway import GatewayOptions
from llmkit.store.database import Database
from llmkit.store.keys import KeyStore
from llmkit.store.records import KeyRecord, digest, new_secret

COMPLETION = {"prompt": "hello", "max_tokens": 5, "temperature": 0}  # ten tokens in all


def entry(name: str = "ann", **more: Any) -> KeyEntry:
    """A key of the settings."""
    return KeyEntry(name=name, key=f"secret-{name}", **more)


def add_key(keys: KeyStore, name: str, **more: Any) -> str:
    """A key of the database; its secret."""
    secret = new_secret()
    keys.add(KeyRecord(name, digest(secret), created_at=1.0, **more))
    return secret


class Served(Api):
    """The client of such a gateway, and its parts."""

    def __init__(self, url: str, access: Access, server: Any) -> None:
        super().__init__(url)
        self.access, self.server = access, server
        self.port = int(url.rpartition(":")[2])

    def by(self, key: str | None) -> Api:
        """The same gateway for another caller."""
        return Api(self.url, key)


@contextlib.asynccontextmanager
async def served(
    entries: Sequence[KeyEntry] = (),
    database: Database | None = None,
    *,
    clock: SteadyClock | None = None,
    directory: EngineDirectory | None = None,
    gateway: dict[str, Any] | None = None,
    **options: Any,
) -> AsyncIterator[Served]:
    """``options`` are those of `GatewayOptions`, ``gateway`` goes to the `Gateway`."""
    settings = GatewayOptions(**options)
    access = Access(settings, entries, database, clock)
    directory = directory or EngineDirectory()
    overload = Overload(directory, max_concurrent=settings.max_concurrent)
    folder = tempfile.TemporaryDirectory()
    app = Gateway(
        directory,
        sessions=sessions_in(folder.name),
        stages=[access.limiting, overload.stage],
        admin=settings.admin,
        allowed_models=lambda: settings.allowed_models,
        max_body_bytes=round(settings.body_mb * (1 << 20)),
        **(gateway or {}),
    )
    server = make_server(make_app(app, access.keys, access.edge), edge=access.edge, tls=access.tls)
    sockets = bind_sockets(0, "127.0.0.1")
    server.add_sockets(sockets)
    watch = asyncio.ensure_future(access.keep_certificates(server))
    scheme = "https" if access.tls is not None else "http"
    try:
        yield Served(f"{scheme}://127.0.0.1:{sockets[0].getsockname()[1]}", access, server)
    finally:
        watch.cancel()
        server.stop()
        await server.close_all_connections()
        await access.close()
        await app.turns.close()
        directory.close()
        folder.cleanup()


class Hands:
    """A clock that a test sets: the time of day, and the steady one."""

    def __init__(self, wall: float = 1_800_000_000.0) -> None:
        self.wall, self.steady = wall, 1000.0

    def pass_time(self, seconds: float) -> None:
        self.wall += seconds
        self.steady += seconds

    def jump(self, seconds: float) -> None:
        self.wall += seconds

    def clock(self) -> SteadyClock:
        return SteadyClock(lambda: self.wall, lambda: self.steady)


async def exchange_raw(port: int, data: bytes, *, tls: ssl.SSLContext | None = None) -> bytes:
    """Everything a server answers to these bytes, until it closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=tls)
    writer.write(data)
    try:
        async with asyncio.timeout(30):
            return await reader.read()
    finally:
        writer.close()
