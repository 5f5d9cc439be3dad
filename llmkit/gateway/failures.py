"""Errors as HTTP statuses, and as the error objects that each dialect's clients expect. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from tornado import web

from llmkit import errors

__all__ = [
    "NO_RETRY",
    "ApiError",
    "DeadlineError",
    "Dialect",
    "api_error",
    "dialect_of",
    "not_supported",
]

Dialect = Literal["openai", "anthropic", "ollama", "llama-server", "llms", "llmkit"]
ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
LLAMA_SERVER_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    501: "not_supported_error",
    503: "unavailable_error",
}
LLMS_CODES = {400: "BAD_REQUEST", 404: "UNSUPPORTED_MODEL", 503: "SERVICE_UNAVAILABLE"}
NO_RETRY = {"x-should-retry": "false"}
# Why a model could not be loaded names paths, hosts and other models, and quotes logs.
ASK = "Ask whoever runs this server: its log says why."
NO_ROOM = f"There is no room for this model. {ASK}"
NOT_LOADED = f"This model cannot be loaded. {ASK}"
NOT_FETCHED = f"A file of this model could not be downloaded. {ASK}"


def dialect_of(path: str) -> Dialect:
    """The dialect of a path that no route has."""
    if path.startswith("/api/"):
        return "ollama"
    return "anthropic" if path.startswith("/v1/messages") else "openai"


@dataclass(eq=False)
class ApiError(Exception):
    """An error response; ``headers`` may tell SDKs whether to retry (`NO_RETRY`, Retry-After)."""

    status: int
    message: str
    type: str = "invalid_request_error"
    param: str | None = None
    code: str | None = None
    headers: dict[str, str] = field(default_factory=dict)
    details: dict[str, int] = field(default_factory=dict)  # for dialects that have a place for it

    def body(self, dialect: Dialect, request_id: str) -> dict[str, Any]:
        """The error object of a dialect."""
        if dialect == "ollama":
            return {"error": self.message}
        if dialect == "llms":
            # Of what is not found, only a model has a code of its own there.
            is_known = self.status != 404 or self.code == "model_not_found"
            code = (LLMS_CODES.get(self.status) if is_known else None) or (
                self.code or self.type
            ).upper()
            return {"error": self.message, "code": code}
        if dialect == "anthropic":
            return {
                "type": "error",
                "error": {
                    "type": ANTHROPIC_TYPES.get(self.status, "api_error"),
                    "message": self.message,
                },
                "request_id": request_id,
            }
        if dialect == "llama-server":
            kind = (
                "exceed_context_size_error"
                if self.code == "context_length_exceeded"
                else LLAMA_SERVER_TYPES.get(self.status, self.type)
            )
            said = {"code": self.status, "message": self.message, "type": kind}
            return {"error": said | self.details}
        error = {
            "message": self.message,
            "type": self.type,
            "param": self.param,
            "code": self.code,
        }
        return {"error": error | self.details if dialect == "llmkit" else error}


def not_supported(message: str) -> ApiError:
    """What this server does not do, though others have a route for it."""
    return ApiError(501, message, "not_supported_error", headers=dict(NO_RETRY))


class DeadlineError(errors.LLMKitError):
    """The request did not end in the time that its caller, or the server, gives it.

    ``retry_after``: seconds after which one that never began may be sent again.
    """

    def __init__(
        self, message: str, *, is_callers: bool = False, retry_after: int | None = None
    ) -> None:
        super().__init__(message)
        self.is_callers, self.retry_after = is_callers, retry_after


def api_error(error: BaseException, *, for_admin: bool = False) -> ApiError:
    """The response for an exception; an unexpected one is a 500 that reveals no internals. Why a
    model could not be loaded is only said ``for_admin``."""
    if isinstance(error, ApiError):
        return error
    message = str(error)
    if isinstance(error, web.HTTPError):  # Tornado's own, say for a query that is not UTF-8
        return ApiError(
            error.status_code, error.log_message or error.reason or "The request is invalid."
        )
    if isinstance(error, errors.ContextLengthError):
        details = {"n_prompt_tokens": error.num_tokens, "n_ctx": error.n_ctx}
        return ApiError(
            400, message, param=error.param, code="context_length_exceeded", details=details
        )
    if isinstance(error, errors.InvalidRequestError):
        return ApiError(400, message, param=error.param)
    if isinstance(error, errors.ModelNotFoundError):
        return ApiError(404, message, param="model", code="model_not_found")
    if isinstance(error, errors.QueueFullError):
        return ApiError(
            429, message, "rate_limit_error", code="queue_full", headers={"Retry-After": "2"}
        )
    if isinstance(error, DeadlineError):
        retry = error.retry_after
        return ApiError(
            408 if error.is_callers else 504,
            message,
            "timeout_error",
            code="timeout",
            headers=NO_RETRY if retry is None else {"Retry-After": str(retry)},
        )
    if isinstance(error, errors.ModelBusyError):
        return ApiError(
            503, message, "server_error", code="model_busy", headers={"Retry-After": "5"}
        )
    if isinstance(error, errors.NotFoundError):
        return ApiError(404, message, code="not_found")
    if isinstance(error, errors.ConflictError):
        return ApiError(409, message, code="conflict", headers=NO_RETRY)
    if isinstance(error, errors.StoreError):
        return ApiError(
            503, message, "server_error", code="store_unavailable", headers={"Retry-After": "5"}
        )
    if isinstance(error, errors.DownloadError):
        said = message if for_admin else NOT_FETCHED
        return ApiError(502, said, "server_error", code="download_failed")
    if isinstance(error, errors.ModelLoadError):
        is_full = isinstance(error, errors.InsufficientMemoryError)
        said = message if for_admin else NO_ROOM if is_full else NOT_LOADED
        return ApiError(503, said, "server_error", code="model_load_failed", headers=NO_RETRY)
    if isinstance(error, errors.EngineDiedError):
        return ApiError(500, message, "server_error", code="engine_died", headers=NO_RETRY)
    if isinstance(error, errors.EngineGoneError | errors.ModelUnloadedError | errors.DrainingError):
        return ApiError(
            503, message, "server_error", code="model_unavailable", headers={"Retry-After": "5"}
        )
    if isinstance(error, errors.EngineError):
        return ApiError(500, message, "server_error", code="engine_error", headers=NO_RETRY)
    return ApiError(
        500,
        "Internal server error; the server's log has the details.",
        "server_error",
        code="internal_error",
        headers=NO_RETRY,
    )
