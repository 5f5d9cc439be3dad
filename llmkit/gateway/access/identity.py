"""The identity of a caller, and what it may do. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from llmkit.gateway.access.proxies import place

__all__ = ["ADMIN", "INFERENCE", "LOCAL", "SCOPES", "Allowance", "Identity", "counted_as"]

INFERENCE, ADMIN = "inference", "admin"
SCOPES = (INFERENCE, ADMIN)


@dataclass(frozen=True, slots=True)
class Allowance:
    """How much a caller may use. None means without a limit.

    ``models`` are globs of model names, ``rate`` is "60/minute", ``concurrent`` counts requests at
    once, ``weight`` is the share of a busy engine. Budgets count tokens of prompts and answers, of
    a day or month (UTC) or in any 24 hours.
    """

    models: tuple[str, ...] = ("*",)
    rate: str | None = None
    concurrent: int | None = None
    tokens_per_day: int | None = None
    tokens_per_month: int | None = None
    weight: float = 1.0
    tokens_in_24h: int | None = None


@dataclass(frozen=True, slots=True)
class Identity:
    """A caller. Everything per caller is keyed by it.

    These are fairness, limits, quotas, stored objects, cached prefixes, status, logs. ``kind`` says
    what vouches for the ``name``: only the machine (``local``), a ``key``, a ``user`` of Jupyter or
    a hub, or a ``service``. ``groups`` and ``scopes`` are its memberships and permissions.
    ``cache_scope`` names the cached prefixes that it shares; None means its own. Callers without a
    key are one identity; its rate, requests at once, places in the queue and held bytes are counted
    for each address, see `counted_as`.

    >>> Identity("ann", "user", groups=frozenset({"students"})).name
    'ann'
    """

    name: str
    kind: Literal["local", "key", "user", "service"] = "local"
    groups: frozenset[str] = frozenset()
    scopes: frozenset[str] = frozenset({INFERENCE})
    cache_scope: str | None = None
    allowance: Allowance = Allowance()


LOCAL = Identity("local")  # anyone on this machine, without a key


def counted_as(identity: Identity, address: str) -> str:
    """Whose limits count: the identity's; without a key, the address's.

    >>> counted_as(LOCAL, "203.0.113.9"), counted_as(Identity("key ann", "key"), "203.0.113.9")
    ('address 203.0.113.9', 'key ann')
    """
    return identity.name if identity.kind != "local" else f"address {place(address)}"
