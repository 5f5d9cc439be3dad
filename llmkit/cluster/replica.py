"""What a router knows of replicas, and of the requests that it has sent to them. Pure."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

from llmkit.cluster.prefixes import PrefixChain

__all__ = ["Figures", "Replica", "Ticket"]


@dataclass(frozen=True, slots=True)
class Figures:
    """What a replica said of itself: seconds for a token of a prompt and for a step (0: not
    measured yet), requests at once, ``prefixes`` it keeps, and requests it ``has``, running or
    waiting."""

    prompt_token_s: float = 0.0
    step_s: float = 0.0
    slots: int = 1
    prefixes: int = 1
    has: int = 0


@dataclass(slots=True, eq=False)
class Replica:
    """One of a router's."""

    name: str
    figures: Figures = field(default_factory=Figures)
    place: int = -1  # among those that take requests; -1: it takes none
    own: int = 0  # requests of ours that it has
    since: int = 0  # of them, those begun less those ended since its last report
    pending: float = 0.0  # tokens of our prompts that it has yet to compute
    # What it holds: chains by their last mark, the least recently used first, and how many of them
    # each block is in.
    prefixes: OrderedDict[int, tuple[int, ...]] = field(default_factory=OrderedDict)
    held: dict[int, int] = field(default_factory=dict)

    @property
    def load(self) -> int:
        return max(self.own, self.figures.has + self.since, 0)


@dataclass(slots=True, eq=False)
class Ticket:
    """A request on its way to ``replica``.

    ``depth`` blocks of its chain were expected there, ``work`` are the tokens that were not.
    """

    replica: str
    chain: PrefixChain
    depth: int
    work: float
    _of: Replica
    _is_guess: bool = False  # sent home, where the turn before may have been
    _noted: bool = False  # the index had not known of it there
    _instead_of: tuple[tuple[int, ...], ...] = ()  # what the index held in its place
    _pending: bool = True
    _ended: bool = False

    @property
    def is_pending(self) -> bool:
        """Whether its first token is awaited."""
        return self._pending
