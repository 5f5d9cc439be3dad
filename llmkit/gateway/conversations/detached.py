"""The exchange of a turn: it passes the gateway's stages without a client's connection.

Tornado loop only.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import quote

from tornado.httputil import HTTPHeaders, HTTPServerRequest, RequestStartLine

from llmkit.gateway.access.held import Held
from llmkit.gateway.access.identity import Identity
from llmkit.gateway.exchange import Exchange
from llmkit.gateway.failures import ApiError

if TYPE_CHECKING:
    from llmkit.gateway.conversations.turns import Turn

__all__ = ["PASSED", "TurnExchange", "Wish"]

# What a client may say about its turn beside the body.
PASSED = ("cache-control", "x-llmkit-timeout", "x-request-timeout", "x-request-id", "traceparent")


@dataclass(frozen=True, slots=True)
class Wish:
    """What is wanted of a session; without a ``session_id`` of a new one."""

    kind: Literal["send", "edit", "regenerate"]
    session_id: str | None = None
    message_id: str | None = None


class Nowhere:
    """In place of a server's handler: a request, and nobody who reads the answer."""

    def __init__(self, path: str, headers: Mapping[str, str], body: bytes) -> None:
        kept = HTTPHeaders({"Host": "turn"})
        for name, value in headers.items():
            kept.add(name, value)
        line = RequestStartLine("POST", quote(path, errors="replace"), "HTTP/1.1")
        self.request = HTTPServerRequest(start_line=line, headers=kept, body=body)
        self.headers: dict[str, str] = {}  # of the answer

    def set_header(self, name: str, value: str) -> None:
        self.headers[name.lower()] = value

    def set_status(self, status_code: int) -> None:
        """It is in the exchange's record."""

    def get_query_argument(self, name: str, default: str | None) -> str | None:
        return default

    def write(self, chunk: str | bytes) -> None:
        """Nobody reads it."""

    def flush(self) -> asyncio.Future[None]:
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        done.set_result(None)
        return done

    def finish(self, chunk: str | bytes | None = None) -> asyncio.Future[None]:
        return self.flush()


class TurnExchange(Exchange):
    """A turn's request.

    ``failure`` is what it was refused with, or ended by.
    """

    is_detached = True

    def __init__(
        self,
        turn: Turn,
        wish: Wish,
        body: bytes,
        headers: Mapping[str, str],
        identity: Identity,
        held: Held,
        address: str,
        *,
        path: str,
    ) -> None:
        names = {name.lower(): value for name, value in headers.items()}
        passed = {name: names[name] for name in PASSED if name in names}
        self._nowhere = Nowhere(path, passed, body)
        super().__init__(self._nowhere, path, identity, held, address)
        self.turn, self.wish = turn, wish
        self.failure: ApiError | None = None

    @property
    def answer_headers(self) -> dict[str, str]:
        """What the answer says of the request, for whoever relays it."""
        named = self._nowhere.headers.items()
        return {name: value for name, value in named if name.startswith("x-")}

    def send_error(self, error: ApiError) -> None:
        self.record.status, self.record.error = error.status, error.code or error.type
        self.failure = error

    def send_json(
        self, value: Any, status: int = 200, headers: dict[str, str] | None = None
    ) -> None:
        raise AssertionError("a turn is answered by its events")
