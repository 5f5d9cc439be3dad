"""Puts a gateway together from its settings, and applies what of them changes while it runs.

Tornado loop only.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from tornado import httpserver, web

from llmkit.errors import InvalidRequestError
from llmkit.gateway.access.deadlines import Deadlines
from llmkit.gateway.access.edge import Edge
from llmkit.gateway.access.keys import is_loopback
from llmkit.gateway.access.opening import Access
from llmkit.gateway.access.overload import Overload
from llmkit.gateway.access.permission import Allowed, admitting
from llmkit.gateway.app import Gateway, make_app
from llmkit.gateway.compat.lifecycle import LifecycleRoutes
from llmkit.gateway.compat.otron import MAX_REPETITIONS, matching
from llmkit.gateway.conversations.shelf import Shelf
from llmkit.gateway.directory import EngineDirectory
from llmkit.gateway.echoes import EchoDirectory, saying_so
from llmkit.gateway.guards import Guards, Terms
from llmkit.gateway.ops.logs import access_log, set_level
from llmkit.gateway.ops.metrics import Metrics
from llmkit.gateway.ops.models import ModelRoutes
from llmkit.gateway.ops.openapi import Route
from llmkit.gateway.ops.telemetry import start_telemetry
from llmkit.gateway.ops.usage import UsageRoutes
from llmkit.gateway.pipeline import Observer
from llmkit.gateway.response_cache import ResponseCache
from llmkit.gateway.rules import Rules
from llmkit.settings.serving import ServeSettings
from llmkit.workers.place import ModelStatus

if TYPE_CHECKING:
    from llmkit.gateway.access.hub_opening import HubAccess, HubProxies
    from llmkit.gateway.served import Served
    from llmkit.gateway.workers import Workers
    from llmkit.settings.hub_place import HubPlace
    from llmkit.store.database import Database

__all__ = ["Composition"]

MB = 1 << 20


class Composition:
    """A gateway with all that its settings ask for, in front of a directory's engines.

    ``workers`` are its own models, if it has any. Without ``shared`` no keys of a database open
    this gateway, and no use is written down; sessions are in ``db_url`` all the same. With ``hub``
    it is that hub's service. Raises `InvalidRequestError` naming a setting, and `StoreError`.
    """

    def __init__(
        self,
        settings: ServeSettings,
        directory: EngineDirectory,
        workers: Workers | None = None,
        *,
        shared: bool = True,
        hub: HubPlace | None = None,
    ) -> None:
        self._settings, self._directory, self._workers = settings, directory, workers
        options = settings.gateway
        is_needed = hub is not None
        database = _database(settings, is_needed) if shared else None
        of_hub, proxies = (None, None) if hub is None else _hub_access(hub, settings)
        self._hub_proxies = proxies
        self.access = access = Access(
            options, settings.keys, database, of_hub=of_hub, proxies=proxies
        )
        cache = (
            ResponseCache(
                int(options.response_cache_mb * MB),
                options.response_cache_s,
                shared=options.response_cache_shared,
            )
            if options.response_cache_mb
            else None
        )
        self._overload = overload = Overload(
            directory,
            max_queue=options.max_queue,
            max_concurrent=options.max_concurrent,
            reads_first=cache is not None,
        )
        self._deadlines = Deadlines(options.request_timeout_s, overload.retry_after)
        self._rules = Rules(guards_of(settings), overload, cache)
        self._tracer = start_telemetry(options.otlp_endpoint, service_name=options.service_name)
        offered = tuple if workers is None else workers.manager.statuses
        self._metrics = (
            Metrics(directory, offered=offered, response_cache=cache) if options.metrics else None
        )
        self.gateway = Gateway(
            directory,
            strict=options.strict,
            observers=self._observers(),
            stages=[
                access.limiting,
                self._deadlines.stage,
                overload.stage,
                self._rules.stage,
                *([matching] if options.compat == "otron" else []),
            ],
            early=overload.early,
            admin=options.admin,
            allowed_models=self._allowed(),
            max_body_bytes=int(options.body_mb * 1e6),
            max_sound_bytes=int(options.audio_mb * 1e6),
            max_sound_s=options.audio_minutes * 60,
            max_media_bytes=int(options.media_body_mb * 1e6),
            media_hosts=lambda: self._settings.gateway.media_hosts,
            sessions=Shelf.of(options, options.db_url),
            api_dialect=options.api_dialect,
            **self._models(),
        )
        logging.getLogger("llmkit.access").disabled = not options.access_log

    def _allowed(self) -> Allowed:
        """The models that anyone may ask for, by their names or aliases."""

        def globs() -> Sequence[str]:
            return self._settings.gateway.allowed_models

        return Allowed(globs) if self._workers is None else Allowed(globs, self._workers.aliases_of)

    def _observers(self) -> Sequence[Observer]:
        observers: list[Observer] = [access_log()]
        if isinstance(self._directory, EchoDirectory):
            observers.append(saying_so())
        if self._tracer is not None:
            from llmkit.gateway.ops.tracing import tracing

            observers.append(tracing(self._tracer))
        if self._metrics is not None:
            observers.append(self._metrics.observer)
        return observers

    def _models(self) -> dict[str, Any]:
        """What the gateway must know of its own models, and the routes of operators."""
        routes = [] if self._metrics is None else self._metrics.routes()
        if self.access.usage is not None:
            routes += UsageRoutes(self.access.usage, self.access.clock).routes()
        if self._settings.gateway.admin:
            routes += self._storage()
        if self._workers is None:
            return {"routes": routes}
        served = self._workers.served
        return {
            "routes": [*routes, *ModelRoutes(served).routes(), *self._lifecycle(served)],
            "admissions": [admitting(served.name_of), served.admit],
            "keeper": served,
            "offered": self._workers.manager.statuses,
        }

    def _lifecycle(self, served: Served) -> list[Route]:
        """The routes that load one file or another of the models dir."""
        models_dir = self._settings.gateway.models_dir
        routes = LifecycleRoutes(
            served, self._directory, lambda: self._overload.num_waiting, models_dir
        )
        return routes.routes()

    def _storage(self) -> list[Route]:
        """The routes that download and delete models."""
        from llmkit.gateway.ollama.storage import OllamaStorageRoutes
        from llmkit.gateway.ops.storage import StorageRoutes
        from llmkit.gateway.storage import Storage
        from llmkit.models.library import Library

        workers = self._workers
        held = frozenset if workers is None else workers.manager.files
        storage = Storage(Library(self._settings.gateway.models_dir), held)
        return [
            *StorageRoutes(storage, self._directory).routes(),
            *OllamaStorageRoutes(storage, self._directory).routes(),
        ]

    def changed(self, status: ModelStatus) -> None:
        """A model has changed. Any thread."""
        if self._metrics is not None:
            self._metrics.changed(status)
        cache = self._rules.cache
        if cache is not None and status.phase != "ready":
            cache.clear(status.name)

    def app(self) -> web.Application:
        access = self.access
        return make_app(
            self.gateway,
            access.authenticator,
            access.edge,
            base_path=self._settings.gateway.base_path,
            visitors=access.visitors,
            rules=() if access.hub is None else access.hub.visitors.rules(),
        )

    @property
    def tls(self) -> ssl.SSLContext | None:
        return self.access.tls

    def apply(self, settings: ServeSettings) -> None:
        """Take over what may change at run time: all of it, or nothing.

        Raises `InvalidRequestError` naming a setting.
        """
        options = settings.gateway
        guards = guards_of(settings)
        workers = self._workers
        if options.default_model == self._settings.gateway.default_model:
            workers = None  # an administrator may have chosen another since
        default = None if workers is None else workers.default_of(options)
        self.access.apply(options, settings.keys)
        if self.access.hub is not None:
            self.access.hub.users.apply(settings.hub, settings.quotas)
        if workers is not None:
            workers.manager.set_default(default)
        self._rules.guards = guards
        self._overload.max_queue = options.max_queue
        self._overload.max_concurrent = options.max_concurrent
        self._deadlines.most_s = options.request_timeout_s
        set_level(options.log_level)
        logging.getLogger("llmkit.access").disabled = not options.access_log
        self._settings = settings

    async def keep(self, server: httpserver.HTTPServer) -> None:
        """What goes on beside the requests, until cancelled."""
        with contextlib.suppress(OSError):
            self._directory.clients()  # engines are connected to before somebody asks for them
        parts = [self.access.keep_certificates(server)]
        if self.access.hub is not None and self._hub_proxies is not None:
            parts += [self.access.hub.check(), self._hub_proxies.keep()]
        await asyncio.gather(*parts)

    async def close(self) -> None:
        """End what is generated, write down what was used, and export what waits."""
        with contextlib.suppress(Exception):
            await self.gateway.turns.close()
        with contextlib.suppress(Exception):
            await self.access.close()
        if self._tracer is not None:
            await asyncio.to_thread(self._tracer.close)


def guards_of(settings: ServeSettings) -> Guards:
    """The lengths and default sampling that the settings give. Raises `InvalidRequestError`."""
    options = settings.gateway
    general = Terms(
        options.default_max_tokens,
        options.max_tokens_limit,
        settings.sampling,
        MAX_REPETITIONS if options.compat == "otron" else None,
    )
    own = {
        model.name: Terms(model.default_max_tokens, model.max_tokens_limit, model.sampling)
        for model in settings.models
        if model.name is not None
    }
    return Guards(
        general,
        own,
        refuses=options.over_limit == "refuse",
        max_prompt_chars=options.max_prompt_chars,
    )


def _hub_access(
    hub: HubPlace, settings: ServeSettings
) -> tuple[Callable[[Edge], HubAccess], HubProxies]:
    """Raises `InvalidRequestError` without jupyterhub."""
    try:
        from llmkit.gateway.access.hub_opening import HubAccess, HubProxies
    except ImportError as error:
        raise InvalidRequestError(
            f"a hub's service needs jupyterhub ({error}): pip install 'llmkit[hub]'.", "hub"
        ) from None
    proxies = HubProxies(hub, settings.hub, settings.gateway.trusted_proxies)
    return lambda edge: HubAccess(hub, settings.hub, settings.quotas, edge), proxies


def _database(settings: ServeSettings, is_needed: bool) -> Database | None:
    """The database of keys and use, where there is one or it may be needed."""
    from llmkit.store.place import default_path

    options = settings.gateway
    has_budget = any(k.tokens_per_day or k.tokens_per_month for k in settings.keys)
    if not (
        is_needed
        or options.db_url
        or has_budget
        or not is_loopback(options.host)
        or default_path().exists()
    ):
        return None
    from llmkit.store.database import open_database

    return open_database(options.db_url)
