"""The replicas of a pool, and a request's stay at one of them. Under the lock of the pool."""

from __future__ import annotations

from dataclasses import dataclass, field

from llmkit.bridge import wire
from llmkit.bridge.client import BridgeClient
from llmkit.cluster.blame import Suspect
from llmkit.cluster.breaker import Breaker
from llmkit.cluster.routing import Figures, Ticket
from llmkit.errors import DrainingError, EngineGoneError, ModelUnloadedError
from llmkit.protocol import EngineStats
from llmkit.protocol.client import EngineClient
from llmkit.protocol.stream import Stream

__all__ = ["LOSSES", "Leg", "Member", "home_of"]

# What says that another replica may do it; the first that nothing was begun here.
LOSSES = (DrainingError, EngineGoneError, ModelUnloadedError)


@dataclass(slots=True, eq=False)
class Member:
    """A replica; ``drained``: it said that it would end; ``away``: it takes nothing any more."""

    name: str
    client: EngineClient
    stats: EngineStats
    drained: bool = False
    away: bool = False
    parted: bool = False  # it was left out of the pool
    is_mourned: bool = False  # its end was held against what it computed
    breaker: Breaker = field(default_factory=Breaker)
    legs: dict[Leg, None] = field(default_factory=dict)

    @property
    def num_requests(self) -> int:
        """How many requests of this pool it has: exact, while its own reports come now and then."""
        return len(self.legs)

    @property
    def resumes(self) -> bool:
        """Whether it can go on with an answer that another began."""
        client = self.client
        return not isinstance(client, BridgeClient) or client.version >= wire.RESUMES

    @property
    def figures(self) -> Figures:
        """What the router wants to know of it."""
        stats = self.stats
        slots = max(1, stats.num_slots)
        return Figures(
            stats.prompt_token_s,
            stats.decode_step_s,
            slots,
            slots + stats.num_parked,
            stats.num_running + stats.num_waiting,
        )


@dataclass(slots=True, eq=False)
class Leg:
    """A request at one replica; ``stream`` is None until it is there.

    ``is_judged``: what becomes of it says whether the replica works.
    """

    member: Member
    ticket: Ticket
    suspect: Suspect
    is_judged: bool = True
    stream: Stream | None = None

    @property
    def client(self) -> EngineClient:
        return self.member.client


def home_of(client: EngineClient) -> str:
    """What all gateways call a replica."""
    origin = client.origin
    return f"{origin.host} {origin.url} {origin.label}"
