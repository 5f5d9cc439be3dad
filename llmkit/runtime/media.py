"""Images and sounds of requests: from files to what stands in a prompt. Any thread.

A file that is known is neither decoded nor scaled again: what it is in a prompt is remembered by
its digest. Part of the composition root: it alone knows decoders and the projector.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

import numpy as np

from llmkit.backend.media import Part, Projector
from llmkit.backend.media_encoder import MediaEncoder, Preparations, Source
from llmkit.engine.media import Item, cells, key_of
from llmkit.errors import ContextLengthError, InvalidRequestError
from llmkit.protocol import Media

__all__ = ["MediaReader", "MediaUnit", "Placed"]

MAX_KNOWN = 4096
CLOSE_S = 10.0  # for what is being encoded, which nothing can interrupt
DIGEST_BYTES = 12
FLOAT_BYTES = 4
MAX_PREPARED_BYTES = 128 << 20  # of scaled pixels that wait for the encoder


@dataclass(frozen=True, slots=True)
class Placed:
    """The tokens of an image or a sound in a prompt, and its items."""

    tokens: list[int]
    items: list[Item]


@dataclass(frozen=True, slots=True)
class _Known:
    digest: bytes
    parts: Sequence[Part]


class MediaReader:
    """Reads images and sounds for a ``projector``. ``pixels`` and ``samples`` decode files;
    ``batch_tokens`` is the most that can be computed at once."""

    def __init__(
        self,
        projector: Projector,
        pixels: Callable[[bytes], np.ndarray],
        samples: Callable[[bytes, int], np.ndarray],
        batch_tokens: int,
    ) -> None:
        self._projector = projector
        self._pixels, self._samples = pixels, samples
        self._batch_tokens = batch_tokens
        self._known: OrderedDict[tuple[str, str, str], _Known] = OrderedDict()
        self._lock = threading.Lock()
        self.prepared = Preparations(MAX_PREPARED_BYTES)

    @property
    def inputs(self) -> tuple[str, ...]:
        return self._projector.inputs

    def place(self, media: Media, data: bytes | None, salt: str, start: int, n_ctx: int) -> Placed:
        """What a file is at place ``start`` of a prompt. What is encoded of it is shared only by
        requests of one ``salt``. Without its ``data`` one that is known can be counted only.

        Raises `InvalidRequestError`, and `ContextLengthError` before anything is scaled.
        """
        if data is not None and hashlib.sha256(data).hexdigest() != media.digest:
            raise InvalidRequestError("messages: a file does not match its digest.", "messages")
        name = salt, media.kind, media.digest
        with self._lock:
            known = self._known.get(name)
            if known is not None:
                self._known.move_to_end(name)
        if known is None and data is None:
            raise InvalidRequestError("messages: the file of a message is missing.", "messages")
        if known is None:
            content = self._read(media.kind, data)
            parts = self._projector.parts(media.kind, content.shape)
            self._check(parts, start, n_ctx)
            parts, prepared = self._projector.prepare(media.kind, content)
            known = _Known(self._digest(content, media.kind, salt), parts)
            size = self._projector.prepared_bytes(content, parts)
            self.prepared.add(known.digest, prepared, size)
            with self._lock:
                self._known[name] = known
                while len(self._known) > MAX_KNOWN:
                    self._known.popitem(last=False)
        self._check(known.parts, start, n_ctx)
        read = partial(self._read, media.kind, data)
        source = Source(media.kind, known.digest, read, self.prepared)
        placed = Placed([], [])
        for part in known.parts:
            if not part.n_tokens:
                placed.tokens.extend(part.tokens)
                continue
            ordinal = len(placed.items)
            key = key_of(known.digest, ordinal, part.n_positions)
            item = Item(
                key,
                start + len(placed.tokens),
                part.n_tokens,
                part.n_positions,
                part.whole,
                media.kind,
                num_bytes=part.n_tokens * self._projector.width * FLOAT_BYTES,
                source=(source, ordinal),
            )
            placed.items.append(item)
            placed.tokens.extend(cells(key, part.n_tokens))
        return placed

    def _read(self, kind: str, data: bytes | None) -> np.ndarray:
        assert data is not None  # what is only counted is never encoded
        if kind == "image":
            return self._pixels(data)
        return self._samples(data, self._projector.sample_rate)

    def _check(self, parts: Sequence[Part], start: int, n_ctx: int) -> None:
        """Whether there is room, and no part is too large to be computed."""
        end = start + sum(len(p.tokens) + p.n_tokens for p in parts)
        if end >= n_ctx:
            raise ContextLengthError(end, n_ctx, "messages")
        largest = max((p.n_tokens for p in parts if p.whole), default=0)
        if largest > self._batch_tokens:
            raise InvalidRequestError(
                f"messages: an image takes {largest} tokens, which must be computed at once, and "
                f"at most {self._batch_tokens} can be: send it smaller, or load the model with a "
                "larger batch_tokens.",
                "messages",
            )

    def _digest(self, content: np.ndarray, kind: str, salt: str) -> bytes:
        """Another for other content, weights, or requests that share nothing."""
        told = repr((self._projector.identity, kind, salt, content.shape))
        digest = hashlib.sha256(told.encode("utf-8", "surrogatepass"))
        digest.update(np.ascontiguousarray(content).data)
        return digest.digest()[:DIGEST_BYTES]


class MediaUnit:
    """All that a model has for images and sounds: ``reader`` and ``encoder`` over a ``projector``,
    which it owns. ``turns`` is held while something is encoded."""

    def __init__(
        self,
        projector: Projector,
        batch_tokens: int,
        turns: AbstractContextManager[None] | None = None,
    ) -> None:
        from llmkit.media.pictures import pixels
        from llmkit.media.sounds import samples

        self._projector = projector
        self.reader = MediaReader(projector, pixels, samples, batch_tokens)
        self.encoder = MediaEncoder(projector, turns)

    def close(self, then: Callable[[], None]) -> bool:
        """Free the memory, and ``then`` the model's. False: something is still being encoded, and
        the encoder's thread does both afterwards."""

        def free() -> None:
            self._projector.close()
            then()

        return self.encoder.close(CLOSE_S, free)
