"""The chat socket of a gateway that runs without Jupyter. Tornado loop only."""

from __future__ import annotations

import base64
import binascii
from typing import TYPE_CHECKING, Any

from tornado import httputil, web, websocket

from llmkit.gateway.access.authenticator import (
    XSRF,
    XSRF_HEADER,
    Authenticator,
    Facts,
    given_key,
)
from llmkit.gateway.access.edge import SECURITY_HEADERS, Edge
from llmkit.gateway.access.identity import LOCAL, Identity
from llmkit.gateway.exchange import Exchange
from llmkit.gateway.failures import ApiError
from llmkit.gateway.heads import MAX_LINE_BYTES
from llmkit.gateway.lingering import discard_body, has_body
from llmkit.gateway.sockets.connection import Connection
from llmkit.gateway.sockets.wire import ChatProtocol, ChatWire

if TYPE_CHECKING:
    from llmkit.gateway.app import Gateway

__all__ = ["PATHS", "SUBPROTOCOL", "ChatSocketHandler", "check_handshake", "key_offered"]

PATHS = r"(v1/chat/ws|ws/chat|chat/ws|ws)/?"
SUBPROTOCOL, KEY_PREFIX = "llmkit.chat", "llmkit.key."


@web.stream_request_body  # which no handshake has: it is discarded as it comes
class ChatSocketHandler(websocket.WebSocketHandler):
    """Checks origin, caller and number of sockets, then hands messages to a `Connection`.

    The key comes as a header, or, from browsers, which cannot send one, as a subprotocol beside
    ``llmkit.chat`` or as the first message. Of the address only the value that a page of ours has
    for its login's cookie is looked at.
    """

    def initialize(self, gateway: Gateway, authenticator: Authenticator, edge: Edge) -> None:
        self._gateway, self._edge = gateway, edge
        address = edge.proxies.client(str(self.request.remote_ip), self.request.headers)
        proof = self.get_query_argument(XSRF, "")
        if proof:  # a browser that logs in with a cookie can send no header
            self.request.headers[XSRF_HEADER] = proof
        self._address = address
        self._caller = KeyCaller(authenticator, self.request, address)
        self._identity: Identity | None = None
        self._key: str | None = None
        self._connection: Connection | None = None

    async def prepare(self) -> None:
        headers = self.request.headers
        for name, value in self._edge.headers(self.request.host_name, headers).items():
            self.set_header(name, value)
        try:
            if len(self.request.uri or "") > MAX_LINE_BYTES:
                raise ApiError(414, "The address is too long.", code="uri_too_long")
            check_handshake(self.request)
            if self._check_cross_origin(self.check_origin) is not None:
                raise ApiError(
                    403,
                    "Sockets of other websites are refused; name them in cors_origins to allow "
                    "them.",
                    code="forbidden_origin",
                )
            self._identity = await self._identified()
            self._gateway.sockets.check(self._identity, self._address)
        except ApiError as error:
            self._refuse(error)

    def data_received(self, chunk: bytes) -> None:
        """Nobody wants it."""

    async def _identified(self) -> Identity | None:
        """The caller; None if it may still say who it is."""
        try:
            return await self._caller.identify()
        except ApiError as error:
            if error.status != 401 or given_key(self.request.headers):
                raise
        self._key = key_offered(self.request.headers)
        return None

    def check_origin(self, origin: str) -> bool:
        return self._edge.cors.allows(origin)

    def select_subprotocol(self, subprotocols: list[str]) -> str | None:
        return SUBPROTOCOL if SUBPROTOCOL in subprotocols else None

    def get_websocket_protocol(self) -> websocket.WebSocketProtocol | None:
        gateway = self._gateway
        return ChatProtocol(self, gateway.message_limit(), gateway.held, self._counted_as)

    def _counted_as(self) -> str:
        assert self._connection is not None
        return self._connection.counted_as

    async def open(self, *args: str, **kwargs: str) -> None:
        assert isinstance(self.ws_connection, ChatProtocol)
        self._connection = Connection(
            self._gateway.sockets,
            ChatWire(self.ws_connection),
            self._caller,
            self._address,
            greets=self.selected_subprotocol is not None,
        )
        await self._connection.open(self._identity, self._key)

    async def on_message(self, message: str | bytes) -> None:
        assert self._connection is not None
        await self._connection.receive(message)

    def on_close(self) -> None:
        if self._connection is not None:
            self._connection.closed()

    def _refuse(self, error: ApiError) -> None:
        path = self.path_args[0] if self.path_args else ""
        discard_body(self)
        exchange = Exchange(self, path, LOCAL, self._gateway.held, self._address)
        self._gateway.refuse(exchange, error)

    def set_default_headers(self) -> None:
        self.set_header("Server", "llmkit")
        for name, value in SECURITY_HEADERS.items():
            self.set_header(name, value)

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        kind = "server_error" if status_code >= 500 else "invalid_request_error"
        self._refuse(ApiError(status_code, self._reason, kind))


class KeyCaller:
    """Who sent a handshake, by its key."""

    def __init__(
        self, authenticator: Authenticator, request: httputil.HTTPServerRequest, address: str
    ) -> None:
        self._authenticator = authenticator
        self._host, self._headers = request.host_name, request.headers
        self._path, self._address = request.path, address

    def give(self, key: str) -> None:
        self._headers = httputil.HTTPHeaders(self._headers)
        self._headers["Authorization"] = f"Bearer {key}"

    async def identify(self) -> Identity:
        facts = Facts("GET", self._path, self._host, self._address, self._headers)
        return await self._authenticator.identify(facts)

    async def permit(self, action: str) -> None:
        """Its scopes say what it may do, and are looked at with each turn."""


def check_handshake(request: httputil.HTTPServerRequest) -> None:
    """Raises `ApiError` for what is no request for a WebSocket."""
    headers = request.headers
    upgrades = {part.strip().lower() for part in headers.get("Connection", "").split(",")}
    if request.method != "GET":
        raise ApiError(
            405,
            f"{request.method} is not allowed here: this is a WebSocket, which GET opens.",
            code="method_not_allowed",
            headers={"Allow": "GET"},
        )
    if headers.get("Upgrade", "").lower() != "websocket" or "upgrade" not in upgrades:
        raise ApiError(
            426,
            "This is a WebSocket: connect with ws:// or wss://.",
            code="upgrade_required",
            headers={"Upgrade": "websocket", "Connection": "Upgrade"},
        )
    if headers.get("Sec-WebSocket-Version") != "13":
        raise ApiError(
            426,
            "Only version 13 of the WebSocket protocol is spoken here.",
            code="upgrade_required",
            headers={"Upgrade": "websocket", "Sec-WebSocket-Version": "13"},
        )
    if has_body(headers):
        raise ApiError(400, "A handshake has no body.", code="invalid_handshake")
    if not headers.get("Sec-WebSocket-Key"):
        raise ApiError(400, "Sec-WebSocket-Key is missing.", code="invalid_handshake")


def key_offered(headers: httputil.HTTPHeaders) -> str | None:
    """The key that a browser sends as a subprotocol; empty for a broken one."""
    offered = headers.get("Sec-WebSocket-Protocol", "").split(",")
    found = next((name.strip() for name in offered if name.strip().startswith(KEY_PREFIX)), None)
    if found is None:
        return None
    text = found.removeprefix(KEY_PREFIX)
    try:
        return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)).decode()
    except (binascii.Error, UnicodeDecodeError, ValueError):
        return ""
