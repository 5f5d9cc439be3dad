"""A JupyterHub as the gateway sees it: whose a token is, and browsers that log in with OAuth.

Stands on jupyterhub's `HubOAuth`, whose calls never block here. A login is in the browser's signed
cookies alone, so several gateways behind one address need not know of each other's. Tornado loop
only; imported only where there is a hub.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
import os
import re
import secrets
from abc import ABC, abstractmethod
from collections.abc import Mapping
from hmac import compare_digest
from typing import Any
from urllib.parse import quote, urlsplit

from jupyterhub.services.auth import HubOAuth
from jupyterhub.utils import get_browser_protocol
from tornado import httputil, web

from llmkit.gateway.access.authenticator import XSRF_HEADER, Facts
from llmkit.gateway.access.edge import SECURITY_HEADERS, Edge
from llmkit.gateway.access.hub_tokens import HubGoneError, NoHubError, Owner, TokenOwners
from llmkit.gateway.exchange import Exchange
from llmkit.gateway.failures import ApiError, api_error
from llmkit.gateway.lingering import discard_body, has_body
from llmkit.gateway.ops.pages import PAGES
from llmkit.settings.hub_place import HubPlace

__all__ = ["HubApi", "HubCookies", "HubVisitors"]

logger = logging.getLogger("llmkit.gateway")

ASK_S = 10.0
LOGIN_DAYS, STATE_S = 14.0, 600
CALLBACK, LOGIN, LOGOUT = "oauth_callback", "login", "logout"
HUB_SESSION = "jupyterhub-session-id"
READING = ("GET", "HEAD")
REFUSED = "Failed to check authorization"  # how `HubOAuth` says that an answer is 4xx, not 403
OAUTH_FILE = os.path.join("jupyterhub", "services", "auth.py")
NO_ANSWER = (ValueError, KeyError, TypeError, AttributeError)  # what JSON of others leads to


class HubApi:
    """The hub's answers, by `HubOAuth` as ``oauth``."""

    def __init__(self, place: HubPlace) -> None:
        logging.getLogger("tornado.application").addFilter(_is_no_question)
        self.place = place
        self.oauth = HubOAuth(
            api_url=place.api_url,
            api_token=place.token,
            base_url=f"{place.prefix}/",
            hub_prefix=f"{place.base_url}hub/",
            oauth_client_id=place.client_id,
            access_scopes={place.scope},
        )

    async def owner(self, token: str) -> Owner | None:
        """Whose a token is. Raises `HubGoneError`, and `NoHubError` if something else answers."""
        try:
            async with asyncio.timeout(ASK_S):
                model = await self.oauth.user_for_token(token, use_cache=False, sync=False)
            return None if model is None else Owner.of(model)
        except (web.HTTPError, TimeoutError, OSError) as error:
            is_4xx = isinstance(error, web.HTTPError) and error.status_code == 500
            if is_4xx and _reason(error).startswith(REFUSED):
                raise self._no_hub("it knows no /user") from None
            raise HubGoneError(_reason(error)) from None
        except NO_ANSWER:
            raise self._no_hub("its answer is none of a hub's") from None

    def _no_hub(self, reason: str) -> NoHubError:
        return NoHubError(
            f"$JUPYTERHUB_API_URL, {self.place.api_url}, is not a hub's API ({reason:.200})"
        )

    async def token(self, code: str, verifier: str | None) -> str:
        """The token for the code of a login. Raises `ApiError`."""
        more = {} if verifier is None else {"code_verifier": verifier}
        try:
            async with asyncio.timeout(ASK_S):
                return str(await self.oauth.token_for_code(code, sync=False, **more))
        except (web.HTTPError, TimeoutError, OSError, *NO_ANSWER) as error:
            logger.warning("a login at the hub failed: %s", _reason(error))
            raise _stale() from None


def _is_no_question(record: logging.LogRecord) -> bool:
    """A wrong token is the caller's affair, and an outage is said once by `TokenOwners`: neither
    is worth a line of `HubOAuth` each time."""
    return not record.pathname.endswith(OAUTH_FILE) or record.levelno < logging.WARNING


def _reason(error: Exception) -> str:
    if isinstance(error, web.HTTPError):
        return error.log_message or error.reason or str(error.status_code)
    return str(error) or type(error).__name__


