"""The gateway: dispatches exchanges by the route table, for any adapter. Tornado loop only.

Also composes the server that runs without Jupyter.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from tornado import web

from llmkit.gateway import pipeline
from llmkit.gateway.access.held import Held
from llmkit.gateway.access.keys import Keys
from llmkit.gateway.directory import EngineDirectory
from llmkit.gateway.exchange import ClientGoneError, Exchange
from llmkit.gateway.failures import ApiError, api_error
from llmkit.gateway.handler import GatewayHandler
from llmkit.gateway.ops.openapi import Route, describe, page
from llmkit.gateway.ops.status import StatusRoutes
from llmkit.gateway.pipeline import Stage, accepting, bounded
from llmkit.gateway.reading import Admission, Reading
from llmkit.gateway.record import recording
from llmkit.gateway.routes import route_table
from llmkit.gateway.server import MAX_CONNECTIONS, BoundedServer
from llmkit.gateway.tolerance import Tolerance
from llmkit.protocol.client import EngineClient
from llmkit.system.lanes import Lanes

if TYPE_CHECKING:
    from llmkit.workers.place import ModelStatus

__all__ = ["Gateway", "make_app", "make_server"]

logger = logging.getLogger("llmkit.gateway")

NOTE_S = 1.0


class Gateway:
    """Answers an `Exchange` by the route table; every error becomes an error object.

    ``places`` gives notebooks by kernel id, for the page. ``strict`` refuses fields that are
    otherwise accepted and ignored, see `Tolerance`. ``stages`` and ``routes`` are added to its own.
    ``admissions`` are called when a body names a model, see `Reading`. ``offered`` gives the
    models of a `ModelManager`, for the page.
    While ``draining``, running requests finish and new ones are refused.
    """

    def __init__(
        self,
        directory: EngineDirectory,
        on_use: Callable[[EngineClient], None] = lambda _: None,
        places: Callable[[], Awaitable[dict[str, str]]] | None = None,
        *,
        strict: bool = False,
        stages: Sequence[Stage] = (),
        routes: Sequence[Route] = (),
        admissions: Sequence[Admission] = (),
        offered: Callable[[], Sequence[ModelStatus]] = tuple,
    ) -> None:
        self._directory = directory
        self.held = Held()
        self.draining = False
        self._lanes = Lanes(2, "llmkit-gateway")
        self._tolerance = Tolerance(strict)
        self._admissions = admissions
        self._status = status = StatusRoutes(directory, places, offered)
        self._stages: list[Stage] = [
            accepting(lambda: self.draining),
            bounded(self.held),
            *stages,
            status.watching,
        ]
        self.routes = [*routes, *route_table(directory, _seldom(on_use), status, self)]

    async def dispatch(self, exchange: Exchange) -> None:
        """Run the request's route; it is answered whatever happens."""
        try:
            exchange.reading = Reading(self._lanes, self._tolerance, self._admissions)
            with recording(exchange.record):
                await pipeline.run(self._stages, self._route(exchange), exchange)
        except ClientGoneError:
            logger.info("client disconnected during %s", exchange.path)
            exchange.drop()
        except Exception as error:
            answer = api_error(error)
            if answer.code == "internal_error":
                logger.exception("%s %s failed", exchange.method, exchange.path)
            exchange.send_error(answer)

    @property
    def num_running(self) -> int:
        """Number of requests being answered."""
        return self._status.num_running

    def _route(self, exchange: Exchange) -> Callable[[Exchange], Awaitable[None]]:
        allowed = []
        for route in self.routes:
            match = route.pattern.fullmatch(exchange.path)
            if match is None:
                continue
            if exchange.method == route.method or (
                exchange.method == "HEAD" and route.method == "GET"
            ):
                # Tornado has already unquoted the path.
                exchange.args = tuple(a for a in match.groups() if a is not None)
                return route.run
            allowed.append(route.method)
        if allowed:
            if exchange.method == "OPTIONS":
                return self._options(", ".join([*allowed, "OPTIONS"]))
            message = (
                f"{exchange.method} is not allowed for {exchange.path:.200}; "
                f"use {' or '.join(allowed)}."
            )
            raise ApiError(
                405, message, code="method_not_allowed", headers={"Allow": ", ".join(allowed)}
            )
        raise ApiError(
            404, f"There is no route {exchange.method} {exchange.path:.200}.", code="not_found"
        )

    @staticmethod
    def _options(methods: str) -> Callable[[Exchange], Awaitable[None]]:
        async def answer(exchange: Exchange) -> None:
            exchange.send_bytes(b"", 204, {"Allow": methods})

        return answer

    def methods(self, path: str) -> str:
        """The methods allowed for a path, for CORS preflight."""
        return ", ".join([*(r.method for r in self.routes if r.pattern.fullmatch(path)), "OPTIONS"])

    async def health(self, exchange: Exchange) -> None:
        """200 if a model is loaded, else 503 with the reason."""
        self._directory.lookup("default")
        exchange.send_json({"status": "ok"})

    async def openapi(self, exchange: Exchange) -> None:
        exchange.send_json(self._description)

    async def docs(self, exchange: Exchange) -> None:
        exchange.send_page(self._description_page)

    @cached_property
    def _description(self) -> dict[str, Any]:
        return describe(self.routes)

    @cached_property
    def _description_page(self) -> str:
        return page(self.routes)


def _seldom(on_use: Callable[[EngineClient], None]) -> Callable[[EngineClient], None]:
    """Call ``on_use`` at most once a second per engine: streams report each token."""
    said: WeakKeyDictionary[EngineClient, float] = WeakKeyDictionary()

    def note(engine: EngineClient) -> None:
        now = time.monotonic()
        if now - said.get(engine, -math.inf) >= NOTE_S:
            said[engine] = now
            on_use(engine)

    return note


def make_app(gateway: Gateway, keys: Keys) -> web.Application:
    return web.Application(
        [(r"/(.*)", GatewayHandler, {"gateway": gateway, "keys": keys})], log_function=_log
    )


def make_server(app: web.Application, most: int = MAX_CONNECTIONS) -> BoundedServer:
    """A server of at most ``most`` connections, see `BoundedServer`.

    The handler bounds bodies, since it can answer with an error.
    """
    return BoundedServer(app, most=most, max_body_size=1 << 60)


def _log(handler: web.RequestHandler) -> None:
    logger.info(
        "%d %s %.200s %.1fms",
        handler.get_status(),
        handler.request.method,
        handler.request.path,
        1000 * handler.request.request_time(),
    )
