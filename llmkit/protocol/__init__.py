"""The types every layer shares: requests, messages, sampling and results.

Plain frozen data, validated on construction; standard library only. Streams and `EngineClient`
have modules of their own here.
"""

from llmkit.protocol.description import READY, EngineState, EngineStats, ModelDescription, Origin
from llmkit.protocol.messages import MAX_DEPTH, Media, Message, Part, Tool, ToolCall, depth_of
from llmkit.protocol.requests import (
    MAX_CHARS_PER_TOKEN,
    EmbeddingRequest,
    GenerationRequest,
    Inquiry,
    InquiryKind,
    check_size,
)
from llmkit.protocol.results import (
    Completion,
    Delta,
    Embeddings,
    FinishReason,
    RequestMetrics,
    TokenLogprob,
    Usage,
)
from llmkit.protocol.sampling import Grammar, SamplingParams

__all__ = [
    "MAX_CHARS_PER_TOKEN",
    "MAX_DEPTH",
    "READY",
    "Completion",
    "Delta",
    "EmbeddingRequest",
    "Embeddings",
    "EngineState",
    "EngineStats",
    "FinishReason",
    "GenerationRequest",
    "Grammar",
    "Inquiry",
    "InquiryKind",
    "Media",
    "Message",
    "ModelDescription",
    "Origin",
    "Part",
    "RequestMetrics",
    "SamplingParams",
    "TokenLogprob",
    "Tool",
    "ToolCall",
    "Usage",
    "check_size",
    "depth_of",
]
