"""The types every layer shares: requests, messages, sampling and results.

Plain frozen data, validated on construction; standard library only. Streams and `EngineClient`
have modules of their own here.
"""

from llmkit.protocol.description import READY, EngineState, EngineStats, ModelDescription, Origin
from llmkit.protocol.inquiries import (
    DescribeVocabulary,
    Detokenize,
    Inquiry,
    ListRequests,
    ListSlots,
    ListSteps,
    Question,
    RenderChat,
    RunningRequest,
    SlotContent,
    Step,
    StepChunk,
    Tokenize,
    TokenizeChat,
    Tokens,
    Unload,
    Vocabulary,
)
from llmkit.protocol.messages import (
    INSTRUCTIONS,
    MAX_DEPTH,
    Media,
    Message,
    Part,
    Tool,
    ToolCall,
    depth_of,
)
from llmkit.protocol.requests import (
    MAX_CHARS_PER_TOKEN,
    EmbeddingRequest,
    GenerationRequest,
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
    "INSTRUCTIONS",
    "MAX_CHARS_PER_TOKEN",
    "MAX_DEPTH",
    "READY",
    "Completion",
    "Delta",
    "DescribeVocabulary",
    "Detokenize",
    "EmbeddingRequest",
    "Embeddings",
    "EngineState",
    "EngineStats",
    "FinishReason",
    "GenerationRequest",
    "Grammar",
    "Inquiry",
    "ListRequests",
    "ListSlots",
    "ListSteps",
    "Media",
    "Message",
    "ModelDescription",
    "Origin",
    "Part",
    "Question",
    "RenderChat",
    "RequestMetrics",
    "RunningRequest",
    "SamplingParams",
    "SlotContent",
    "Step",
    "StepChunk",
    "TokenLogprob",
    "Tokenize",
    "TokenizeChat",
    "Tokens",
    "Tool",
    "ToolCall",
    "Unload",
    "Usage",
    "Vocabulary",
    "check_size",
    "depth_of",
]
