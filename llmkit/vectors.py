"""Vectors and rankings as people use them in Python: texts in, numpy arrays and orders out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from llmkit.errors import InvalidRequestError
from llmkit.types import EmbeddingRequest, Embeddings

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

__all__ = ["embed", "embed_column", "rank"]


def embed_column(ask: Callable[[EmbeddingRequest], Embeddings], new_id: Callable[[], str], column: pd.Series, size: int, normalize: bool) -> pd.DataFrame:
    """Vectors of a table's column: one row for each text, with its index; columns 0, 1, ... of float32."""
    import pandas as pd

    return pd.DataFrame(embed(ask, new_id, list(column), size, normalize), index=column.index)


def embed(ask: Callable[[EmbeddingRequest], Embeddings], new_id: Callable[[], str], texts: Sequence[str], size: int, normalize: bool) -> np.ndarray:
    """Vectors of texts, float32 of shape (n, size)."""
    import numpy as np

    inputs = tuple(texts)
    _check_texts(inputs, lambda i: f"text {i}", "texts")
    if not inputs:
        return np.empty((0, size), np.float32)
    found = ask(EmbeddingRequest(new_id(), inputs, normalize))
    return np.frombuffer(found.data, np.float32).reshape(-1, found.size)


def rank(
    ask: Callable[[EmbeddingRequest], Embeddings], new_id: Callable[[], str], query: str, documents: Sequence[str], top: int | None, *, ranks: bool
) -> list[tuple[int, float]]:
    """Places and scores of the documents, best first: by a cross-encoder that ``ranks``, or by the cosine similarity."""
    import numpy as np

    documents = list(documents)
    _check_texts([query, *documents], lambda i: f"document {i - 1}" if i else "the query", "documents")
    if not documents:
        return []
    if ranks:
        found = ask(EmbeddingRequest(new_id(), tuple(documents), query=query))
        scores = np.frombuffer(found.data, np.float32).reshape(-1, found.size)[:, 0]
    else:
        vectors = embed(ask, new_id, [query, *documents], 0, True)
        scores = vectors[1:] @ vectors[0]
    order = sorted(range(len(documents)), key=lambda i: -scores[i])
    return [(i, float(scores[i])) for i in order[:top]]


def _check_texts(texts: Sequence[object], name: Callable[[int], str], param: str) -> None:
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise InvalidRequestError(f"{name(i)} is not text but {type(text).__name__}.", param)
