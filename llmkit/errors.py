"""Every error that llmkit raises on purpose, in one tree; standard library only.

    LLMKitError
    ├── InvalidRequestError (ValueError)   the caller asked for something impossible
    │   └── ContextLengthError             prompt longer than the context
    ├── ModelNotFoundError (LookupError)   no file, alias or running engine of that name
    ├── ModelLoadError                     the file is there, but it cannot be loaded
    │   ├── InvalidModelFileError          not GGUF, truncated, or a header that cannot be true
    │   └── InsufficientMemoryError        it would not fit; says what would
    ├── ModelUnloadedError                 the handle outlived its model
    ├── EngineError                        the engine failed while it worked on this request
    │   └── EngineGoneError                the process that held the model is gone or unreachable
    └── QueueFullError                     too many requests wait already

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
    """Base of all errors raised by llmkit on purpose."""


class InvalidRequestError(LLMKitError, ValueError):
    """A parameter is out of its range; ``param`` names it."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class ContextLengthError(InvalidRequestError):
    """The prompt has more tokens than one request may hold (``n_ctx``)."""

    def __init__(self, num_tokens: int, n_ctx: int, param: str | None = "prompt") -> None:
        super().__init__(
            f"This model's context holds {n_ctx} tokens per request, but the prompt has {num_tokens} and at least one "
            f"must be left for the answer. Shorten the prompt, or load the model with a larger n_ctx.",
            param,
        )
        self.num_tokens = num_tokens
        self.n_ctx = n_ctx


class ModelNotFoundError(LLMKitError, LookupError):
    """No file, alias or running engine has this name."""


class ModelLoadError(LLMKitError):
    """The model file exists but cannot be loaded."""


class InvalidModelFileError(ModelLoadError):
    """The file is not a usable GGUF file; the message says what it is instead."""


class InsufficientMemoryError(ModelLoadError):
    """The estimate says that the model does not fit; ``force=True`` loads it all the same."""


class ModelUnloadedError(LLMKitError):
    """The model behind this handle was unloaded."""


class EngineError(LLMKitError):
    """The engine failed while it worked on this request; other requests go on."""


class EngineGoneError(EngineError):
    """The process that held the model is gone, or does not answer."""


class QueueFullError(LLMKitError):
    """The engine's queue is full; try again later."""
