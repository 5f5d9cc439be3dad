"""A text in pieces that a small voice can take, whatever is in it. Pure.

What turns text into phonemes is a library made for sentences of books: its time grows with the cube
of a word's parts, and it knows no names for large numbers.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence

__all__ = ["cut", "sentences_of"]

MAX_CHARS = 400  # of a sentence
MAX_DIGITS = 15  # of a number; those of longer ones are read one by one
MAX_PARTS, MAX_WORD = 8, 60  # of a word: parts by case, digits and signs; characters
NUMBER = re.compile(r"\d(?:[\d,]*\d)?")
PART = re.compile(r"[^\W\d_a-z]*[a-z']+|[^\W\d_]+|\d+|.")
CLAUSE = re.compile(r"[,;:—.!?…] ")
LATIN = "\u00ff"  # up to here signs such as © and ° have names


def sentences_of(text: str, split: Callable[[str], Sequence[str]]) -> list[str]:
    """The sentences of a text, as ``split`` finds them, each of them easy to read.

    >>> sentences_of("Well\\0 then. Yes.", lambda text: text.split(". "))
    ['Well then', 'Yes.']
    """
    heard = "".join(map(_said, unicodedata.normalize("NFC", text)))
    sentences = (" ".join(map(_word, NUMBER.sub(_number, s).split())) for s in split(heard))
    return [piece for sentence in sentences for piece in cut(sentence, MAX_CHARS)]


def cut(text: str, most: int) -> Iterator[str]:
    """Pieces of at most ``most`` characters: by clauses, else by words, else anywhere.

    >>> list(cut("one two, three four", 12)), list(cut("abcdef", 4))
    (['one two,', 'three four'], ['abcd', 'ef'])
    """
    while len(text) > most:
        window = text[: most + 1]
        clauses = [m.end() for m in CLAUSE.finditer(window)]
        at = clauses[-1] if clauses else window.rfind(" ") + 1 or most
        yield text[:at].strip()
        text = text[at:].lstrip()
    if text:
        yield text


def _said(character: str) -> str:
    """A character that can be read aloud, or a space: no control characters, no pictures."""
    if character.isspace():
        return character
    category = unicodedata.category(character)
    if category == "Mn":  # accents that belong to no letter, variants of pictures
        return ""
    is_sign = category in ("So", "Sk") and character > LATIN
    return " " if category[0] == "C" or is_sign else character


def _number(found: re.Match[str]) -> str:
    digits = [character for character in found.group() if character != ","]
    return found.group() if len(digits) <= MAX_DIGITS else " ".join(digits)


def _word(word: str) -> str:
    parts = PART.findall(word)
    if len(parts) <= MAX_PARTS and len(word) <= MAX_WORD:
        return word
    return " ".join(piece for part in parts if part not in "-_" for piece in cut(part, MAX_WORD))
