"""Prompts with pictures for the fake model, and an encoder that tests let go on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from llmkit.engine.encoding import Encoded
from llmkit.engine.media import Item, cells, key_of

Prompt = tuple[list[int], tuple[Item, ...]]


@dataclass(frozen=True)
class Picture:
    """One that takes ``n_tokens`` cells and ``n_positions`` positions."""

    name: str
    n_tokens: int = 12
    n_positions: int = 12
    whole: bool = False
    kind: str = "image"


def prompt_of(*parts: bytes | Picture) -> Prompt:
    """The tokens of a prompt, and its items of media."""
    tokens: list[int] = []
    media: list[Item] = []
    for part in parts:
        if isinstance(part, bytes):
            tokens += part
            continue
        digest = hashlib.sha256(part.name.encode()).digest()[:12]
        key = key_of(digest, 0, part.n_positions)
        media.append(
            Item(
                key,
                len(tokens),
                part.n_tokens,
                part.n_positions,
                part.whole,
                part.kind,
                num_bytes=part.n_tokens,
                source=part.name,
            )
        )
        tokens += cells(key, part.n_tokens)
    return tokens, tuple(media)


class FakeEncoder:
    """Encodes at once, or, ``by_hand``, when a test says so. Pictures called "bad…" fail."""

    def __init__(self, by_hand: bool = False) -> None:
        self.by_hand = by_hand
        self.begun: list[str] = []
        self._left: list[tuple[Item, Callable[[Encoded], None]]] = []

    def encode(self, item: Item, done: Callable[[Encoded], None]) -> None:
        self.begun.append(str(item.source))
        self._left.append((item, done))
        if not self.by_hand:
            self.go_on()

    @property
    def left(self) -> Sequence[str]:
        return [str(item.source) for item, _ in self._left]

    def go_on(self) -> None:
        """Finish what was begun first."""
        item, done = self._left.pop(0)
        is_bad = str(item.source).startswith("bad")
        done(Encoded(item, ValueError("it is bad") if is_bad else ("encoded", item.key), 0.5))