class HubCookies:
    """The cookies of browsers that have logged in, under the service's path.

    They are signed with a key that is made from the service's token, so they last over restarts.
    """

    def __init__(self, oauth: HubOAuth, path: str) -> None:
        self.name, self.state_name = str(oauth.cookie_name), str(oauth.state_cookie_name)
        self.path = f"{path}/"
        self._secret = _derived(oauth.api_token, "llmkit's cookies")

    def token(self, headers: Mapping[str, str]) -> str:
        return self.unsigned(headers, self.name, LOGIN_DAYS)

    def session(self, headers: Mapping[str, str]) -> str:
        return _cookie(headers, HUB_SESSION)

    def check(self, facts: Facts, token: str) -> None:
        """All pages of a hub without a domain for each user have one origin, so a page of another
        user's server could send this cookie: pages of ours prove themselves with each request. A
        cookie alone shows pages only, since such a page could read whatever else is opened."""
        headers = facts.headers
        origin = headers.get("Origin")
        if (
            origin is not None
            and urlsplit(origin).netloc.lower() != headers.get("Host", "").lower()
        ):
            raise ApiError(
                403,
                "Requests from other websites are refused; with a token of the hub as "
                "`Authorization: Bearer TOKEN` they are answered.",
                "permission_error",
                code="forbidden_origin",
            )
        if facts.method in READING and facts.path in PAGES and _is_shown(headers):
            return
        if not compare_digest(headers.get(XSRF_HEADER, "").encode(), self.xsrf(token).encode()):
            raise ApiError(
                403,
                f"A login cookie alone is not enough: this needs the header {XSRF_HEADER} that "
                "the pages here send (load them again), or a token of the hub as "
                "`Authorization: Bearer TOKEN`.",
                "permission_error",
                code="missing_xsrf",
            )

    def xsrf(self, token: str) -> str:
        """What pages of ours send with each request."""
        return _derived(token, self._secret)

    def unsigned(self, headers: Mapping[str, str], name: str, days: float) -> str:
        """The value of a cookie of ours; empty if there is none, or it is too old or forged."""
        value = web.decode_signed_value(self._secret, name, _cookie(headers, name), days)
        return "" if value is None else value.decode("utf-8", "replace")

    def signed(self, name: str, value: str) -> str:
        return web.create_signed_value(self._secret, name, value).decode()


def _is_shown(headers: Mapping[str, str]) -> bool:
    """Whether a browser shows the answer in a window of its own, as far as it says."""
    mode, place = headers.get("Sec-Fetch-Mode"), headers.get("Sec-Fetch-Dest")
    return mode in (None, "navigate") and place in (None, "document")


def _cookie(headers: Mapping[str, str], name: str) -> str:
    return httputil.parse_cookie(headers.get("Cookie", "")).get(name, "")


def _derived(key: str, purpose: str) -> str:
    return hmac.new(key.encode(), purpose.encode(), hashlib.sha256).hexdigest()


class HubVisitors:
    """Browsers at the service's pages: sent to the hub to log in, and back.

    ``rules`` are the routes of that, for Tornado.
    """

    def __init__(self, api: HubApi, cookies: HubCookies, owners: TokenOwners, edge: Edge) -> None:
        self.api, self.cookies, self.owners, self.edge = api, cookies, owners, edge

    def rules(self) -> list[Any]:
        base, parts = re.escape(self.api.place.prefix), {"visitors": self}
        return [
            (f"{base}/{LOGIN}", LoginHandler, parts),
            (f"{base}/{CALLBACK}", CallbackHandler, parts),
            (f"{base}/{LOGOUT}", LogoutHandler, parts),
        ]

    def welcome(self, exchange: Exchange, headers: Mapping[str, str]) -> None:
        """A page is about to be sent: its requests can prove where they come from, and pages of
        other users' servers, which may have the same origin, reach into none of its windows."""
        exchange.has_login = True
        exchange.framed_by = "'none'"
        exchange.set_header("X-Frame-Options", "DENY")
        exchange.set_header("Cross-Origin-Opener-Policy", "noopener-allow-popups")
        token = self.cookies.token(headers)
        if token:
            exchange.proof = self.cookies.xsrf(token)

    def turn_away(self, exchange: Exchange) -> None:
        """Send a browser that nobody has logged in with to the hub."""
        query = f"?{exchange.query_string}" if exchange.query_string else ""
        wanted = f"{self.api.place.prefix}{exchange.path}{query}"
        where = f"{self.api.place.prefix}/{LOGIN}?next={quote(wanted)}"
        exchange.send_bytes(b"", 302, {"Location": where, "Cache-Control": "no-store"})


