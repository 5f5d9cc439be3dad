"""llmkit: load a GGUF model in a notebook, see what it costs, and share it with other programs.

>>> import llmkit
>>> llm = llmkit.load("smollm2")            # doctest: +SKIP
>>> print(llm.chat("What is a prime number?"))  # doctest: +SKIP
>>> llm.serve()                             # doctest: +SKIP

Importing llmkit is quick: llama.cpp, pandas, matplotlib and ipywidgets are loaded on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from llmkit.errors import (
    AccessError,
    ConflictError,
    ContextLengthError,
    DownloadError,
    DrainingError,
    EngineDiedError,
    EngineError,
    EngineGoneError,
    InsufficientMemoryError,
    InvalidModelFileError,
    InvalidRequestError,
    LimitError,
    LLMKitError,
    ModelBusyError,
    ModelLoadError,
    ModelNotFoundError,
    ModelUnloadedError,
    NotFoundError,
    QueueFullError,
    StoreError,
)
from llmkit.version import __version__

if TYPE_CHECKING:
    from llmkit.bench.tuner import tune
    from llmkit.drawing import TextToImage
    from llmkit.llm import LLM
    from llmkit.loading import attach, compare, download, estimate, load, quantize
    from llmkit.protocol import (
        Completion,
        EngineStats,
        FinishReason,
        Grammar,
        Message,
        RequestMetrics,
        SamplingParams,
        TokenLogprob,
        ToolCall,
        Usage,
    )
    from llmkit.protocol.stream import Stream
    from llmkit.sound import SpeechToText, TextToSpeech

__all__ = [
    "LLM",
    "AccessError",
    "Completion",
    "ConflictError",
    "ContextLengthError",
    "DownloadError",
    "DrainingError",
    "EngineDiedError",
    "EngineError",
    "EngineGoneError",
    "EngineStats",
    "FinishReason",
    "Grammar",
    "InsufficientMemoryError",
    "InvalidModelFileError",
    "InvalidRequestError",
    "LLMKitError",
    "LimitError",
    "Message",
    "ModelBusyError",
    "ModelLoadError",
    "ModelNotFoundError",
    "ModelUnloadedError",
    "NotFoundError",
    "QueueFullError",
    "RequestMetrics",
    "SamplingParams",
    "SpeechToText",
    "StoreError",
    "Stream",
    "TextToImage",
    "TextToSpeech",
    "TokenLogprob",
    "ToolCall",
    "Usage",
    "__version__",
    "attach",
    "compare",
    "download",
    "estimate",
    "load",
    "quantize",
    "tune",
]

_PROTOCOL = (
    "Completion", "EngineStats", "FinishReason", "Grammar", "Message", "RequestMetrics",
    "SamplingParams", "TokenLogprob", "ToolCall", "Usage",
)  # fmt: skip
_LATE = {
    **dict.fromkeys(_PROTOCOL, "llmkit.protocol"),
    "LLM": "llmkit.llm",
    "load": "llmkit.loading",
    "attach": "llmkit.loading",
    "estimate": "llmkit.loading",
    "compare": "llmkit.loading",
    "download": "llmkit.loading",
    "quantize": "llmkit.loading",
    "tune": "llmkit.bench.tuner",
    "SpeechToText": "llmkit.sound",
    "TextToSpeech": "llmkit.sound",
    "TextToImage": "llmkit.drawing",
    "Stream": "llmkit.protocol.stream",
}


def __getattr__(name: str) -> Any:
    if name in ("models", "protocol"):
        return importlib.import_module(f"llmkit.{name}")
    if name in _LATE:
        return getattr(importlib.import_module(_LATE[name]), name)
    raise AttributeError(f"module 'llmkit' has no attribute {name!r}")


def load_ipython_extension(shell: Any) -> None:
    """``%load_ext llmkit``: the magics %llm and %%llm."""
    from llmkit.loading import estimate, load
    from llmkit.notebook import magics

    shell.register_magics(magics.LLMMagics(shell, load, estimate))
    shell.set_hook("complete_command", magics.complete, str_key="%llm")


def __dir__() -> list[str]:
    return __all__
