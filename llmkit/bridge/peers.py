"""The state that a bridge server keeps for each client. Bridge thread only; sends nothing."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, field

from llmkit.protocol.stream import Stream

__all__ = ["Peer", "Preparation"]


@dataclass(slots=True)
class Preparation:
    """A request on its way to the engine: the ids of its answers, minus the aborted ones.

    ``future`` is its work on a lane.
    """

    ids: set[str]
    future: Future[None] | None = None


@dataclass(slots=True, eq=False)
class Peer:
    """A connected client and its requests."""

    identity: bytes
    last_seen: float
    # Its process (pid, start time); while that is alive, silence means nothing.
    owner: tuple[int, float] | None = None
    stopped_since: float | None = None
    streams: dict[str, Stream] = field(default_factory=dict)
    preparing: dict[str, Preparation] = field(default_factory=dict)  # by answer id
    asking: dict[str, Preparation] = field(default_factory=dict)  # for vectors or by inquiry
    weighs: bool = False  # its requests may have more than the usual weight
    num_preparing: dict[str, int] = field(default_factory=dict)  # by caller

    @property
    def num_requests(self) -> int:
        """How many of its requests are read, run or are being answered."""
        return len(self.streams) + len(self.preparing) + len(self.asking)
