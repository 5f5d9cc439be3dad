"""What those are told who are refused because others are served: why, and when to come back.
Pure."""

from __future__ import annotations

from llmkit.gateway.access.service_rate import clipped
from llmkit.gateway.failures import ApiError

__all__ = ["displaced", "late", "queue_full", "server_busy", "too_many"]


def server_busy(num_waiting: int, max_queue: int | None, retry: int) -> ApiError:
    message = (
        f"The server is busy: {num_waiting} requests are waiting, and at most {max_queue} may. "
        f"Try again in {retry} s."
    )
    return _refusal(503, message, "server_busy", retry)


def displaced(retry: int) -> ApiError:
    message = (
        "The server is busy, and this caller has the most requests waiting: this one made way for "
        f"another caller's. Try again in {retry} s."
    )
    return _refusal(503, message, "server_busy", retry)


def late(wait_s: float, left_s: float) -> ApiError:
    """It would begin after its time."""
    message = (
        f"This request would begin in about {clipped(wait_s)} s, and its time ends in "
        f"{left_s:.3g} s. Allow it more time, or send it later."
    )
    return _refusal(503, message, "cannot_begin_in_time", clipped(wait_s))


def too_many(most: int, duration_s: float) -> ApiError:
    """The caller has as many as it may; each takes so long."""
    retry = clipped(duration_s / most)
    message = (
        f"{most} requests of this caller are running or waiting, which is as many as it may have "
        f"at once; send this one when one of them has ended, in about {retry} s."
    )
    return _refusal(429, message, "too_many_concurrent_requests", retry)


def queue_full(message: str, retry: int) -> ApiError:
    """The engine's own refusal, in whatever dialect."""
    return _refusal(429, f"{message} (in {retry} s).", "queue_full", retry)


def _refusal(status: int, message: str, code: str, retry: int) -> ApiError:
    kind = "rate_limit_error" if status == 429 else "server_error"
    return ApiError(status, message, kind, code=code, headers={"Retry-After": str(retry)})
