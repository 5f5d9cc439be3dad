"""The gateway: dispatches exchanges by the route table, for any adapter. Tornado loop only.

Also composes the server that runs without Jupyter.
"""

from __future__ import annotations

import contextlib
import logging
import math
import re
import ssl
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from tornado import web

from llmkit.gateway import pipeline
from llmkit.gateway.access.authenticator import Authenticator
from llmkit.gateway.access.computing import EDITING, HEARING, SEEING, SUBMITTING
from llmkit.gateway.access.edge import Edge
from llmkit.gateway.access.held import MAX_HELD_BYTES, Held
from llmkit.gateway.access.identity import ADMIN, Identity
from llmkit.gateway.access.permission import permitting, seeing
from llmkit.gateway.adapters import Adapters
from llmkit.gateway.conversations.history import HistoryRoutes
from llmkit.gateway.conversations.routes import SessionRoutes
from llmkit.gateway.conversations.shelf import Shelf
from llmkit.gateway.conversations.turn_routes import TurnRoutes
from llmkit.gateway.conversations.turns import Turns
from llmkit.gateway.directory import EngineDirectory
from llmkit.gateway.exchange import MAX_BODY_BYTES, ClientGoneError, Exchange, Keeper
from llmkit.gateway.failures import ApiError, api_error
from llmkit.gateway.handler import ElsewhereHandler, GatewayHandler
from llmkit.gateway.media.fetching import Fetcher
from llmkit.gateway.ops.health import HealthRoutes
from llmkit.gateway.ops.openapi import Route, describe, page
from llmkit.gateway.ops.pages import Locked, PageRoutes, Visitors
from llmkit.gateway.ops.status import StatusRoutes
from llmkit.gateway.pipeline import Observer, Stage, accepting, bounded
from llmkit.gateway.reading import Admission, Reading
from llmkit.gateway.record import recording
from llmkit.gateway.routes import route_table
from llmkit.gateway.server import MAX_CONNECTIONS, BoundedServer
from llmkit.gateway.sockets.handler import PATHS as SOCKET_PATHS
from llmkit.gateway.sockets.handler import ChatSocketHandler
from llmkit.gateway.sockets.room import SocketRoom
from llmkit.gateway.tolerance import Tolerance
from llmkit.gateway.web import View
from llmkit.protocol.client import EngineClient
from llmkit.system.lanes import Lanes

if TYPE_CHECKING:
    from llmkit.workers.place import ModelStatus

__all__ = ["Gateway", "make_app", "make_server"]

logger = logging.getLogger("llmkit.gateway")

NOTE_S = 1.0
MAX_SOUND_BYTES, MAX_SOUND_S = 25_000_000, 3600.0
MAX_MEDIA_BYTES = 64_000_000
FORM_BYTES = 256 << 10  # of a form beside its file
BASE64 = 4 / 3  # in which a sound comes from `llmkit.attach`
HELD_BODIES = 4  # largest bodies that one caller may have pending
HELD_MEDIA = 2  # the same of those with pictures