@web.stream_request_body  # which nobody has asked for: it is discarded as it comes
class VisitorHandler(web.RequestHandler, ABC):
    """What the three handlers of a login share."""

    def initialize(self, visitors: HubVisitors) -> None:
        self._visitors, self._api, self._cookies = visitors, visitors.api, visitors.cookies

    def prepare(self) -> None:
        if self.request.method != "GET":
            message = f"{self.request.method} is not allowed here: browsers come with GET."
            allowed = {"Allow": "GET"}
            self._refuse(ApiError(405, message, code="method_not_allowed", headers=allowed))
        elif has_body(self.request.headers):
            self._refuse(ApiError(400, "A login has no body.", code="invalid_request"))

    async def get(self) -> None:
        try:
            await self._answer()
        except (ApiError, web.HTTPError) as error:
            self._refuse(api_error(error))

    def _refuse(self, error: ApiError) -> None:
        discard_body(self)
        Exchange(self, self.request.path).send_error(error)

    def data_received(self, chunk: bytes) -> None:
        """Nobody wants it."""

    def write_error(self, status_code: int, **kwargs: object) -> None:
        kind = "server_error" if status_code >= 500 else "invalid_request_error"
        self._refuse(ApiError(status_code, self._reason, kind))

    @abstractmethod
    async def _answer(self) -> None:
        """What this address is for."""

    def _put(self, name: str, value: str, max_age: float, *, http_only: bool = True) -> None:
        secure = get_browser_protocol(self.request) == "https"
        self.set_cookie(
            name,
            value,
            path=self._cookies.path,
            max_age=round(max_age),
            httponly=http_only,
            secure=secure,
            samesite="Lax",
        )

    def _drop(self, name: str) -> None:
        self.clear_cookie(name, path=self._cookies.path)

    def set_default_headers(self) -> None:
        self.set_header("Server", "llmkit")
        self.set_header("Cache-Control", "no-store")
        for name, value in SECURITY_HEADERS.items():
            self.set_header(name, value)


class LoginHandler(VisitorHandler):
    """Sends a browser to the hub, and notes where it wants to go."""

    async def _answer(self) -> None:
        oauth = self._api.oauth
        state, wanted = secrets.token_urlsafe(16), self.get_query_argument("next", "")
        noted = {"state": state, "next": wanted if self._is_ours(wanted) else self._cookies.path}
        asked = {"state": state}
        if getattr(oauth, "pkce_enabled", False):  # jupyterhub 6
            verifier, challenge, method = oauth.generate_pkce_code_challenge()
            noted["verifier"] = verifier
            asked |= {"code_challenge": challenge, "code_challenge_method": method}
        name = state_cookie(self._cookies, state)
        self._put(name, self._cookies.signed(name, json.dumps(noted)), STATE_S)
        self.redirect(httputil.url_concat(oauth.login_url, asked))

    def _is_ours(self, path: str) -> bool:
        return (
            path.startswith(self._cookies.path)
            and not path.startswith("//")
            and (all("!" <= c <= "~" and c != "\\" for c in path))
        )


class CallbackHandler(VisitorHandler):
    """Takes the browser back that the hub has let in."""

    async def _answer(self) -> None:
        if self.get_query_argument("error", ""):
            said = self.get_query_argument("error_description", "") or "no reason given"
            raise ApiError(403, f"The hub refused the login: {said:.300}.", "permission_error")
        state, headers = self.get_query_argument("state", ""), self.request.headers
        name = state_cookie(self._cookies, state)
        noted = self._cookies.unsigned(headers, name, STATE_S / 86_400)
        try:
            known = json.loads(noted)
        except ValueError:
            known = {}
        if not state or not compare_digest(str(known.get("state", "")).encode(), state.encode()):
            raise _stale()
        self._drop(name)
        address = self._visitors.edge.proxies.client(str(self.request.remote_ip), headers)
        token = await self._api.token(self.get_query_argument("code", ""), known.get("verifier"))
        session = self._cookies.session(headers)
        if await self._visitors.owners.owner(token, session, address) is None:
            raise _stale()
        self._put(
            self._cookies.name,
            self._cookies.signed(self._cookies.name, token),
            LOGIN_DAYS * 86_400,
        )
        self.redirect(known["next"])


class LogoutHandler(VisitorHandler):
    """Forgets the login here, and goes on to the hub's own logout, which ends its token."""

    async def _answer(self) -> None:
        self._drop(self._cookies.name)
        oauth = self._api.oauth
        self.redirect(f"{oauth.hub_host}{oauth.hub_prefix}logout")


def state_cookie(cookies: HubCookies, state: str) -> str:
    """One for each login that is under way in a browser."""
    digest = hashlib.sha256(state.encode()).hexdigest()
    return f"{cookies.state_name}-{digest[:8]}"


def _stale() -> ApiError:
    return ApiError(
        403,
        "This login is over, or was begun elsewhere: go to the service's page and log in again.",
        "permission_error",
        code="stale_login",
    )
