"""The plain Tornado adapter: runs the route table behind the gateway's own keys. Tornado loop only.

Jupyter's adapter is in `jupyter_ext`. Knows no routes.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

from tornado import web

from llmkit.gateway.access.identity import LOCAL
from llmkit.gateway.access.keys import Keys
from llmkit.gateway.exchange import MAX_BODY_BYTES, Exchange
from llmkit.gateway.failures import ApiError
from llmkit.gateway.ops.status import send_page

if TYPE_CHECKING:
    from llmkit.gateway.app import Gateway

__all__ = ["GatewayHandler"]


@web.stream_request_body
class GatewayHandler(web.RequestHandler):
    """Checks the key and size of a request before its body is read, then runs its route."""

    def initialize(self, gateway: Gateway, keys: Keys) -> None:
        self._gateway, self._keys = gateway, keys
        self._task: asyncio.Task[None] | None = None
        self._body: list[bytes] = []
        self._identity = LOCAL
        self._size = 0  # bytes of the body counted as held

    def prepare(self) -> None:
        exchange = Exchange(self, self.path_args[0])
        headers = self.request.headers
        for name, value in self._keys.cors(headers).items():
            self.set_header(name, value)
        if self.request.method == "OPTIONS" and "Access-Control-Request-Method" in headers:
            answer = (
                self._keys.preflight(headers, self._gateway.methods(exchange.path))
                if _is_ours(self._keys, self.request.host_name)
                else None
            )
            if answer is not None:
                exchange.send_bytes(b"", 204, answer)
                return
        refusal = self._keys.refusal(exchange.path, headers, self.request.host_name)
        if (
            refusal is not None
            and refusal.status == 401
            and exchange.path == "/"
            and exchange.wants_page
        ):
            send_page(exchange, None)
        elif refusal is not None:
            self._refuse(refusal)
        else:
            self._identity = self._keys.identify(headers)
            announced = headers.get("Content-Length", "0")
            if announced.isdecimal() and (len(announced) > 18 or int(announced) > MAX_BODY_BYTES):
                self._refuse(_too_large(announced))

    def _refuse(self, error: ApiError) -> None:
        """Answer before the body is read, and discard the rest."""
        if (
            self.request.headers.get("Content-Length", "0") != "0"
            or "Transfer-Encoding" in self.request.headers
        ):
            self.set_header("Connection", "close")
        Exchange(self, self.path_args[0]).send_error(error)

    def data_received(self, chunk: bytes) -> None:
        if self._finished:
            return
        if self._size + len(chunk) > MAX_BODY_BYTES:
            self._body.clear()
            self._refuse(_too_large(str(self._size + len(chunk))))
            return
        try:
            self._gateway.held.add(self._identity.name, len(chunk), body=self._size + len(chunk))
        except ApiError as error:
            self._body.clear()
            self._refuse(error)
            return
        self._size += len(chunk)
        self._body.append(chunk)

    async def _run(self, path: str) -> None:
        self.request.body = b"".join(self._body)
        self._body.clear()
        self._let_go()  # from here on the gateway counts it
        self._task = asyncio.ensure_future(
            self._gateway.dispatch(Exchange(self, path, self._identity, self._gateway.held))
        )
        with contextlib.suppress(asyncio.CancelledError):
            await self._task

    def _let_go(self) -> None:
        size, self._size = self._size, 0
        self._gateway.held.add(self._identity.name, -size)

    def on_finish(self) -> None:
        self._let_go()

    get = post = put = delete = patch = head = options = _run

    def on_connection_close(self) -> None:
        self._let_go()
        if self._task is not None:
            self._task.cancel()

    def check_xsrf_cookie(self) -> None:
        """There are no cookies here."""

    def set_default_headers(self) -> None:
        self.set_header("Server", "llmkit")

    def write_error(self, status_code: int, **kwargs: object) -> None:
        Exchange(self, self.request.path).send_error(
            ApiError(
                status_code,
                self._reason,
                "server_error" if status_code >= 500 else "invalid_request_error",
            )
        )


def _is_ours(keys: Keys, host: str) -> bool:
    """Whether a preflight request, which has no key, may be answered for this host name."""
    return keys.refusal("/health", {}, host) is None


def _too_large(size: str) -> ApiError:
    return ApiError(
        413,
        f"The body has {size:.20} bytes; at most {MAX_BODY_BYTES} are accepted.",
        code="request_too_large",
    )