class Gateway:
    """Answers an `Exchange` by the route table; every error becomes an error object.

    ``places`` gives notebooks by kernel id, for the page. ``strict`` refuses fields that are
    otherwise accepted and ignored, see `Tolerance`. ``stages`` and ``routes`` are added to its own.
    ``observers`` are stages round all others, and also see what is refused before it is read.
    ``admissions`` are called when a body names a model, see `Reading`. ``offered`` gives the
    models of a `ModelManager`, for the page. Without ``admin`` the routes that need that scope are
    not there. ``allowed_models`` gives globs of the models that anyone may use; none means all.
    ``early`` may refuse a request whose body is large before it is read, see `Overload.early`.
    Files of sound may have ``max_sound_bytes`` and last ``max_sound_s``. Chats with a model that
    takes pictures or sound may have ``max_media_bytes``, and name files of ``media_hosts``; what
    an image starts from may have as many.
    ``keeper`` decides how long models stay loaded. Without ``sessions`` there are none to keep.
    ``home`` is the tab of the page at the root.
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
        observers: Sequence[Observer] = (),
        routes: Sequence[Route] = (),
        admissions: Sequence[Admission] = (),
        offered: Callable[[], Sequence[ModelStatus]] = tuple,
        admin: bool = False,
        allowed_models: Callable[[], Sequence[str]] = tuple,
        max_body_bytes: int = MAX_BODY_BYTES,
        max_sound_bytes: int = MAX_SOUND_BYTES,
        max_sound_s: float = MAX_SOUND_S,
        max_media_bytes: int = MAX_MEDIA_BYTES,
        media_hosts: Callable[[], Sequence[str]] = tuple,
        early: Callable[[Exchange], ApiError | None] = lambda _: None,
        keeper: Keeper | None = None,
        sessions: Shelf | None = None,
        home: View = "chat",
        api_dialect: str = "auto",
    ) -> None:
        self.max_body_bytes = max_body_bytes
        self._max_sound_bytes, self._max_media_bytes = max_sound_bytes, max_media_bytes
        self._max_attached_bytes = math.ceil(BASE64 * max_sound_bytes) + FORM_BYTES
        largest = max(max_body_bytes, self._max_attached_bytes)
        self.held = Held(max(MAX_HELD_BYTES, HELD_BODIES * largest, HELD_MEDIA * max_media_bytes))
        self._directory, self._fetcher = directory, Fetcher(media_hosts)
        self.draining = False
        self._lanes = Lanes(2, "llmkit-gateway")
        self._tolerance = Tolerance(strict)
        self._admissions, self._early, self._keeper = admissions, early, keeper
        self._status = status = StatusRoutes(directory, places, offered, self._actions)
        self._observers = observers
        self._adapters = Adapters()
        self._stages: list[Stage] = [
            *observers,
            accepting(lambda: self.draining),
            permitting(allowed_models),
            bounded(self.held),
            *stages,
            status.watching,
        ]
        self.turns = Turns(self.dispatch, self.held, sessions)
        self.sockets = SocketRoom(
            self.turns,
            self.dispatch,
            partial(_names, directory, allowed_models),
            self.held,
            max_message_bytes=self.message_limit,
        )
        on_use = _seldom(on_use)
        every = [
            *routes,
            *route_table(
                directory,
                on_use,
                status,
                PageRoutes(status, home, has_usage=any(r.path == "/usage" for r in routes)),
                self,
                self._adapters,
                api_dialect=api_dialect,
                besides=[route.path for route in routes],
                max_sound_s=max_sound_s,
            ),
            *SessionRoutes(self.turns).routes(),
            *HistoryRoutes(self.turns).routes(),
            *TurnRoutes(self.turns, directory, on_use).routes(),
            *HealthRoutes(directory, lambda: self.draining, offered).routes(),
        ]
        self.routes = [route for route in every if admin or route.needs != ADMIN]
        self._absent = [] if admin else [route for route in every if route.needs == ADMIN]

    async def dispatch(self, exchange: Exchange) -> None:
        """Run the request's route; it is answered whatever happens."""
        with recording(exchange.record):
            try:
                exchange.max_body_bytes = self.body_limit(exchange)
                exchange.keeper, exchange.turns = self._keeper, self.turns
                exchange.lora, exchange.fetcher = self._adapters.of, self._fetcher
                exchange.reading = Reading(self._lanes, self._tolerance, self._admissions)
                run = self._route(exchange)
                await pipeline.run(() if exchange.relays else self._stages, run, exchange)
            except ClientGoneError:
                logger.info("client disconnected during %s", exchange.path)
                exchange.drop()
            except Exception as error:
                answer = api_error(error, for_admin=ADMIN in exchange.identity.scopes)
                if answer.code == "internal_error":
                    logger.exception("%s %s failed", exchange.method, exchange.path)
                exchange.send_error(answer)

    def refuse(self, exchange: Exchange, error: ApiError) -> None:
        """Answer a request that is refused before it is read."""
        self._route(exchange)
        with recording(exchange.record), contextlib.ExitStack() as entered:
            for observer in self._observers:
                entered.enter_context(observer(exchange))
            exchange.send_error(error)

    def body_limit(self, exchange: Exchange) -> int:
        """The largest body of a request, in bytes: files of sound may be larger than others, and
        chats where a model takes pictures or may be loaded that does."""
        if exchange.path in HEARING:
            return self._max_sound_bytes + FORM_BYTES
        if exchange.path in EDITING:
            return max(self.max_body_bytes, self._max_media_bytes)
        if exchange.path == SUBMITTING:  # also what is drawn from a picture
            limit = self._limit(self._directory.any_may(lambda model: model.inputs))
            hears = self._directory.any_may(lambda model: model.hears)
            return max(limit, self._max_attached_bytes) if hears else limit
        return self.message_limit() if SEEING.fullmatch(exchange.path) else self.max_body_bytes

    def message_limit(self) -> int:
        """The largest body of a chat, in bytes, with the models that are there or offered now."""
        return self._limit(self._directory.any_may(lambda model: model.senses))

    def _limit(self, has_media: bool) -> int:
        return max(self.max_body_bytes, self._max_media_bytes) if has_media else self.max_body_bytes

    def early(self, exchange: Exchange) -> ApiError | None:
        """Why a request need not be read; None if it is to be read."""
        self._route(exchange)
        return self._early(exchange)

    @property
    def num_running(self) -> int:
        """Number of requests being answered, or about to be stored."""
        return self._status.num_running + self.turns.num_settling

    def _actions(self) -> list[str]:
        """The paths of what administrators may do."""
        return [r.path for r in self.routes if r.needs == ADMIN and r.method == "POST"]

    def _route(self, exchange: Exchange) -> Callable[[Exchange], Awaitable[None]]:
        """What runs for a request; without a route, what raises the reason."""
        allowed = []
        for route in self.routes:
            match = route.pattern.fullmatch(exchange.path)
            if match is None:
                continue
            exchange.dialect = route.errors
            if exchange.method == route.method or (
                exchange.method == "HEAD" and route.method == "GET"
            ):
                # Tornado has already unquoted the path.
                exchange.args = tuple(a for a in match.groups() if a is not None)
                exchange.route, exchange.scope = route.template, route.needs
                exchange.relays = route.relays and not exchange.is_detached
                return route.run
            allowed.append(route.method)
        if any(r.method == exchange.method and r.pattern.fullmatch(exchange.path)
               for r in self._absent):  # fmt: skip
            message = (
                f"{exchange.method} {exchange.path:.200} is only there for administrators: start "
                "the server with --admin (admin = true)."
            )
            return _raising(ApiError(404, message, code="not_found"))
        if allowed:
            if exchange.method == "OPTIONS":
                return self._options(", ".join([*allowed, "OPTIONS"]))
            message = (
                f"{exchange.method} is not allowed for {exchange.path:.200}; "
                f"use {' or '.join(allowed)}."
            )
            return _raising(
                ApiError(
                    405, message, code="method_not_allowed", headers={"Allow": ", ".join(allowed)}
                )
            )
        message = f"There is no route {exchange.method} {exchange.path:.200}."
        return _raising(ApiError(404, message, code="not_found"))

    @staticmethod
    def _options(methods: str) -> Callable[[Exchange], Awaitable[None]]:
        async def answer(exchange: Exchange) -> None:
            exchange.send_bytes(b"", 204, {"Allow": methods})

        return answer

    def methods(self, path: str) -> str:
        """The methods allowed for a path, for CORS preflight."""
        return ", ".join([*(r.method for r in self.routes if r.pattern.fullmatch(path)), "OPTIONS"])

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


