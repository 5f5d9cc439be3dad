"""Every error that llmkit raises on purpose, in one tree. Standard library only.

    LLMKitError
    ├── InvalidRequestError (ValueError)   the request cannot be served as it stands
    │   └── ContextLengthError             the prompt is longer than the context
    ├── ModelNotFoundError (LookupError)   no file, alias or running engine of that name
    ├── ModelLoadError                     the file exists but cannot be loaded
    │   ├── InvalidModelFileError          not GGUF, truncated, or an impossible header
    │   └── InsufficientMemoryError        the model would not fit; says what would
    ├── ModelUnloadedError                 the handle outlived its model
    ├── EngineError                        the engine failed while working on this request
    │   └── EngineGoneError                the process that held the model is gone or unreachable
    └── QueueFullError                     too many requests are waiting

A message says what happened and what to do next.
"""

from __future__ import annotations

__all__ = [
    "ContextLengthError",
    "EngineError",
    "EngineGoneError",
    "InsufficientMemoryError",
    "InvalidModelFileError",
    "InvalidRequestError",
    "LLMKitError",
    "ModelLoadError",
    "ModelNotFoundError",
    "ModelUnloadedError",
    "QueueFullError",
]


class LLMKitError(Exception):
    """Base of all errors that llmkit raises on purpose."""


class InvalidRequestError(LLMKitError, ValueError):
    """A parameter is invalid or out of range; ``param`` names it."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class ContextLengthError(InvalidRequestError):
    """The prompt has more tokens than one request may hold (``n_ctx``)."""

    def __init__(self, num_tokens: int, n_ctx: int, param: str | None = "prompt") -> None:
        super().__init__(
            f"This model's context is {n_ctx} tokens per request; the prompt has {num_tokens}, "
            "and the answer needs at least one more. Shorten the prompt, or load the model "
            "with a larger n_ctx.",
            param,
        )
        self.num_tokens = num_tokens
        self.n_ctx = n_ctx


class ModelNotFoundError(LLMKitError, LookupError):
    """No file, alias or running engine has this name."""


class ModelLoadError(LLMKitError):
    """The model file exists but cannot be loaded."""


class InvalidModelFileError(ModelLoadError):
    """Not a usable GGUF file; the message says what it is instead."""


class InsufficientMemoryError(ModelLoadError):
    """By the estimate the model does not fit; ``force=True`` loads it anyway."""


class ModelUnloadedError(LLMKitError):
    """The model behind this handle was unloaded."""


class EngineError(LLMKitError):
    """The engine failed while working on this request; other requests go on."""


class EngineGoneError(EngineError):
    """The process that held the model is gone or does not respond."""


class QueueFullError(LLMKitError):
    """The engine's queue is full; try again later."""
