"""Authenticates callers of a JupyterHub's service: users and services, by the hub's tokens.

Tornado loop only. Knows nothing of how a hub is asked, nor of logins: `TokenOwners` and `Cookies`
do.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from llmkit.gateway.access.authenticator import ANONYMOUS, Facts, given_key, is_open
from llmkit.gateway.access.hub_tokens import Owner, TokenOwners
from llmkit.gateway.access.identity import ADMIN, INFERENCE, Allowance, Identity
from llmkit.gateway.failures import ApiError
from llmkit.settings.hub import HubOptions
from llmkit.settings.quotas import Quotas

__all__ = ["ADMIN_SCOPE", "Cookies", "HubUsers"]

ADMIN_SCOPE = "custom:llmkit:admin"
MAX_TOKEN = 1000
SCHEMES = ("bearer", "token")


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
        token, session = given_key(facts.headers, SCHEMES), ""
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


def _refusal(message: str) -> ApiError:
    return ApiError(
        401,
        message,
        "authentication_error",
        code="invalid_api_key",
        headers={"WWW-Authenticate": "Bearer"},
    )
