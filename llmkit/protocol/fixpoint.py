"""The least fixed point of a dependency graph: which grammar rules or schemas have a finite text.

Pure, and linear in what is read.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence

__all__ = ["least_fixed_point"]

Needs = Iterator[Sequence[Hashable]]


def least_fixed_point(needs: dict[Hashable, Needs]) -> set[Hashable]:
    """The keys all of whose needs are met.

    A need is met when any of its keys is in the result; an empty need never is. Each iterator
    resumes only once what it waits for is known, and never restarts.

    >>> sorted(least_fixed_point({"a": iter([("b", "c")]), "b": iter([("b",)]), "c": iter([])}))
    ['a', 'c']
    """
    met: set[Hashable] = set()
    waiting: dict[Hashable, list[tuple[Hashable, int]]] = {}
    # How often each key has resumed, so that one waiting for any of several keys is woken once.
    turns = dict.fromkeys(needs, 0)
    ready = list(needs)
    while ready:
        key = ready.pop()
        turns[key] += 1
        for any_of in needs[key]:
            if not any(each in met for each in any_of):
                for each in any_of:
                    waiting.setdefault(each, []).append((key, turns[key]))
                break
        else:
            met.add(key)
            for sleeper, turn in waiting.pop(key, ()):
                if turns[sleeper] == turn:
                    turns[sleeper] += 1
                    ready.append(sleeper)
    return met
