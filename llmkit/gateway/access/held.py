"""The bytes that the gateway holds per caller: bodies, and unread answers. Tornado loop only."""

from __future__ import annotations

from llmkit.gateway.failures import ApiError

__all__ = ["MAX_HELD_BYTES", "Held"]

SMALL_BYTES = 64 << 10
MAX_HELD_BYTES = 64 << 20  # per caller; a request may have 16 MiB


class Held:
    """A limit in bytes per caller.

    >>> held = Held(10)
    >>> held.add("ann", 8); held.add("ann", -8)
    """

    def __init__(self, most: int = MAX_HELD_BYTES) -> None:
        self._most = most
        self._bytes: dict[str, int] = {}

    def of(self, caller: str) -> int:
        return self._bytes.get(caller, 0)

    def add(self, caller: str, size: int, *, body: int = 1 << 60) -> None:
        """Add to a caller's bytes, or subtract.

        Raises `ApiError` above the limit, except for a small ``body``: stalled large requests must
        not block those.
        """
        held = self._bytes.get(caller, 0) + size
        if size > 0 and held > self._most and body > SMALL_BYTES:
            message = (
                f"{held >> 20} MiB of requests and unread answers of this caller are pending; "
                f"the limit is {self._most >> 20}. Read the answers, or send less."
            )
            raise ApiError(
                429, message, "rate_limit_error", code="too_much_held", headers={"Retry-After": "2"}
            )
        if held > 0:
            self._bytes[caller] = held
        else:
            self._bytes.pop(caller, None)
