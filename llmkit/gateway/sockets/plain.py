"""Bodies of requests that a client sends over a socket instead of posting them. Tornado loop only.

They are dispatched like any request, and tied to the socket as a request is to its connection.
The data of each event is one text frame, and a stream ends with ``[DONE]``; an answer that is not
streamed is one frame.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from tornado.httputil import HTTPHeaders, HTTPServerRequest, RequestStartLine

from llmkit.gateway.access.held import Held
from llmkit.gateway.access.identity import Identity
from llmkit.gateway.exchange import Exchange
from llmkit.gateway.failures import ApiError
from llmkit.gateway.sockets.messages import Head

__all__ = ["PlainExchange", "body_of", "path_of"]

CHAT, PROMPTED = "/v1/chat/completions", "/chat/completions"
DONE = b"[DONE]"


def path_of(head: Head) -> str:
    """The route that a body is for: OpenAI's chat, or the one whose clients send a prompt."""
    return CHAT if head.messages and not head.model_name else PROMPTED


def body_of(head: Head, data: bytes) -> bytes:
    """The body to dispatch: what does not say otherwise is streamed."""
    return data if head.stream else b'{"stream":true,' + data.lstrip()[1:]


class FrameTransport:
    """In place of a server's handler: the request, of whose answer frames are made elsewhere."""

    def __init__(self, path: str, headers: Mapping[str, str], body: bytes) -> None:
        self.request = HTTPServerRequest(
            start_line=RequestStartLine("POST", path, "HTTP/1.1"),
            headers=HTTPHeaders(headers),
            body=body,
        )

    def set_header(self, name: str, value: str) -> None:
        """Frames have none."""

    def set_status(self, status_code: int) -> None:
        """It is in the exchange's record."""

    def get_query_argument(self, name: str, default: str | None) -> str | None:
        return default

    def write(self, chunk: str | bytes) -> None:
        raise AssertionError("frames are sent by `send_text`, which waits for their reader")

    def flush(self) -> asyncio.Future[None]:
        raise AssertionError("frames are sent by `send_text`, which waits for their reader")

    def finish(self, chunk: str | bytes | None = None) -> asyncio.Future[None]:
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        done.set_result(None)
        return done


class PlainExchange(Exchange):
    """The request that such a body stands for; ``send`` sends a frame, and waits for its reader."""

    def __init__(
        self,
        path: str,
        body: bytes,
        send: Callable[[bytes], Awaitable[None]],
        identity: Identity,
        held: Held,
        address: str,
    ) -> None:
        headers = {"Host": "socket", "Content-Type": "application/json"}
        super().__init__(FrameTransport(path, headers, body), path, identity, held, address)
        self._send = send
        self.last: bytes | None = None  # the frame that ends the answer, if one is still to be sent

    def send_bytes(
        self,
        data: bytes,
        status: int = 200,
        headers: dict[str, str] | None = None,
        content_type: str = "application/json",
    ) -> None:
        self.record.status = status
        self.last = data

    def send_error(self, error: ApiError) -> None:
        self.record.status, self.record.error = error.status, error.code or error.type
        self.last = json.dumps(error.body("openai", self.request_id)).encode()

    async def send_text(self, text: str) -> None:
        for event in text.split("\n\n"):
            lines = [line[6:] for line in event.split("\n") if line.startswith("data: ")]
            if lines:
                await self._send("\n".join(lines).encode())

    async def send_event(self, value: Any) -> None:
        await self._send(json.dumps(value).encode())

    def drop(self) -> None:
        """The socket sees to it."""

    def end_events(self, mark: str = "") -> None:
        """Whatever the dialect's mark is: a socket has no end of an answer."""
        self.last = DONE
