"""Authenticates callers of a JupyterHub's service: users and services, by the hub's tokens.

Tornado loop only. Knows nothing of how a hub is asked, nor of logins: `Asks` and `Cookies` do.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
import re
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from llmkit.gateway.access.authenticator import ANONYMOUS, Facts, is_open
from llmkit.gateway.access.identity import ADMIN, INFERENCE, Allowance, Identity
from llmkit.gateway.access.throttle import Throttle
from llmkit.gateway.failures import ApiError
from llmkit.settings.hub import HubOptions
from llmkit.settings.quotas import Quotas

__all__ = ["ADMIN_SCOPE", "Asks", "Cookies", "HubGoneError", "HubUsers", "Owner", "TokenOwners"]

logger = logging.getLogger("llmkit.gateway")

ADMIN_SCOPE = "custom:llmkit:admin"
MAX_KNOWN, MAX_UNKNOWN, MAX_AT_ONCE = 10_000, 1_000, 16
MAX_TOKEN = 1000
BRIDGED_S = 300.0  # how long those who are known go on while the hub does not answer
PAUSE_S = 2.0  # between two questions to a hub that does not answer
SCHEME = re.compile(r"(?:token|bearer)\s+(\S+)\s*", re.IGNORECASE)


class HubGoneError(Exception):
    """The hub does not answer."""


@dataclass(frozen=True, slots=True)
class Owner:
    """Whose a token is, and what it may: its scopes are those of the token."""

    name: str
    kind: str
    groups: frozenset[str]
    scopes: frozenset[str]

    @classmethod
    def of(cls, model: Mapping[str, Any]) -> Owner:
        """As a hub says it."""
        kind = "service" if model.get("kind") == "service" else "user"
        groups, scopes = model.get("groups") or (), model.get("scopes") or ()
        return cls(str(model["name"]), kind, frozenset(groups), frozenset(scopes))


class Asks(Protocol):
    """Asks a hub whose a token is."""

    async def owner(self, token: str) -> Owner | None:
        """None for a token that is no token, or no longer. Raises `HubGoneError`."""
        ...


class Cookies(Protocol):
    """Those who have logged in with a browser."""

    def token(self, headers: Mapping[str, str]) -> str:
        """The token in a browser's cookie; empty if there is none."""
        ...

    def session(self, headers: Mapping[str, str]) -> str:
        """The login that a browser has at the hub; another one after it has logged out."""
        ...

    def check(self, facts: Facts, token: str) -> None:
        """That a page of ours sent the request, if a cookie alone vouches. Raises `ApiError`."""
        ...


@dataclass(slots=True)
class _Known:
    owner: Owner
    asked_at: float


class TokenOwners:
    """What the hub has said about tokens, for ``cache_s`` seconds, of the last 10,000.

    While the hub does not answer, what it said within five minutes counts. Who tries tokens is
    slowed down by address; those that were good before are not.
    """

    def __init__(
        self,
        asks: Asks,
        cache_s: float,
        *,
        now: Callable[[], float] = time.monotonic,
        throttle: Throttle | None = None,
        most: int = MAX_KNOWN,
    ) -> None:
        self.cache_s = cache_s
        self._asks, self._now, self._most = asks, now, most
        self.throttle = throttle or Throttle()
        self._known: OrderedDict[str, _Known] = OrderedDict()
        self._unknown: OrderedDict[str, float] = OrderedDict()
        self._asking: dict[str, asyncio.Task[Owner | None]] = {}
        self._at_once = asyncio.Semaphore(MAX_AT_ONCE)
        self._gone_until = -math.inf

    async def owner(self, token: str, session: str, address: str) -> Owner | None:
        """None for a token that the hub does not know. Raises `ApiError`: 503, or 429."""
        key = hashlib.sha256(f"{session}\n{token}".encode()).hexdigest()
        now, known = self._now(), self._known.get(key)
        if known is not None:
            self._known.move_to_end(key)
            if now - known.asked_at < self.cache_s:
                return known.owner
        elif now - self._unknown.get(key, -math.inf) < self.cache_s:
            return None
        elif key not in self._asking:
            wait_s = self.throttle.wait_s(address)
            if wait_s:
                raise _throttled(wait_s)
        try:
            owner = await self._ask(key, token)
        except HubGoneError as error:
            if known is not None and now - known.asked_at < max(self.cache_s, BRIDGED_S):
                return known.owner
            raise _hub_gone(error) from None
        if owner is None and known is None:
            self.throttle.note(address)
        return owner

    async def _ask(self, key: str, token: str) -> Owner | None:
        """Once for all who wait for the same answer."""
        if self._now() < self._gone_until:
            raise HubGoneError("the hub does not answer")
        task = self._asking.get(key)
        if task is None:
            task = self._asking[key] = asyncio.create_task(self._asked(key, token))
            task.add_done_callback(lambda _: self._asking.pop(key, None))
        return await asyncio.shield(task)

    async def _asked(self, key: str, token: str) -> Owner | None:
        began = self._now()
        try:
            async with self._at_once:
                owner = await self._asks.owner(token)
        except HubGoneError:
            self._gone_until = self._now() + PAUSE_S
            raise
        if owner is None:
            self._known.pop(key, None)
            _keep(self._unknown, key, began, MAX_UNKNOWN)
        else:
            self._unknown.pop(key, None)
            _keep(self._known, key, _Known(owner, began), self._most)
        return owner


