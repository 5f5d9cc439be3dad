"""The identity of a caller. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["LOCAL", "Identity"]


@dataclass(frozen=True, slots=True)
class Identity:
    """A caller. Everything per caller is keyed by it, never by address.

    These are fairness, limits, quotas, stored objects, cached prefixes, status, logs. ``kind`` says
    what vouches for the ``name``: only the machine (``local``), a ``key``, a ``user`` of Jupyter or
    a hub, or a ``service``. ``groups`` and ``scopes`` are its memberships and permissions.
    ``cache_scope`` names the cached prefixes that it shares; None means its own.

    >>> Identity("ann", "user", groups=frozenset({"students"})).name
    'ann'
    """

    name: str
    kind: Literal["local", "key", "user", "service"] = "local"
    groups: frozenset[str] = frozenset()
    scopes: frozenset[str] = frozenset()
    cache_scope: str | None = None


LOCAL = Identity("local")  # anyone on this machine, without a key
