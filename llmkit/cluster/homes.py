"""Where prompts and conversations belong, as all gateways find it without talking. Pure.

A ring of hashes gives every replica its share, and moves few when replicas come and go. Not
thread-safe.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from hashlib import blake2b

from llmkit.cluster.prefixes import PrefixChain

__all__ = ["Homes"]

POINTS = 16  # of each replica on the ring
MAX_WALK = 4 * POINTS  # past replicas that take nothing
FIRST_SEEN, MAX_SEEN = 50, 4000  # requests until shares are believed, and until they are halved
LEAST_SEEN = 0.3
MANY_TURNS = 32  # of one conversation, among those that are counted
PHI, MASK = 0x9E3779B97F4A7C15, (1 << 64) - 1


class Homes:
    """The replicas by their names, and how common beginnings are.

    >>> homes = Homes()
    >>> for name in "abc": homes.add(name, name)
    >>> next(homes.near(7)) in "abc", len(set(homes.near(7)))
    (True, 3)
    """

    def __init__(self) -> None:
        self._ring: list[tuple[int, str]] = []
        self._seen: dict[int, float] = {}
        self._num_seen = 0.0

    def add(self, name: str, home: str) -> None:
        """Gateways that give a replica the same ``home`` choose alike."""
        for i in range(POINTS):
            digest = blake2b(f"{home}\0{i}".encode(), digest_size=8).digest()
            insort(self._ring, (int.from_bytes(digest), name))

    def remove(self, name: str) -> None:
        self._ring = [point for point in self._ring if point[1] != name]

    def near(self, point: int) -> Iterator[str]:
        """The replicas that follow on the ring, the nearest first; some come several times."""
        ring = self._ring
        start = bisect_left(ring, (point, ""))
        for i in range(min(len(ring), MAX_WALK)):
            yield ring[(start + i) % len(ring)][1]

    def of(self, chain: PrefixChain, replicas: int) -> tuple[int, bool] | None:
        """The point where a conversation belongs, and whether all that begin as it does belong
        there; None for what is no conversation, or is too common to be one.

        A beginning that needs several replicas has so many homes (a power of two, on which
        gateways agree though they count for themselves), and its conversations share them out.
        """
        if not chain.opening:
            return None
        _, share = self._note(chain.marks[0])
        turns, share_of_opening = self._note(chain.opening)
        if turns > MANY_TURNS and share_of_opening * replicas > 1:
            return None
        homes = 1
        while homes < share * replicas:
            homes *= 2
        # The next power of two has the same homes, and as many more.
        return (chain.marks[0] + chain.opening % homes * PHI) * PHI & MASK, homes == 1

    def _note(self, beginning: int) -> tuple[float, float]:
        """How many requests begin so, and their share of all; this is one."""
        seen = self._seen
        count = seen[beginning] = seen.get(beginning, 0.0) + 1.0
        self._num_seen += 0.5  # each request notes two
        if self._num_seen > MAX_SEEN:
            self._num_seen /= 2
            self._seen = {b: n / 2 for b, n in seen.items() if n >= 2 * LEAST_SEEN}
        return count, count / self._num_seen if self._num_seen > FIRST_SEEN else 0.0
