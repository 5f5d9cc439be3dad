"""The chat socket under Jupyter: its identities, its authorizer, its rules for origins."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from jupyter_core.utils import ensure_async
from jupyter_server.base.handlers import JupyterHandler
from jupyter_server.base.websocket import WebSocketMixin
from tornado import web, websocket

from llmkit.gateway.access.identity import LOCAL, Identity
from llmkit.gateway.app import Gateway
from llmkit.gateway.exchange import Exchange
from llmkit.gateway.failures import ApiError
from llmkit.gateway.sockets.connection import Connection
from llmkit.gateway.sockets.handler import PATHS, SUBPROTOCOL, check_handshake
from llmkit.gateway.sockets.wire import ChatProtocol, ChatWire
from llmkit_jupyter.handler import (
    RESOURCE,
    forbidden,
    identity_of,
    refusal,
    take_key,
    telling_strangers,
)

__all__ = ["SOCKET_ROUTE", "JupyterChatSocket"]

ASK_S, TRUSTED_S = 5.0, 60.0  # between two questions; while they cannot be answered
SOCKET_ROUTE = rf"/llmkit/{PATHS}"


class JupyterChatSocket(WebSocketMixin, websocket.WebSocketHandler, JupyterHandler):
    """A `Connection` for a user that Jupyter admits.

    The authorizer is asked for ``read`` at the handshake and to resume, and for ``execute`` before
    whatever computes or cancels. Who the user is, is asked again every few seconds, and with it
    whether ``read`` is still allowed: whoever may not log in any more is sent away.
    """

    auth_resource = RESOURCE

    def initialize(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._address = str(self.request.remote_ip)
        self._connection: Connection | None = None
        self._asking: asyncio.Task[None] | None = None
        self._refusal: ApiError | None = None
        self._asked_at = self._known_at = time.monotonic()

    async def prepare(self) -> None:  # type: ignore[override]
        take_key(self)
        self._before = dict(vars(self))
        with telling_strangers(self):
            await super().prepare()
            if self.current_user is None:  # Jupyter leaves that to each handler
                raise web.HTTPError(401)
        try:
            check_handshake(self.request)
            if self._check_cross_origin(self.check_origin) is not None:
                raise ApiError(
                    403, "Sockets of other websites are refused.", code="forbidden_origin"
                )
            await self.permit("read")
            self._gateway.sockets.check(identity_of(self), self._address)
        except ApiError as error:
            self._refuse(error)

    def get_login_url(self) -> str:
        """A socket never redirects to a login page."""
        raise web.HTTPError(401)

    def select_subprotocol(self, subprotocols: list[str]) -> str | None:
        return SUBPROTOCOL if SUBPROTOCOL in subprotocols else None

    def get_websocket_protocol(self) -> websocket.WebSocketProtocol | None:
        # The mixin sends the pings.
        gateway = self._gateway
        return ChatProtocol(self, gateway.message_limit(), gateway.held, self._counted_as, ping_s=0)

    def _counted_as(self) -> str:
        assert self._connection is not None
        return self._connection.counted_as

    async def open(self, *args: str, **kwargs: str) -> None:
        super().open(*args, **kwargs)
        assert isinstance(self.ws_connection, ChatProtocol)
        self._connection = Connection(
            self._gateway.sockets,
            ChatWire(self.ws_connection),
            self,
            self._address,
            greets=self.selected_subprotocol is not None,
        )
        await self._connection.open(identity_of(self))

    async def on_message(self, message: str | bytes) -> None:
        assert self._connection is not None
        await self._connection.receive(message)

    def on_close(self) -> None:
        if self.ping_callback is not None:
            self.ping_callback.stop()
        if self._connection is not None:
            self._connection.closed()

    def give(self, key: str) -> None:
        """Jupyter has admitted the caller already."""

    async def identify(self) -> Identity:
        """The user, asked for again unless that was just done. Raises `ApiError`."""
        if self._asking is None and time.monotonic() - self._asked_at >= ASK_S:
            self._asking = asyncio.create_task(self._ask())
        if self._asking is not None:
            await asyncio.shield(self._asking)
        if self._refusal is not None:
            raise self._refusal
        return identity_of(self)

    async def _ask(self) -> None:
        """Have the identity provider look at the handshake again, and the authorizer."""
        self._refusal = await self._asked()
        self._asked_at, self._asking = time.monotonic(), None

    async def _asked(self) -> ApiError | None:
        """Why the user is not welcome any more."""
        try:
            if self.identity_provider.auth_enabled:  # else each time it is somebody else
                self.current_user = await self._user_again()
            await self.permit("read")
            self._known_at = time.monotonic()
        except ApiError as error:
            return error
        except web.HTTPError as error:
            if error.status_code in (401, 403):
                return refusal(401, None, "")
            return self._unsure(error)
        except Exception as error:  # of the provider, whoever wrote it
            return self._unsure(error)
        return None

    async def _user_again(self) -> Any:
        # Providers note on a handler whom they found: this one is as the request came.
        handler = type(self).__new__(type(self))
        vars(handler).update(self._before)
        user = await ensure_async(self.identity_provider.get_user(handler))
        if user is None:
            raise web.HTTPError(401)
        return user

    def _unsure(self, error: Exception) -> ApiError | None:
        """The provider, a hub perhaps, is in trouble: that may last a moment, no longer."""
        if time.monotonic() - self._known_at < TRUSTED_S:
            return None
        self.log.warning("llmkit: who is at a socket cannot be found out: %s", error)
        message = "Who you are cannot be found out now; connect again."
        return ApiError(503, message, "server_error", code="identity_unknown")

    async def permit(self, action: str) -> None:
        allowed = await ensure_async(
            self.authorizer.is_authorized(self, self.current_user, action, RESOURCE)
        )
        if not allowed:
            raise forbidden(action)

    def _refuse(self, error: ApiError) -> None:
        path = self.path_args[0] if self.path_args else ""
        self._gateway.refuse(Exchange(self, path, LOCAL, self._gateway.held, self._address), error)

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        error = kwargs.get("exc_info", (None, None, None))[1]
        self._refuse(refusal(status_code, error, self._reason))
