"""Puts the access of a hub's service together, from the hub's place and the settings.

Tornado loop only; imported only where there is a hub.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable, Sequence
from urllib.parse import urlsplit

from llmkit.gateway.access.edge import Edge
from llmkit.gateway.access.hub import HubUsers
from llmkit.gateway.access.hub_login import HubApi, HubCookies, HubVisitors
from llmkit.gateway.access.hub_tokens import HubGoneError, NoHubError, TokenOwners
from llmkit.gateway.access.proxies import LOOPBACK, MAX_HOPS, Proxies
from llmkit.settings.hub import HubOptions
from llmkit.settings.hub_place import HubPlace
from llmkit.settings.quotas import Quotas

__all__ = ["HubAccess", "HubProxies"]

logger = logging.getLogger("llmkit.gateway")

LOOK_UP_S = 60.0


class HubAccess:
    """``users`` authenticates, ``visitors`` are browsers at its pages."""

    def __init__(self, place: HubPlace, options: HubOptions, quotas: Quotas, edge: Edge) -> None:
        self._api = api = HubApi(place)
        cookies = HubCookies(api.oauth, place.prefix)
        owners = TokenOwners(api, options.hub_cache_s)
        self.users = HubUsers(owners, cookies, place.scope, options, quotas)
        self.visitors = HubVisitors(api, cookies, owners, edge)

    async def check(self) -> None:
        """Say in the log what is wrong with the service's own token, or that the hub is away."""
        place = self._api.place
        try:
            owner = await self._api.owner(place.token)
        except NoHubError as error:
            logger.error("%s. It ends in /hub/api, at the hub's own address.", error)
            return
        except HubGoneError as error:
            logger.warning("the hub at %s does not answer yet: %s", place.api_url, error)
            return
        if owner is None:
            logger.error(
                "the hub at %s does not know this service's token: compare $JUPYTERHUB_API_TOKEN "
                "with the api_token of the service %r in the hub's configuration. Nobody can log "
                "in with a browser until then.",
                place.api_url,
                place.name,
            )
        elif owner.kind != "service" or owner.name != place.name:
            logger.warning(
                "the hub calls the owner of $JUPYTERHUB_API_TOKEN the %s %r, and this service %r",
                owner.kind,
                owner.name,
                place.name,
            )


class HubProxies(Proxies):
    """The hub's own proxy, through which all requests come: only the address that it notes itself
    is believed, since its clients may be in the same networks. With ``trusted`` proxies, those.
    """

    def __init__(self, place: HubPlace, options: HubOptions, trusted: Sequence[str] = ()) -> None:
        self._url = None if trusted or options.hub_proxies else place.api_url
        named = trusted or options.hub_proxies or (*LOOPBACK, *_addresses_of(place.api_url))
        super().__init__(
            named,
            hops=MAX_HOPS if trusted else 1,
            on_stranger=_once("trusted_proxies" if trusted else "hub_proxies"),
        )

    async def keep(self) -> None:
        """Look the hub's address up again each minute, until cancelled: a hub that is started anew
        may have another. While none is found, the last one counts."""
        while self._url is not None:
            await asyncio.sleep(LOOK_UP_S)
            found = await asyncio.to_thread(_addresses_of, self._url)
            if found:
                self.replace((*LOOPBACK, *found))


def _addresses_of(url: str) -> list[str]:
    """Of the host of a URL; none if they cannot be found now."""
    with contextlib.suppress(OSError, UnicodeError):
        found = socket.getaddrinfo(urlsplit(url).hostname, None, type=socket.SOCK_STREAM)
        return list(dict.fromkeys(str(address[0]).partition("%")[0] for *_, address in found))
    return []


def _once(setting: str) -> Callable[[str], None]:
    """Says of the first proxy that is not known that ``setting`` does not name it."""
    said: list[str] = []

    def say(address: str) -> None:
        if not said:
            said.append(address)
            logger.warning(
                "%s sends a proxy's headers but is not among %s: all who come through it count as "
                "one address",
                address,
                setting,
            )

    return say