def _keep(kept: OrderedDict[str, Any], key: str, value: Any, most: int) -> None:
    kept[key] = value
    kept.move_to_end(key)
    while len(kept) > most:
        kept.popitem(last=False)


class HubUsers:
    """The callers of the service that needs ``scope``, with what ``quotas`` allow them."""

    def __init__(
        self,
        owners: TokenOwners,
        cookies: Cookies,
        scope: str,
        options: HubOptions,
        quotas: Quotas,
    ) -> None:
        self._owners, self._cookies = owners, cookies
        self._scope = scope
        self._enough = {scope, scope.partition("!")[0]}
        self.apply(options, quotas)

    def apply(self, options: HubOptions, quotas: Quotas) -> None:
        """Other options and quotas from now on."""
        self._owners.cache_s = options.hub_cache_s
        self._cache_scope, self._quotas = options.cache_scope, quotas

    async def identify(self, facts: Facts) -> Identity:
        """The caller. Raises `ApiError`."""
        token, session = given_token(facts.headers), ""
        if is_open(facts.path):
            return await self._known_or_not(token, facts.address)
        if not token:
            token = self._cookies.token(facts.headers)
            if not token:
                raise _refusal(
                    "No token: send one of the hub's as `Authorization: Bearer TOKEN`. Its page "
                    "for tokens makes them; in a notebook it is $JUPYTERHUB_API_TOKEN."
                )
            self._cookies.check(facts, token)
            session = self._cookies.session(facts.headers)
        return await self._caller(token, session, facts.address)

    async def _known_or_not(self, token: str, address: str) -> Identity:
        """Who asks for what is open to strangers."""
        try:
            return await self._caller(token, "", address) if token else ANONYMOUS
        except ApiError:
            return ANONYMOUS

    async def _caller(self, token: str, session: str, address: str) -> Identity:
        if len(token) > MAX_TOKEN or not (token.isascii() and token.isprintable()):
            raise _refusal("This is no token of the hub.")
        owner = await self._owners.owner(token, session, address)
        if owner is None:
            raise _refusal("The hub does not know this token: it is wrong, revoked or expired.")
        if not self._enough & owner.scopes:
            raise self._lacking(owner)
        return self._identity(owner)

    def _identity(self, owner: Owner) -> Identity:
        quota = self._quotas.of_groups(owner.groups)
        rate = quota.requests_per_minute
        allowance = Allowance(
            rate=None if rate is None else f"{rate}/minute",
            concurrent=quota.concurrent,
            tokens_in_24h=quota.tokens_per_day,
        )
        is_admin = ADMIN_SCOPE in owner.scopes
        return Identity(
            f"hub {owner.kind} {owner.name}",
            "service" if owner.kind == "service" else "user",
            owner.groups,
            frozenset({INFERENCE, ADMIN} if is_admin else {INFERENCE}),
            self._shared(owner),
            allowance,
        )

    def _shared(self, owner: Owner) -> str | None:
        """Whose cached prompts the caller shares; of several groups the first by name."""
        if self._cache_scope == "hub":
            return "hub"
        if self._cache_scope == "group" and owner.groups:
            return f"hub group {min(owner.groups)}"
        return None

    def _lacking(self, owner: Owner) -> ApiError:
        return ApiError(
            403,
            f"This token of the hub's {owner.kind} {owner.name!r:.100} lacks the scope "
            f"{self._scope}. The hub's admin grants it: in a role of the {owner.kind} "
            "(c.JupyterHub.load_roles), and for notebooks in c.Spawner.server_token_scopes too; a "
            "notebook server that runs already has to be restarted for it.",
            "permission_error",
            code="insufficient_scope",
        )


def given_token(headers: Mapping[str, str]) -> str:
    """The token sent with a request, in any of the usual ways; empty if there is none."""
    match = SCHEME.fullmatch(headers.get("Authorization", ""))
    return match[1] if match else headers.get("x-api-key", "").strip()


def _refusal(message: str) -> ApiError:
    return ApiError(
        401,
        message,
        "authentication_error",
        code="invalid_api_key",
        headers={"WWW-Authenticate": "Bearer"},
    )


def _throttled(wait_s: float) -> ApiError:
    return ApiError(
        429,
        "Too many wrong tokens came from this address; try again later.",
        "rate_limit_error",
        code="too_many_attempts",
        headers={"Retry-After": str(math.ceil(wait_s))},
    )


def _hub_gone(error: HubGoneError) -> ApiError:
    logger.warning("whose a token is cannot be found out: %s", error)
    return ApiError(
        503,
        "The hub does not answer, so whose this token is cannot be found out; try again soon.",
        "server_error",
        code="hub_unavailable",
        headers={"Retry-After": "5"},
    )
