"""Prompts that engines died of, refused for a while. Pure; not thread-safe."""

from __future__ import annotations

from collections import OrderedDict

__all__ = ["QUARANTINE_S", "Quarantine"]

QUARANTINE_S, MAX_PROMPTS = 60.0, 10_000


class Quarantine:
    """Prompts by the hash of all their text, and until when they are refused. It outlives a pool
    that has lost all replicas to one of them."""

    def __init__(self) -> None:
        self._until: OrderedDict[int, float] = OrderedDict()

    def add(self, prompt: int, now: float) -> None:
        """Refuse this prompt for a minute."""
        self._until[prompt] = now + QUARANTINE_S
        self._until.move_to_end(prompt)
        while len(self._until) > MAX_PROMPTS:
            self._until.popitem(last=False)

    def left(self, prompt: int, now: float) -> float:
        """Seconds for which this prompt is refused; 0 if it is not."""
        return max(0.0, self._until.get(prompt, now) - now)

    def is_empty(self, now: float) -> bool:
        """Whether it refuses nothing. Forgets what is over."""
        while self._until and next(iter(self._until.values())) <= now:
            self._until.popitem(last=False)
        return not self._until
