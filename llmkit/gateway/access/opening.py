"""Puts access together from the settings: keys, limits, the edge and TLS. Tornado loop only."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from tornado import httpserver

from llmkit.errors import InvalidRequestError
from llmkit.gateway.access.authenticator import Authenticator
from llmkit.gateway.access.clock import SteadyClock
from llmkit.gateway.access.cors import Cors
from llmkit.gateway.access.edge import Edge
from llmkit.gateway.access.identity import Allowance
from llmkit.gateway.access.keys import Keys
from llmkit.gateway.access.limiting import limiting
from llmkit.gateway.access.proxies import Proxies
from llmkit.gateway.access.windows import Redis, Windows
from llmkit.gateway.tls import Certificates
from llmkit.settings.entries import KeyEntry
from llmkit.settings.gateway import GatewayOptions

if TYPE_CHECKING:
    from llmkit.gateway.access.hub_opening import HubAccess
    from llmkit.gateway.access.watching import KeyWatch
    from llmkit.gateway.ops.pages import Visitors
    from llmkit.gateway.pipeline import Stage
    from llmkit.store.database import Database
    from llmkit.store.usage import UsageWriter

__all__ = ["Access"]

CERTIFICATES_S = 2.0
HTTPS = 443


class Access:
    """Who may use a server, and how much.

    ``authenticator``, ``edge`` and ``visitors`` are for `make_app`, ``limiting`` is a stage,
    ``tls`` is for `make_server`. The ``database`` has keys too, and what is used is written there
    (``usage``); it is closed with this. With ``of_hub`` the callers are a hub's instead, and there
    are no keys, and ``proxies`` are the hub's. Raises `InvalidRequestError` naming an option, and
    `StoreError`.
    """

    def __init__(
        self,
        options: GatewayOptions,
        entries: Sequence[KeyEntry] = (),
        database: Database | None = None,
        clock: SteadyClock | None = None,
        *,
        of_hub: Callable[[Edge], HubAccess] | None = None,
        proxies: Proxies | None = None,
    ) -> None:
        self.clock = clock or SteadyClock()
        self._database = database
        self._check_budgets(entries)
        self._files = _files(options)
        self._certificates = None if self._files is None else Certificates(*self._files)
        redis = Redis(options.redis_url) if options.redis_url else None
        self._windows = Windows(redis)
        watch = None if database is None or of_hub is not None else _watch(database)
        self.keys = None
        if of_hub is None:
            self.keys = Keys(
                options.api_key,
                options.host,
                entries=entries,
                stored=() if watch is None else watch.records,
                keyless=Allowance(rate=options.rate),
                cors=Cors(options.cors_origins, local=True),
                now=self.clock.now,
                on_use=self._note_use,
            )
        proxies = proxies or Proxies(options.trusted_proxies)
        is_https = self._certificates is not None and options.port == HTTPS
        self.edge = Edge(self._cors(options), proxies, is_https)
        self.hub = None if of_hub is None else of_hub(self.edge)
        rolls = self.hub is not None
        self.usage = None if database is None else _usage(database, self.clock, rolls=rolls)
        self._keys_watch = watch
        if watch is not None and self.keys is not None:
            watch.start(self.keys.take_stored)
        self.limiting: Stage = limiting(self._windows, self.usage, self.clock)

    @property
    def authenticator(self) -> Authenticator:
        if self.hub is not None:
            return self.hub.users
        assert self.keys is not None
        return self.keys

    @property
    def visitors(self) -> Visitors | None:
        """None: as `make_app` has it."""
        return None if self.hub is None else self.hub.visitors

    @property
    def tls(self) -> ssl.SSLContext | None:
        """For new connections; None without TLS."""
        return None if self._certificates is None else self._certificates.context

    def apply(self, options: GatewayOptions, entries: Sequence[KeyEntry]) -> None:
        """Other keys, rates, origins and certificates from now on.

        Raises `InvalidRequestError` naming an option; then all stays as it was.
        """
        self._check_budgets(entries)
        files = _files(options)
        if (files is None) != (self._files is None):
            raise InvalidRequestError(
                "TLS cannot be switched on or off while the server runs; start it again.",
                "tls_cert",
            )
        certificates = self._certificates
        if files is not None and files != self._files:
            certificates = Certificates(*files)
        if self.keys is not None:
            self.keys.replace(
                options.api_key,
                entries,
                keyless=Allowance(rate=options.rate),
                cors=Cors(options.cors_origins, local=True),
            )
        self.edge.cors = self._cors(options)
        self._files, self._certificates = files, certificates

    async def keep_certificates(self, server: httpserver.HTTPServer) -> None:
        """Give the server new certificates as their files change, until cancelled.

        Connections that are open go on with the one they began with.
        """
        while self._certificates is not None:
            await asyncio.to_thread(self._certificates.refresh)
            server.ssl_options = self._certificates.context
            await asyncio.sleep(CERTIFICATES_S)

    async def close(self) -> None:
        """Write down what was used, and close the database."""
        await self._windows.close()
        for part in (self._keys_watch, self.usage, self._database):
            if part is not None:
                await asyncio.to_thread(part.close)

    def _cors(self, options: GatewayOptions) -> Cors:
        return Cors(options.cors_origins, local=self.keys is not None and self.keys.is_open)

    def _note_use(self, sha256: str, now: float) -> None:
        if self.usage is not None:
            self.usage.note_use(sha256, now)

    def _check_budgets(self, entries: Sequence[KeyEntry]) -> None:
        for entry in entries:
            if self._database is None and (entry.tokens_per_day or entry.tokens_per_month):
                raise InvalidRequestError(
                    f"the key {entry.name!r} has a token budget, which needs a database; "
                    "give one as db_url.",
                    "db_url",
                )


def _files(options: GatewayOptions) -> tuple[str, str] | None:
    if options.tls_cert is None or options.tls_key is None:
        return None
    return options.tls_cert, options.tls_key


def _watch(database: Database) -> KeyWatch:
    from llmkit.gateway.access.watching import KeyWatch
    from llmkit.store.keys import KeyStore

    return KeyWatch(KeyStore(database))


def _usage(database: Database, clock: SteadyClock, *, rolls: bool) -> UsageWriter:
    from llmkit.store.keys import KeyStore
    from llmkit.store.usage import UsageStore, UsageWriter

    now = clock.now if rolls else None
    return UsageWriter(UsageStore(database), KeyStore(database), clock.today, now=now)
