"""OpenAI's embeddings: the request schema and the route. Tornado loop only."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Callable
from typing import Annotated, Literal

from pydantic import Field

from llmkit.errors import InvalidRequestError
from llmkit.gateway.directory import EngineDirectory
from llmkit.gateway.exchange import Exchange
from llmkit.gateway.ids import new_id
from llmkit.gateway.openai.schemas import Ignored
from llmkit.gateway.vectors import MAX_INPUTS, embed, json_vectors, vectors_of, with_list
from llmkit.protocol import EmbeddingRequest, Embeddings
from llmkit.protocol.client import EngineClient

__all__ = ["EmbeddingsBody", "EmbeddingsRoutes"]


class EmbeddingsBody(Ignored):
    """POST /v1/embeddings"""

    input: str | list[str] | list[int] | list[list[int]]
    model: str = "default"
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[int, Field(ge=1)] | None = None

    @property
    def inputs(self) -> tuple[str | tuple[int, ...], ...]:
        """The inputs as texts or token ids. Raises `InvalidRequestError` for none or too many."""
        value = self.input
        if isinstance(value, str):
            return (value,)
        if value and isinstance(value[0], int):
            return (tuple(i for i in value if isinstance(i, int)),)
        if not 0 < len(value) <= MAX_INPUTS:
            raise InvalidRequestError(
                f"input: must have 1 to {MAX_INPUTS} texts, not {len(value)}.", "input"
            )
        return tuple(
            tuple(i) if isinstance(i, list) else i for i in value if not isinstance(i, int)
        )


class EmbeddingsRoutes:
    """`/v1/embeddings` over the engines of a directory."""

    def __init__(
        self, directory: EngineDirectory, on_use: Callable[[EngineClient], None] = lambda _: None
    ) -> None:
        self._directory = directory
        self._on_use = on_use

    async def embeddings(self, exchange: Exchange) -> None:
        body = await exchange.read(EmbeddingsBody)
        engine = self._directory.lookup(body.model, "embed")
        self._on_use(engine)
        model = engine.description
        if body.dimensions is not None and body.dimensions > model.embedding_size > 0:
            raise InvalidRequestError(
                f"dimensions must be at most {model.embedding_size} for {model.name!r}, "
                f"not {body.dimensions}.",
                "dimensions",
            )
        embeddings = await embed(
            engine, EmbeddingRequest(new_id("embd"), body.inputs, caller=exchange.caller)
        )
        data = await asyncio.to_thread(_encode, embeddings, body.dimensions, body.encoding_format)
        num_tokens = sum(embeddings.num_tokens)
        usage = {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
        head = {"object": "list", "model": model.name, "usage": usage}
        exchange.send_bytes(with_list(head, "data", data))


def _encode(embeddings: Embeddings, dimensions: int | None, encoding: str) -> list[bytes]:
    vectors = vectors_of(embeddings, dimensions)
    values = (
        [json.dumps(base64.b64encode(v.tobytes()).decode()).encode() for v in vectors]
        if encoding == "base64"
        else json_vectors(vectors)
    )
    return [
        b'{"object": "embedding", "index": %d, "embedding": %s}' % (i, value)
        for i, value in enumerate(values)
    ]
