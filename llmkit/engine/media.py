"""Images and sounds among tokens: each of their cells is a negative number that says what it is,
so lists of tokens compare as before. Pure.

A cell's number holds, from the top: which item it is of (a digest of its content, of what encodes
it and of who may share it, and how many positions it takes), and which of its cells this is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

__all__ = ["Item", "cells", "item_start", "key_of", "offset"]

BITS = 20  # for a cell's place in its item, and for the positions that the item takes
MASK = (1 << BITS) - 1


@dataclass(frozen=True, slots=True)
class Item:
    """An image, a tile of one, or a piece of a sound in a prompt: ``n_tokens`` cells from
    ``start`` on, which take ``n_positions`` positions.

    ``whole``: all of it must be computed in one step. ``source`` is what the encoder makes
    ``num_bytes`` of embeddings from; opaque here.
    """

    key: int
    start: int
    n_tokens: int
    n_positions: int
    whole: bool = False
    kind: str = "image"
    num_bytes: int = 0
    source: object = field(default=None, compare=False, repr=False)

    @property
    def end(self) -> int:
        return self.start + self.n_tokens


def key_of(digest: bytes, ordinal: int, n_positions: int) -> int:
    """The key of the item that is number ``ordinal`` of a picture or sound."""
    return (int.from_bytes(digest) << BITS | ordinal) << BITS | n_positions


def cells(key: int, n_tokens: int) -> list[int]:
    """The cells of an item.

    >>> picture = cells(key_of(b"red", 0, 2), 3)
    >>> offset([1, 2, *picture, 4], 6), item_start([1, 2, *picture, 4], 4)
    (-1, 2)
    """
    first = -1 - (key << BITS)
    return [first - i for i in range(n_tokens)]


def item_start(tokens: Sequence[int], at: int) -> int:
    """Where the item begins that a cut at ``at`` would go through; ``at`` if there is none."""
    return at - _row(tokens[at]) if at < len(tokens) and tokens[at] < 0 else at


def offset(tokens: Sequence[int], length: int) -> int:
    """How many more positions the first ``length`` tokens take than their number, usually less
    than 0. They must not end within an item."""
    if not length or min(tokens[:length]) >= 0:
        return 0
    return sum(
        _n_positions(tokens[i]) - (1 + _row(tokens[i]))
        for i in range(length)
        if tokens[i] < 0 and (i + 1 == length or tokens[i + 1] != tokens[i] - 1)
    )


def _row(cell: int) -> int:
    return (-1 - cell) & MASK


def _n_positions(cell: int) -> int:
    return (-1 - cell) >> BITS & MASK
