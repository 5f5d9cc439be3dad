"""The chat socket under Jupyter: its identities, its authorizer, its rules for origins."""

from __future__ import annotations

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
    is_stranger,
    refusal,
    take_key,
)

__all__ = ["SOCKET_ROUTE", "JupyterChatSocket"]

SOCKET_ROUTE = rf"/llmkit/{PATHS}"


class JupyterChatSocket(WebSocketMixin, websocket.WebSocketHandler, JupyterHandler):
    """A `Connection` for a user that Jupyter admits.

    The authorizer is asked for ``read`` at the handshake and to resume, and for ``execute`` before
    whatever computes or cancels.
    """

    auth_resource = RESOURCE

    def initialize(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._address = str(self.request.remote_ip)
        self._connection: Connection | None = None

    async def prepare(self) -> None:  # type: ignore[override]
        take_key(self)
        try:
            await super().prepare()
        except web.HTTPError as error:
            if error.status_code == 403 and is_stranger(self):
                raise web.HTTPError(401) from None
            raise
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
        return ChatProtocol(self, gateway.max_body_bytes, gateway.held, self._counted_as, ping_s=0)

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
        return identity_of(self)

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
