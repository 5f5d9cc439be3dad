"""The plain Tornado adapter: runs the route table behind the gateway's own keys. Tornado loop only.

Jupyter's adapter is in `jupyter_ext`. Knows no routes.
"""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import replace
from typing import TYPE_CHECKING

from tornado import web

from llmkit.gateway.access.authenticator import Authenticator, Facts
from llmkit.gateway.access.edge import SECURITY_HEADERS, Edge
from llmkit.gateway.access.held import SMALL_BYTES
from llmkit.gateway.access.identity import LOCAL, counted_as
from llmkit.gateway.exchange import Exchange, body_too_large
from llmkit.gateway.failures import ApiError
from llmkit.gateway.heads import MAX_LINE_BYTES
from llmkit.gateway.lingering import discard_body
from llmkit.gateway.ops.pages import PAGES, Visitors

if TYPE_CHECKING:
    from llmkit.gateway.app import Gateway

__all__ = ["ElsewhereHandler", "GatewayHandler"]


@web.stream_request_body
class GatewayHandler(web.RequestHandler):
    """Checks the caller and size of a request before its body is read, then runs its route."""

    def initialize(
        self, gateway: Gateway, authenticator: Authenticator, edge: Edge, visitors: Visitors
    ) -> None:
        self._gateway, self._authenticator, self._edge = gateway, authenticator, edge
        self._visitors = visitors
        self._task: asyncio.Task[None] | None = None
        self._body: list[bytes] = []
        self._identity = LOCAL
        self._most = gateway.max_body_bytes
        self._size = 0  # bytes of the body counted as held
        self._is_gone = False
        self._address = edge.proxies.client(str(self.request.remote_ip), self.request.headers)
        self._counted_as = counted_as(LOCAL, self._address)

    async def prepare(self) -> None:
        exchange = self._exchange(self.path_args[0])
        self._say_edge()
        request = self.request
        if len(request.uri or "") > MAX_LINE_BYTES:
            self._refuse(ApiError(414, "The address is too long.", code="uri_too_long"))
            return
        facts = Facts(
            str(request.method), exchange.path, request.host_name, self._address, request.headers
        )
        try:
            if facts.method == "OPTIONS" and await self._answers_preflight(exchange, facts):
                return
            identity = await self._authenticator.identify(facts)
        except ApiError as error:
            if error.status == 401 and exchange.path in PAGES and exchange.wants_page:
                self._visitors.turn_away(exchange)
            elif not self._is_gone:
                self._refuse(error)
            return
        self._identity, self._counted_as = identity, counted_as(identity, self._address)
        announced = request.headers.get("Content-Length", "0")
        most = self._most = self._gateway.body_limit(exchange)
        if announced.isdecimal() and (len(announced) > 18 or int(announced) > most):
            self._refuse(body_too_large(announced, most))
            return
        size = int(announced) if announced.isdecimal() else most
        # A small body is read in any case, which keeps its connection.
        if size > SMALL_BYTES or "Transfer-Encoding" in request.headers:
            refusal = self._gateway.early(self._exchange(self.path_args[0]))
            if refusal is not None:
                self._refuse(refusal)

    async def _answers_preflight(self, exchange: Exchange, facts: Facts) -> bool:
        """Answer a preflight request, which has no key, if its page is allowed here."""
        if "Access-Control-Request-Method" not in facts.headers:
            return False
        methods = self._gateway.methods(exchange.path)
        answer = self._edge.cors.preflight(facts.headers, methods)
        if answer is None:
            return False
        await self._authenticator.identify(replace(facts, path="/health"))  # is the host ours?
        exchange.send_bytes(b"", 204, answer)
        return True

    def _say_edge(self) -> None:
        headers = self._edge.headers(self.request.host_name, self.request.headers)
        for name, value in headers.items():
            self.set_header(name, value)

    def _exchange(self, path: str) -> Exchange:
        return Exchange(self, path, self._identity, self._gateway.held, self._address)

    def _refuse(self, error: ApiError) -> None:
        """Answer before the body is read, and discard the rest."""
        discard_body(self)
        self._gateway.refuse(self._exchange(self.path_args[0]), error)

    def data_received(self, chunk: bytes) -> None:
        if self._finished:
            return
        size, most = self._size + len(chunk), self._most
        if size > most:
            self._body.clear()
            self._refuse(body_too_large(str(size), most))
            return
        try:
            self._gateway.held.add(self._counted_as, len(chunk), body=size)
        except ApiError as error:
            self._body.clear()
            self._refuse(error)
            return
        self._size = size
        self._body.append(chunk)

    async def _run(self, path: str) -> None:
        self.request.body = b"".join(self._body)
        self._body.clear()
        self._let_go()  # from here on the gateway counts it
        exchange = self._exchange(path)
        if exchange.path in PAGES and exchange.wants_page:
            self._visitors.welcome(exchange, self.request.headers)
        self._task = asyncio.ensure_future(self._gateway.dispatch(exchange))
        with contextlib.suppress(asyncio.CancelledError):
            await self._task

    def _let_go(self) -> None:
        size, self._size = self._size, 0
        self._gateway.held.add(self._counted_as, -size)

    def on_finish(self) -> None:
        self._let_go()

    get = post = put = delete = patch = head = options = _run

    def on_connection_close(self) -> None:
        self._is_gone = True
        self._let_go()
        if self._task is not None:
            self._task.cancel()

    def check_xsrf_cookie(self) -> None:
        """Whoever lets cookies vouch for a caller checks where a request comes from."""

    def set_default_headers(self) -> None:
        self.set_header("Server", "llmkit")
        for name, value in SECURITY_HEADERS.items():
            self.set_header(name, value)

    def write_error(self, status_code: int, **kwargs: object) -> None:
        self._say_edge()  # Tornado has cleared the headers
        self._gateway.refuse(
            self._exchange(self.request.path),
            ApiError(
                status_code,
                self._reason,
                "server_error" if status_code >= 500 else "invalid_request_error",
            ),
        )


@web.stream_request_body  # which is discarded as it comes
class ElsewhereHandler(web.RequestHandler):
    """Answers what is not under the gateway's base path, without reading its body."""

    def initialize(self, base_path: str) -> None:
        self._base_path = base_path

    def prepare(self) -> None:
        self.set_header("Connection", "close")
        message = f"There is nothing here; this server's routes are under {self._base_path}/."
        Exchange(self, "").send_error(ApiError(404, message, code="not_found"))

    def data_received(self, chunk: bytes) -> None:
        """Nobody wants it."""

    def set_default_headers(self) -> None:
        self.set_header("Server", "llmkit")
        for name, value in SECURITY_HEADERS.items():
            self.set_header(name, value)
