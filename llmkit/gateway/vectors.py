"""Embeddings and rerank: OpenAI's shape, and the one that Jina, Cohere and llama-server share. Tornado loop only."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from llmkit.client import EngineClient
from llmkit.errors import InvalidRequestError
from llmkit.gateway.engines import EngineDirectory
from llmkit.gateway.exchange import Exchange
from llmkit.gateway.objects import new_id
from llmkit.gateway.schemas import Ignored
from llmkit.types import EmbeddingRequest, Embeddings

if TYPE_CHECKING:
    import numpy as np

__all__ = ["EmbeddingsBody", "RerankBody", "VectorRoutes", "embed", "json_vectors", "vectors_of", "with_list"]

MAX_INPUTS = 2048


class EmbeddingsBody(Ignored):
    """POST /v1/embeddings"""

    input: str | list[str] | list[int] | list[list[int]]
    model: str = "default"
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[int, Field(ge=1)] | None = None

    @property
    def inputs(self) -> tuple[str | tuple[int, ...], ...]:
        given = self.input
        if isinstance(given, str):
            return (given,)
        if given and isinstance(given[0], int):
            return (tuple(i for i in given if isinstance(i, int)),)
        if not 0 < len(given) <= MAX_INPUTS:
            raise InvalidRequestError(f"input: 1 to {MAX_INPUTS} texts are accepted, not {len(given)}.", "input")
        return tuple(tuple(i) if isinstance(i, list) else i for i in given if not isinstance(i, int))


class Document(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)
    text: str


class RerankBody(Ignored):
    """POST /v1/rerank"""

    query: str
    documents: Annotated[list[str | Document], Field(min_length=1, max_length=MAX_INPUTS)]
    model: str = "default"
    top_n: Annotated[int, Field(ge=1)] | None = None
    return_documents: bool = False

    @property
    def texts(self) -> tuple[str, ...]:
        return tuple(d if isinstance(d, str) else d.text for d in self.documents)


class VectorRoutes:
    """Routes over models that embed or rank."""

    def __init__(self, directory: EngineDirectory, on_use: Callable[[EngineClient], None] = lambda _: None) -> None:
        self._directory = directory
        self._on_use = on_use

    def _engine(self, model: str) -> EngineClient:
        engine = self._directory.lookup(model, "embed")
        self._on_use(engine)
        return engine

    async def embeddings(self, exchange: Exchange) -> None:
        body = await exchange.read(EmbeddingsBody)
        engine = self._engine(body.model)
        size = engine.description.embedding_size
        if body.dimensions is not None and size and body.dimensions > size:
            raise InvalidRequestError(f"dimensions: the vectors of {engine.description.name!r} have {size}; {body.dimensions} is more.", "dimensions")
        found = await embed(engine, EmbeddingRequest(new_id("embd"), body.inputs, caller=exchange.caller))
        data = await asyncio.to_thread(_encode, found, body.dimensions, body.encoding_format)
        tokens = sum(found.num_tokens)
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        exchange.send_bytes(with_list({"object": "list", "model": engine.description.name, "usage": usage}, "data", data))

    async def rerank(self, exchange: Exchange) -> None:
        """A cross-encoder judges the pairs; an embedding model gives the cosine similarity."""
        body = await exchange.read(RerankBody)
        engine = self._engine(body.model)
        if engine.description.ranks:
            request = EmbeddingRequest(new_id("rank"), body.texts, query=body.query, caller=exchange.caller)
        else:
            request = EmbeddingRequest(new_id("rank"), (body.query, *body.texts), caller=exchange.caller)
        found = await embed(engine, request)
        scores = _scores(found, engine.description.ranks)
        order = sorted(range(len(scores)), key=lambda i: -scores[i])[: body.top_n]
        results: list[dict[str, Any]] = [{"index": i, "relevance_score": scores[i]} for i in order]
        if body.return_documents:
            for result in results:
                result["document"] = {"text": body.texts[result["index"]]}
        tokens = sum(found.num_tokens)
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        exchange.send_json({"id": new_id("rerank"), "object": "list", "model": engine.description.name, "results": results, "usage": usage})


def vectors_of(found: Embeddings, dimensions: int | None) -> np.ndarray:
    """The vectors, float32 of shape (n, size); fewer ``dimensions`` are cut and normalised."""
    import numpy as np

    vectors = np.frombuffer(found.data, "<f4").reshape(-1, found.size)
    if dimensions is not None and dimensions < found.size:
        vectors = vectors[:, :dimensions]
        vectors = (vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)).astype("<f4")
    return vectors


async def embed(engine: EngineClient, request: EmbeddingRequest) -> Embeddings:
    """The vectors; a client that goes away has its texts forgotten."""
    try:
        return await asyncio.wrap_future(engine.embed(request))
    except asyncio.CancelledError:
        engine.abort(request.request_id)
        raise


def json_vectors(vectors: np.ndarray) -> list[bytes]:
    """Each vector as JSON by itself: all in one would hold the interpreter for as long as that takes."""
    return [json.dumps(vector.tolist()).encode() for vector in vectors]


def with_list(head: dict[str, Any], name: str, entries: list[bytes]) -> bytes:
    """The JSON of an object with one more field, a list of which each entry is JSON already."""
    return json.dumps(head).encode()[:-1] + b", " + json.dumps(name).encode() + b": [" + b", ".join(entries) + b"]}"


def _encode(found: Embeddings, dimensions: int | None, form: str) -> list[bytes]:
    vectors = vectors_of(found, dimensions)
    values = [json.dumps(base64.b64encode(v.tobytes()).decode()).encode() for v in vectors] if form == "base64" else json_vectors(vectors)
    return [b'{"object": "embedding", "index": %d, "embedding": %s}' % (i, value) for i, value in enumerate(values)]


def _scores(found: Embeddings, ranks: bool) -> list[float]:
    import numpy as np

    vectors = np.frombuffer(found.data, "<f4").reshape(-1, found.size)
    scores = vectors[:, 0] if ranks else vectors[1:] @ vectors[0]
    return [float(s) for s in scores]
