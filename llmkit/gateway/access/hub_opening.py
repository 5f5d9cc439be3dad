"""Puts the access of a hub's service together, from the hub's place and the settings.

Tornado loop only; imported only where there is a hub.
"""

from __future__ import annotations

import logging

from llmkit.gateway.access.edge import Edge
from llmkit.gateway.access.hub import HubUsers
from llmkit.gateway.access.hub_login import HubApi, HubCookies, HubVisitors
from llmkit.gateway.access.hub_tokens import HubGoneError, NoHubError, TokenOwners
from llmkit.settings.hub import HubOptions
from llmkit.settings.hub_place import HubPlace
from llmkit.settings.quotas import Quotas

__all__ = ["HubAccess"]

logger = logging.getLogger("llmkit.gateway")


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