def _raising(error: ApiError) -> Callable[[Exchange], Awaitable[None]]:
    async def answer(exchange: Exchange) -> None:
        raise error

    return answer


def _names(
    directory: EngineDirectory, everybody: Callable[[], Sequence[str]], identity: Identity
) -> list[str]:
    """The models that are there for a caller."""
    with seeing(identity, everybody):
        return [*(entry.model_id for entry in directory.entries()), *directory.unloaded]


def _seldom(on_use: Callable[[EngineClient], None]) -> Callable[[EngineClient], None]:
    """Call ``on_use`` at most once a second per engine: streams report each token."""
    said: WeakKeyDictionary[EngineClient, float] = WeakKeyDictionary()

    def note(engine: EngineClient) -> None:
        now = time.monotonic()
        if now - said.get(engine, -math.inf) >= NOTE_S:
            said[engine] = now
            on_use(engine)

    return note


def make_app(
    gateway: Gateway,
    authenticator: Authenticator,
    edge: Edge | None = None,
    *,
    base_path: str = "",
    visitors: Visitors | None = None,
    rules: Sequence[Any] = (),
) -> web.Application:
    """The gateway's routes under ``base_path``, such as /llm.

    ``visitors`` receives browsers, by default `Locked`; ``rules`` are Tornado's, and come first.
    """
    parts = {"gateway": gateway, "authenticator": authenticator, "edge": edge or Edge()}
    browsers = {"visitors": visitors or Locked()}
    return web.Application(
        [
            *rules,
            (rf"{re.escape(base_path)}/{SOCKET_PATHS}", ChatSocketHandler, parts),
            (re.escape(base_path) + r"/(.*)", GatewayHandler, {**parts, **browsers}),
        ],
        default_handler_class=ElsewhereHandler,
        default_handler_args={"base_path": base_path},
        log_function=lambda _: None,  # an observer writes the access log
    )


def make_server(
    app: web.Application,
    most: int = MAX_CONNECTIONS,
    *,
    edge: Edge | None = None,
    tls: ssl.SSLContext | None = None,
) -> BoundedServer:
    """A server of at most ``most`` connections, see `BoundedServer`."""
    is_shared = (edge or Edge()).proxies.trusts
    return BoundedServer(app, most=most, ssl_options=tls, is_shared=is_shared)
