"""The least fixed point of what needs what: which rules of a grammar, or which schemas, have a finite text. Pure, and linear in what is read."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence

__all__ = ["least_fixed_point"]

Needs = Iterator[Sequence[Hashable]]


def least_fixed_point(needs: dict[Hashable, Needs]) -> set[Hashable]:
    """The keys all of whose needs are met. A need is met when any of its keys is in the result; an empty one never is.

    Each iterator goes on only when what it waits for is known, and never begins again.

    >>> sorted(least_fixed_point({"a": iter([("b", "c")]), "b": iter([("b",)]), "c": iter([])}))
    ['a', 'c']
    """
    found: set[Hashable] = set()
    waiting: dict[Hashable, list[tuple[Hashable, int]]] = {}
    turns = dict.fromkeys(needs, 0)  # how often each has gone on: who waits for any of several keys is woken once
    ready = list(needs)
    while ready:
        key = ready.pop()
        turns[key] += 1
        for any_of in needs[key]:
            if not any(each in found for each in any_of):
                for each in any_of:
                    waiting.setdefault(each, []).append((key, turns[key]))
                break
        else:
            found.add(key)
            for sleeper, turn in waiting.pop(key, ()):
                if turns[sleeper] == turn:
                    turns[sleeper] += 1
                    ready.append(sleeper)
    return found
