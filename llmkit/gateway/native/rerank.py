"""Rerank, in the form that Jina, Cohere and llama-server share: the request schema and the route.

Tornado loop only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from llmkit.gateway.directory import EngineDirectory
from llmkit.gateway.exchange import Exchange
from llmkit.gateway.ids import new_id
from llmkit.gateway.openai.schemas import Ignored
from llmkit.gateway.vectors import MAX_INPUTS, embed, vectors_of
from llmkit.protocol import EmbeddingRequest, Embeddings
from llmkit.protocol.client import EngineClient

__all__ = ["RerankBody", "RerankRoutes"]


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


class RerankRoutes:
    """`/v1/rerank` over the engines of a directory."""

    def __init__(
        self, directory: EngineDirectory, on_use: Callable[[EngineClient], None] = lambda _: None
    ) -> None:
        self._directory = directory
        self._on_use = on_use

    async def rerank(self, exchange: Exchange) -> None:
        """A cross-encoder scores the pairs; an embedding model gives their cosine similarity."""
        body = await exchange.read(RerankBody)
        engine = self._directory.lookup(body.model, "embed")
        self._on_use(engine)
        model = engine.description
        request_id, caller = new_id("rank"), exchange.caller
        request = (
            EmbeddingRequest(request_id, body.texts, query=body.query, caller=caller)
            if model.ranks
            else EmbeddingRequest(request_id, (body.query, *body.texts), caller=caller)
        )
        embeddings = await embed(engine, request)
        scores = _scores(embeddings, model.ranks)
        order = sorted(range(len(scores)), key=lambda i: -scores[i])[: body.top_n]
        results: list[dict[str, Any]] = [{"index": i, "relevance_score": scores[i]} for i in order]
        if body.return_documents:
            for result in results:
                result["document"] = {"text": body.texts[result["index"]]}
        num_tokens = sum(embeddings.num_tokens)
        exchange.send_json(
            {
                "id": new_id("rerank"),
                "object": "list",
                "model": model.name,
                "results": results,
                "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
            }
        )


def _scores(embeddings: Embeddings, ranks: bool) -> list[float]:
    vectors = vectors_of(embeddings)
    scores = vectors[:, 0] if ranks else vectors[1:] @ vectors[0]
    return [float(s) for s in scores]
