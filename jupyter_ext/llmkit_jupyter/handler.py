"""The Jupyter adapter: runs the route table with Jupyter's identities and authorizer."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Iterator
from typing import Any

from jupyter_core.utils import ensure_async
from jupyter_server.auth import IdentityProvider, PasswordIdentityProvider
from jupyter_server.auth.decorator import allow_unauthenticated
from jupyter_server.auth.identity import LegacyIdentityProvider
from jupyter_server.base.handlers import APIHandler, JupyterHandler
from tornado import web

from llmkit.gateway.access.authenticator import ANONYMOUS
from llmkit.gateway.access.identity import SCOPES, Identity
from llmkit.gateway.app import Gateway
from llmkit.gateway.exchange import Exchange
from llmkit.gateway.failures import ApiError
from llmkit.gateway.ops.pages import PAGES
from llmkit.gateway.sockets.handler import key_offered

__all__ = [
    "RESOURCE",
    "JupyterAssetHandler",
    "JupyterGatewayHandler",
    "forbidden",
    "identity_of",
    "refusal",
    "take_key",
    "telling_strangers",
]

RESOURCE = "llmkit"
OWN_PROVIDERS = (
    IdentityProvider,
    PasswordIdentityProvider,
    LegacyIdentityProvider,
)  # single user


class JupyterGatewayHandler(APIHandler):
    """Runs all routes under the mount, unknown ones included, for users that Jupyter admits.

    The authorizer is asked for ``read`` (GET) or ``execute`` (the rest) on the resource ``llmkit``.
    """

    auth_resource = RESOURCE

    def initialize(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._task: asyncio.Task[None] | None = None
        self._is_gone = False

    async def prepare(self) -> None:  # type: ignore[override]
        take_key(self)
        with telling_strangers(self):
            await super().prepare()

    def finish(self, *args: Any, **kwargs: Any) -> Any:
        """Keep the route's content type; Jupyter's API would call everything JSON."""
        kwargs.setdefault("set_content_type", self._headers.get("Content-Type", "application/json"))
        return super().finish(*args, **kwargs)

    def get_login_url(self) -> str:
        """Where a person logs in; a program is told that it must."""
        if "text/html" in self.request.headers.get("Accept", ""):
            return web.RequestHandler.get_login_url(self)
        raise web.HTTPError(401)

    async def _run(self, path: str | None = None) -> None:
        exchange = Exchange(self, path or "", identity_of(self), self._gateway.held)
        if exchange.path in PAGES:
            self.xsrf_token  # noqa: B018 - sets the cookie that the page sends with its changes
        action = "read" if self.request.method in ("GET", "HEAD") else "execute"
        allowed = await ensure_async(
            self.authorizer.is_authorized(self, self.current_user, action, RESOURCE)
        )
        if self._is_gone:  # disconnected during authorization
            return
        if not allowed:
            self._gateway.refuse(exchange, forbidden(action))
            return
        await self._answer(exchange)

    async def _answer(self, exchange: Exchange) -> None:
        self._task = asyncio.ensure_future(self._gateway.dispatch(exchange))
        with contextlib.suppress(asyncio.CancelledError):
            await self._task

    @web.authenticated
    async def get(self, path: str | None = None) -> None:
        await self._run(path)

    @web.authenticated
    async def head(self, path: str | None = None) -> None:
        await self._run(path)

    @web.authenticated
    async def post(self, path: str | None = None) -> None:
        await self._run(path)

    @web.authenticated
    async def put(self, path: str | None = None) -> None:
        await self._run(path)

    @web.authenticated
    async def patch(self, path: str | None = None) -> None:
        await self._run(path)

    @web.authenticated
    async def delete(self, path: str | None = None) -> None:
        await self._run(path)

    def on_connection_close(self) -> None:
        self._is_gone = True
        if self._task is not None:
            self._task.cancel()

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        """Errors raised before the route, in the same shape."""
        exchange = Exchange(self, (self.path_args or [""])[0] or "")
        error = kwargs.get("exc_info", (None, None, None))[1]
        self._gateway.refuse(exchange, refusal(status_code, error, self._reason))


class JupyterAssetHandler(JupyterGatewayHandler):
    """The page's scripts and styles, which anybody may have.

    Browsers send no header of ours with the modules that a script imports, and to a hub a cookie
    alone proves nothing: any of its users' pages could have sent the request.
    """

    @allow_unauthenticated
    async def get(self, path: str | None = None) -> None:
        await self._answer(Exchange(self, path or "", ANONYMOUS, self._gateway.held))

    @allow_unauthenticated
    async def head(self, path: str | None = None) -> None:
        await self.get(path)


def take_key(handler: JupyterHandler) -> None:
    """A key as Anthropic's clients send it, or browsers to a socket, where Jupyter looks for it."""
    headers = handler.request.headers
    key = headers.get("x-api-key") or key_offered(headers)
    if "Authorization" not in headers and key and key.isascii() and key.isprintable():
        headers["Authorization"] = f"Bearer {key}"


@contextlib.contextmanager
def telling_strangers(handler: JupyterHandler) -> Iterator[None]:
    """Jupyter refuses with 403 whoever is not logged in; here that is a 401."""
    try:
        yield
    except web.HTTPError as error:
        if error.status_code == 403 and is_stranger(handler):
            raise web.HTTPError(401) from None
        raise


def is_stranger(handler: JupyterHandler) -> bool:
    """Whether nobody is logged in. A foreign host leaves no user set either, but is refused."""
    return getattr(handler, "_jupyter_current_user", None) is None and handler.check_host()


def identity_of(handler: JupyterHandler) -> Identity:
    """The caller. This server's own token or password means the owner of the kernels.

    The owner shares their prefixes. Others whom the identity provider admits (a hub's users, with
    shared access) are separate callers.
    """
    name = str(handler.current_user.username)
    is_owner = type(handler.identity_provider) in OWN_PROVIDERS or name == os.environ.get(
        "JUPYTERHUB_USER"
    )
    return (
        Identity("jupyter", "user", scopes=frozenset(SCOPES), cache_scope="")
        if is_owner
        else Identity(f"jupyter {name}", "user")
    )


def refusal(status: int, error: BaseException | None, reason: str) -> ApiError:
    """What Jupyter refused before a route, as an error of ours."""
    if status == 401:
        message = (
            "No valid token: send the Jupyter token as `Authorization: Bearer TOKEN`, or log in."
        )
        return ApiError(401, message, "authentication_error", code="invalid_api_key")
    message = (error.log_message if isinstance(error, web.HTTPError) else None) or reason
    kind = (
        "server_error"
        if status >= 500
        else "permission_error"
        if status == 403
        else "invalid_request_error"
    )
    return ApiError(status, message, kind)


def forbidden(action: str) -> ApiError:
    """What the authorizer refused."""
    return ApiError(
        403, f"You may not {action} on {RESOURCE} here.", "permission_error", code="forbidden"
    )
