"""Split models, ``name-00001-of-00003.gguf`` and so on.

llama.cpp opens the first file and finds the others beside it by name.
"""

from __future__ import annotations

import re

__all__ = ["first_of", "names_of", "stem_of"]

SPLIT = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<end>\.gguf)")
MAX_PARTS = 1000


def names_of(name: str) -> list[str]:
    """The names of all files of a model, in order, from any one; just itself if it is not split.

    >>> names_of("m-00002-of-00002.gguf")
    ['m-00001-of-00002.gguf', 'm-00002-of-00002.gguf']
    """
    match = SPLIT.fullmatch(name)
    if match is None or not 1 <= int(match["number"]) <= int(match["count"]) <= MAX_PARTS:
        return [name]
    return [
        f"{match['stem']}-{i:05}-of-{match['count']}{match['end']}"
        for i in range(1, int(match["count"]) + 1)
    ]


def first_of(name: str) -> str:
    """The name of the first file, which stands for all."""
    return names_of(name)[0]


def stem_of(name: str) -> str:
    """The model's name.

    >>> stem_of("m-00002-of-00002.gguf"), stem_of("n.gguf")
    ('m', 'n')
    """
    match = SPLIT.fullmatch(name)
    return (
        match["stem"]
        if match is not None and len(names_of(name)) > 1
        else name.removesuffix(".gguf")
    )
