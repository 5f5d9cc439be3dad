"""Every error that llmkit raises on purpose, in one tree. Standard library only.

    LLMKitError
    ├── InvalidRequestError (ValueError)   the request cannot be served as it stands
    │   └── ContextLengthError             the prompt is longer than the context
    ├── ModelNotFoundError (LookupError)   no file, alias or running engine of that name
    ├── ModelLoadError                     the file exists but cannot be loaded
    │   ├── InvalidModelFileError          not GGUF, truncated, or an impossible header
    │   ├── InsufficientMemoryError        the model would not fit; says what would
    │   └── DownloadError                  the Hub has the file, but it did not arrive here
    ├── ModelUnloadedError                 the handle outlived its model
    ├── DrainingError                      the engine takes nothing new; nothing was begun
    ├── EngineError                        the engine failed while working on this request
    │   └── EngineGoneError                the process that held the model is gone or unreachable
    │       └── EngineDiedError            engines died of this request; it is not tried again
    ├── QueueFullError                     too many requests are waiting
    ├── LimitError                         a rate, a quota or a server's limit is reached
    ├── AccessError (PermissionError)      the key or token may not use this server
    ├── ModelBusyError                     the model is in use, or there is no room for it now
    ├── NotFoundError (LookupError)        no stored conversation, message or response of that id
    ├── ConflictError                      what was to be changed has changed meanwhile
    └── StoreError                         the database cannot be opened, read or written

A message says what happened and what to do next.
"""

from __future__ import annotations

__all__ = [
    "AccessError",
    "ConflictError",
    "ContextLengthError",
    "DownloadError",
    "DrainingError",
    "EngineDiedError",
    "EngineError",
    "EngineGoneError",
    "InsufficientMemoryError",
    "InvalidModelFileError",
    "InvalidRequestError",
    "LLMKitError",
    "LimitError",
    "ModelBusyError",
    "ModelLoadError",
    "ModelNotFoundError",
    "ModelUnloadedError",
    "NotFoundError",
    "QueueFullError",
    "StoreError",
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


class DownloadError(ModelLoadError):
    """A file of the Hub did not arrive whole: network, disk or checksum, or it was cancelled.

    What did arrive is kept, and the next try goes on from there.
    """


class ModelUnloadedError(LLMKitError):
    """The model behind this handle was unloaded."""

    @classmethod
    def of(cls, name: str) -> ModelUnloadedError:
        """For a model of this name."""
        return cls(f"the model {name!r} was unloaded; load it again with llmkit.load().")


class DrainingError(LLMKitError):
    """The engine ends soon and takes nothing new; nothing was begun: send the request elsewhere."""


class EngineError(LLMKitError):
    """The engine failed while working on this request; other requests go on."""


class EngineGoneError(EngineError):
    """The process that held the model is gone or does not respond."""


class EngineDiedError(EngineGoneError):
    """Two replicas in a row ended while they computed this request.

    Its prompt is refused for a minute, so that one that ends engines does not end all of them.
    """


class QueueFullError(LLMKitError):
    """The engine's queue is full; try again later."""


class LimitError(LLMKitError):
    """A server's limit for this caller is reached; the message says when it is lifted."""


class AccessError(LLMKitError, PermissionError):
    """A server does not let this key or token in; the message says who can change that."""


class ModelBusyError(LLMKitError):
    """The model is in use, or others in use leave no room for it; try again later."""


class NotFoundError(LLMKitError, LookupError):
    """There is no conversation, message or response of this id, or it is somebody else's."""


class ConflictError(LLMKitError):
    """Somebody else changed this conversation meanwhile, or is being answered in it now."""


class StoreError(LLMKitError):
    """The database cannot be opened, read or written; what it holds is as it was."""
