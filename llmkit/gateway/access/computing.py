"""The routes that an engine works for, by what it does. Pure."""

from __future__ import annotations

import re

__all__ = [
    "BOUNDED",
    "COMPUTING",
    "DRAWING",
    "EDITING",
    "GENERATING",
    "HEARING",
    "SEEING",
    "SPEAKING",
    "SUBMITTING",
    "VECTORS",
]

SUBMITTING = "/engine/submit"
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
        SUBMITTING,
    }
)
VECTORS = frozenset(
    {
        "/v1/embeddings",
        "/v1/rerank",
        "/api/embed",
        "/api/embeddings",
        "/embedding",
        "/engine/embed",
    }
)
LOOKS = frozenset({"/api/show"})
ASKING = LOOKS | {
    "/v1/messages/count_tokens",
    "/tokenize",
    "/detokenize",
    "/apply-template",
    "/engine/inquire",
}
# Whose bodies may hold pictures and sounds.
SEEING = re.compile(
    r"(/v1)?/chat/completions|/v1/responses|/v1/messages(/count_tokens)?|/api/(chat|generate)"
    r"|/v1/sessions(/import|/[^/]+/messages(/[^/]+(/regenerate)?)?)?|/engine/(submit|inquire)"
    r"|(/v1)?/tokenize"
)
HEARING = frozenset({"/v1/audio/transcriptions", "/v1/audio/translations"})
SPEAKING = frozenset({"/v1/audio/speech"})
EDITING = frozenset({"/v1/images/edits"})
DRAWING = EDITING | {"/v1/images/generations"}
BOUNDED = GENERATING | VECTORS | ASKING | HEARING | SPEAKING | DRAWING  # in time
COMPUTING = BOUNDED - LOOKS  # for rates and budgets, which a look at a model costs nothing
