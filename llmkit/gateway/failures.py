"""Every error as the HTTP status and the error object that OpenAI's clients expect."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from llmkit import errors

__all__ = ["ApiError", "api_error"]


@dataclass(eq=False)
class ApiError(Exception):
    """An answer with an error status. ``retry=False`` tells SDKs not to repeat a request whose failure is certain."""

    status: int
    message: str
    type: str = "invalid_request_error"
    param: str | None = None
    code: str | None = None
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


NO_RETRY = {"x-should-retry": "false"}


def api_error(error: BaseException) -> ApiError:
    """The answer for an exception; what is not expected becomes a 500 that shows no internals."""
    if isinstance(error, ApiError):
        return error
    message = str(error)
    if isinstance(error, errors.ContextLengthError):
        return ApiError(400, message, param=error.param, code="context_length_exceeded")
    if isinstance(error, errors.InvalidRequestError):
        return ApiError(400, message, param=error.param)
    if isinstance(error, errors.ModelNotFoundError):
        return ApiError(404, message, param="model", code="model_not_found")
    if isinstance(error, errors.QueueFullError):
        return ApiError(429, message, "rate_limit_error", code="queue_full", headers={"Retry-After": "2"})
    if isinstance(error, errors.EngineGoneError | errors.ModelUnloadedError):
        return ApiError(503, message, "server_error", code="model_unavailable", headers={"Retry-After": "5"})
    if isinstance(error, errors.EngineError):
        return ApiError(500, message, "server_error", code="engine_error", headers=NO_RETRY)
    return ApiError(500, "The server failed on this request; its log says why.", "server_error", code="internal_error", headers=NO_RETRY)
