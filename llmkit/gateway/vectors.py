"""What the vector routes of all dialects share: vectors from an engine, and large JSON lists.

Tornado loop only, but for the pure functions over arrays, which run on threads. Knows no dialect.
"""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

from llmkit.gateway import record, rules
from llmkit.gateway.streams import NEVER_BEGUN
from llmkit.protocol import EmbeddingRequest, Embeddings
from llmkit.protocol.client import EngineClient

if TYPE_CHECKING:
    import numpy as np

__all__ = ["MAX_INPUTS", "embed", "json_vectors", "vectors_of", "with_list"]

MAX_INPUTS = 2048  # texts in one request


async def embed(engine: EngineClient, request: EmbeddingRequest) -> Embeddings:
    """The vectors, within the gateway's rules; if the client goes away, the request is aborted."""
    kept, visit = record.current(), rules.current()
    future = engine.embed(request) if visit is None else visit.embed(engine, request)
    if kept is not None:
        kept.begin_embedding(engine, request)
    try:
        embeddings = await asyncio.wrap_future(future)
        if kept is not None:
            kept.num_embedded_tokens += sum(embeddings.num_tokens)
            kept.unfinished_texts = ()
        return embeddings
    except NEVER_BEGUN:
        if kept is not None:
            kept.unfinished_texts = ()
        raise
    except asyncio.CancelledError:
        if not future.cancelled():  # it runs in this process
            engine.abort(request.request_id)
        raise


def vectors_of(embeddings: Embeddings, dimensions: int | None = None) -> np.ndarray:
    """Float32 of shape (n, size); truncated to ``dimensions`` and normalised again."""
    import numpy as np

    vectors = np.frombuffer(embeddings.data, "<f4").reshape(-1, embeddings.size)
    if dimensions is not None and dimensions < embeddings.size:
        vectors = vectors[:, :dimensions]
        norms = np.linalg.norm(vectors, axis=1, keepdims=True)
        vectors = (vectors / np.maximum(norms, 1e-12)).astype("<f4")
    return vectors


def json_vectors(vectors: np.ndarray) -> list[bytes]:
    """Each vector as JSON, one by one: a single dump would hold the GIL for as long as it takes."""
    return [json.dumps(vector.tolist()).encode() for vector in vectors]


def with_list(head: dict[str, Any], name: str, entries: list[bytes]) -> bytes:
    """The JSON of ``head`` with one more field: a list whose entries are JSON already."""
    return (
        json.dumps(head).encode()[:-1]
        + b", "
        + json.dumps(name).encode()
        + b": ["
        + b", ".join(entries)
        + b"]}"
    )
