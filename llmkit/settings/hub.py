"""The options of a gateway that is a JupyterHub's service. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass

from llmkit.settings import table
from llmkit.settings.table import Option, option

__all__ = ["CACHE_SCOPES", "HUB_OPTIONS", "HubOptions"]

HUB = "JupyterHub"
CACHE_SCOPES = ("user", "group", "hub")


@dataclass(frozen=True, slots=True, kw_only=True)
class HubOptions:
    """What `llmkit hub` runs with, beside what `llmkit serve` has.

    Raises `InvalidRequestError` naming the option.
    """

    hub_cache_s: float = option(
        "number", 60.0, "How long the hub's answer about a token counts; a revoked one is refused "
        "after that.", HUB, low=1.0, high=3600.0, unit="s", live=True,
    )  # fmt: skip
    hub_proxies: tuple[str, ...] = option(
        "networks", (), "Where the hub's own proxy connects from: addresses or networks; by "
        "default 127.0.0.1, ::1 and the host of $JUPYTERHUB_API_URL.", HUB,
    )  # fmt: skip
    cache_scope: str = option(
        "choice", "user", "With whom a hub's user shares cached prompts: nobody, a group of its "
        "own, or everybody.", HUB, choices=CACHE_SCOPES, live=True,
    )  # fmt: skip

    def __post_init__(self) -> None:
        table.check(self)


HUB_OPTIONS: dict[str, Option] = table.table(HubOptions)
