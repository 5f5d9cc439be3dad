"""Detects text that has begun to loop. Pure."""

from __future__ import annotations

__all__ = ["MAX_PATTERN", "Repetitions"]

MAX_PATTERN = 64


class Repetitions:
    """Whether the newest tokens are one pattern of up to 64 tokens, ``limit`` times in a row.

    >>> seen = Repetitions(3)
    >>> [seen.push(t) for t in (7, 1, 2, 1, 2, 1, 2)]
    [False, False, False, False, False, False, True]
    """

    __slots__ = ("_limit", "_runs", "_tokens")

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._tokens: list[int] = []
        # By length: how many tokens in a row equal the one that far back.
        self._runs = [0] * (MAX_PATTERN + 1)

    def push(self, token: int) -> bool:
        tokens, runs = self._tokens, self._runs
        tokens.append(token)
        del tokens[: -MAX_PATTERN - 1]
        repeats = False
        for length in range(1, len(tokens)):
            if tokens[-1 - length] == token:
                runs[length] += 1
                repeats = repeats or runs[length] >= length * (self._limit - 1)
            else:
                runs[length] = 0
        return repeats
