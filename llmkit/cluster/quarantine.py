"""Prompts that engines died of, refused for a while. Pure; not thread-safe."""

from __future__ import annotations

from collections import OrderedDict

from llmkit.cluster.prefixes import PrefixChain

__all__ = ["QUARANTINE_S", "Quarantine"]

QUARANTINE_S, MAX_PROMPTS = 60.0, 10_000


class Quarantine:
    """Prompts by the hash of all their text, and until when they are refused. It outlives a pool
    that has lost all replicas to one of them."""

    def __init__(self) -> None:
        self._until: OrderedDict[int, float] = OrderedDict()

    def add(self, chain: PrefixChain, now: float) -> None:
        """Refuse this prompt for a minute."""
        self._until[chain.whole] = now + QUARANTINE_S
        self._until.move_to_end(chain.whole)
        while len(self._until) > MAX_PROMPTS:
            self._until.popitem(last=False)

    def left(self, chain: PrefixChain, now: float) -> float:
        """Seconds for which this prompt is refused; 0 if it is not."""
        until = self._until.get(chain.whole)
        if until is None:
            return 0.0
        if until <= now:
            del self._until[chain.whole]
            return 0.0
        return until - now
