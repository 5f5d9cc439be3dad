"""Which request an engine died of. Pure; its pool locks.

An engine that ends takes down whatever runs beside the guilty request, so one death proves little.
Whoever has survived one is placed apart from others who have, and so the guilty one ends alone.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass

__all__ = ["MAX_DEATHS", "Suspect", "blame"]

MAX_DEATHS = 2  # of engines, under one prompt


@dataclass(slots=True, eq=False)
class Suspect:
    """A request, by its ``prompt``, and how many engines ended while they computed it."""

    prompt: Hashable
    deaths: int = 0
    is_guilty: bool = False

    @property
    def goes_apart(self) -> bool:
        """Whether it may only be computed where no other such request is."""
        return self.deaths >= MAX_DEATHS


def blame(running: Iterable[Suspect]) -> list[Suspect]:
    """An engine has ended while it computed these: whose fault it was, if that is clear.

    >>> poison, beside = Suspect("poison"), Suspect("beside")
    >>> blame([poison, beside]), blame([poison, beside]), blame([poison]) == [poison]
    ([], [], True)
    """
    there = list(dict.fromkeys(running))
    for each in there:
        each.deaths += 1
    most = max((each.deaths for each in there), default=0)
    worst = [each for each in there if each.deaths == most]
    if most < MAX_DEATHS or len({each.prompt for each in worst}) > 1:
        return []
    for each in worst:
        each.is_guilty = True
    return worst
