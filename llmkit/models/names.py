"""Names of models as people type and see them: compared and suggested. Pure."""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Iterable

__all__ = ["folded", "gigabytes", "near"]

MAX_TYPED = 512  # characters; comparing longer ones would cost more than it helps


def folded(text: str) -> str:
    """The form in which names that differ in case or in Unicode composition are equal."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).casefold())


def near(text: str, known: Iterable[str], most: int = 3) -> str:
    """The end of a sentence about a name that is not known: what is similar, or a full stop.

    >>> near("smolm2", ["smollm2", "minilm"]), near("x", [])
    ("; did you mean 'smollm2'?", '.')
    """
    by_fold = {folded(name): name for name in known}
    typed = folded(text[:MAX_TYPED])
    # A whole last part counts most: "model" for "org/repo/model".
    found = [f for f in by_fold if typed and f.rpartition("/")[2] == typed.rpartition("/")[2]]
    found += difflib.get_close_matches(typed, [f for f in by_fold if len(f) <= MAX_TYPED], n=most)
    names = [repr(by_fold[f]) for f in dict.fromkeys(found)][:most]
    return f"; did you mean {' or '.join(names)}?" if names else "."


def gigabytes(size: float) -> str:
    """A size in bytes for people.

    >>> gigabytes(4_920_000_000), gigabytes(98_362_432)
    ('4.92 GB', '98.4 MB')
    """
    return f"{size / 1e9:.2f} GB" if size >= 999.5e6 else f"{size / 1e6:.3g} MB"
