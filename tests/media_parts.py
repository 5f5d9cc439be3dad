"""Prompts with pictures for the fake model, and an encoder that tests let go on; pictures, sounds
and requests for real ones."""

from __future__ import annotations

import hashlib
import io
import itertools
import wave
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from llmkit.engine.encoding import Encoded
from llmkit.engine.media import Item, cells, key_of
from llmkit.errors import InvalidRequestError
from llmkit.protocol import GenerationRequest, Media, Message, SamplingParams

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
    """Encodes at once, or, ``by_hand``, when a test says so. Pictures called "bad…" fail, and one
    called "refused" is refused."""

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
        result: object = "encoded", item.key
        if str(item.source).startswith("bad"):
            result = ValueError("it is bad")
        elif item.source == "refused":
            result = InvalidRequestError("it is cut off")
        done(Encoded(item, result, 0.5))


def png(colour: tuple[int, int, int] | int, width: int = 28, height: int | None = None) -> bytes:
    """A picture file of one colour, or of nine fields that a number stands for."""
    shape = (height or width, width, 3)
    if isinstance(colour, int):
        fields = np.random.default_rng(colour).integers(0, 2, (3, 3, 3)) * 255
        rows, columns = (np.arange(size) * 3 // size for size in shape[:2])
        pixels = fields[rows[:, None], columns].astype(np.uint8)
    else:
        pixels = np.full(shape, colour, np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def wav(seed: int, seconds: float = 1.0, rate: int = 16_000) -> bytes:
    """A sound file of noise."""
    noise = np.random.default_rng(seed).integers(-9000, 9000, int(seconds * rate), np.int16)
    file = io.BytesIO()
    with wave.open(file, "wb") as sound:
        sound.setparams((1, 2, rate, len(noise), "NONE", ""))
        sound.writeframes(noise.tobytes())
    return file.getvalue()


_ids = itertools.count()


def asking(
    *parts: str | bytes, max_tokens: int = 12, before: Sequence[Message] = (), **more: Any
) -> GenerationRequest:
    """A request whose last message has texts and files, and ``files`` for earlier ones."""
    files = {hashlib.sha256(f).hexdigest(): f for f in more.pop("files", ())}
    content: list[str | Media] = []
    for part in parts:
        if isinstance(part, bytes):
            digest = hashlib.sha256(part).hexdigest()
            files[digest] = part
            kind = "audio" if part.startswith(b"RIFF") else "image"
            content.append(Media(digest, kind))  # type: ignore[arg-type]
        else:
            content.append(part)
    params = SamplingParams(temperature=0, max_tokens=max_tokens, **more.pop("sampling", {}))
    messages = (*before, Message("user", tuple(content)))
    return GenerationRequest(f"m{next(_ids)}", params, messages=messages, media=files, **more)
