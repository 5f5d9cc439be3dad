"""Embeddings and rankings: texts in, numpy arrays or (index, score) lists out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from llmkit.errors import InvalidRequestError
from llmkit.protocol import EmbeddingRequest, Embeddings
from llmkit.sessions.running import new_id

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

__all__ = ["embed", "embed_column", "rank", "vectors"]


def vectors(
    ask: Callable[[EmbeddingRequest], Embeddings],
    texts: Any,
    size: int,
    normalize: bool,
) -> np.ndarray | pd.DataFrame:
    """Embeddings of ``texts``: an array; a DataFrame for a Series, one vector for a str."""
    if hasattr(texts, "index") and hasattr(texts, "to_frame"):
        return embed_column(ask, texts, size, normalize)
    if isinstance(texts, str):
        vector: np.ndarray = embed(ask, [texts], size, normalize)[0]
        return vector
    return embed(ask, texts, size, normalize)


def embed_column(
    ask: Callable[[EmbeddingRequest], Embeddings],
    column: pd.Series,
    size: int,
    normalize: bool,
) -> pd.DataFrame:
    """Embeddings of a table's column: a row per text, with its index; float32 columns 0, 1, …"""
    import pandas as pd

    return pd.DataFrame(embed(ask, list(column), size, normalize), index=column.index)


def embed(
    ask: Callable[[EmbeddingRequest], Embeddings],
    texts: Sequence[str],
    size: int,
    normalize: bool,
) -> np.ndarray:
    """Embeddings of texts, float32 of shape (n, size)."""
    import numpy as np

    inputs = tuple(texts)
    _check_texts(inputs, lambda i: f"text {i}", "texts")
    if not inputs:
        return np.empty((0, size), np.float32)
    reply = ask(EmbeddingRequest(new_id(), inputs, normalize))
    return np.frombuffer(reply.data, np.float32).reshape(-1, reply.size)


def rank(
    ask: Callable[[EmbeddingRequest], Embeddings],
    query: str,
    documents: Sequence[str],
    top: int | None,
    *,
    ranks: bool,
) -> list[tuple[int, float]]:
    """Indices and scores of the documents, best first.

    ``ranks``: the model is a cross-encoder; otherwise the score is the cosine similarity.
    """
    import numpy as np

    documents = list(documents)
    _check_texts(
        [query, *documents], lambda i: f"document {i - 1}" if i else "the query", "documents"
    )
    if not documents:
        return []
    if ranks:
        reply = ask(EmbeddingRequest(new_id(), tuple(documents), query=query))
        scores = np.frombuffer(reply.data, np.float32).reshape(-1, reply.size)[:, 0]
    else:
        embedded = embed(ask, [query, *documents], 0, True)
        scores = embedded[1:] @ embedded[0]
    order = sorted(range(len(documents)), key=lambda i: -scores[i])
    return [(i, float(scores[i])) for i in order[:top]]


def _check_texts(texts: Sequence[object], name: Callable[[int], str], param: str) -> None:
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise InvalidRequestError(f"{name(i)} must be a str, not {type(text).__name__}.", param)
