"""The routes that an engine works for, by what it does. Pure."""

from __future__ import annotations

__all__ = ["BOUNDED", "COMPUTING", "GENERATING", "VECTORS"]

GENERATING = frozenset(
    {
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/responses",
        "/v1/messages",
        "/api/chat",
        "/api/generate",
        "/v1/sessions/{session_id}/messages",
        "/completions",
        "/chat/completions",
        "/v1/generate",
        "/api/generate/stream",
        "/api/chat/stream",
        "/api/completions",
        "/api/completions/stream",
        "/completion",
        "/infill",
    }
)
VECTORS = frozenset({"/v1/embeddings", "/v1/rerank", "/api/embed", "/api/embeddings", "/embedding"})
ASKING = frozenset(
    {"/v1/messages/count_tokens", "/tokenize", "/detokenize", "/apply-template", "/api/show"}
)
BOUNDED = GENERATING | VECTORS | ASKING  # in time
COMPUTING = BOUNDED - {"/api/show"}  # for rates and budgets, which a look at a model costs nothing
