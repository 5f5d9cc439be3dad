"""An HTTP request and its answer, whatever the server. Tornado loop only.

Routes see only this, never Tornado's handlers.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Awaitable, Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from pydantic import BaseModel
from tornado import gen, httputil, iostream

from llmkit.gateway.access.held import Held
from llmkit.gateway.access.identity import ADMIN, LOCAL, Identity, counted_as
from llmkit.gateway.failures import ApiError, dialect_of
from llmkit.gateway.ids import random_hex
from llmkit.gateway.media.fetching import Fetcher
from llmkit.gateway.record import Record
from llmkit.protocol import GenerationRequest

if TYPE_CHECKING:
    from llmkit.gateway.adapters import Scales
    from llmkit.gateway.conversations.turns import Turns
    from llmkit.gateway.reading import Reading
    from llmkit.protocol.client import EngineClient

__all__ = ["MAX_BODY_BYTES", "ClientGoneError", "Exchange", "Transport", "body_too_large"]

Schema = TypeVar("Schema", bound=BaseModel)

WRITE_TIMEOUT_S = 60
_unread: set[asyncio.Task[None]] = set()  # asyncio itself keeps no task alive
MAX_BODY_BYTES = 16 << 20


class Keeper(Protocol):
    """Decides how long a model stays loaded."""

    def keep(self, exchange: Exchange, model: str, seconds: float | None) -> bool:
        """A caller wants a model unloaded after so many idle seconds; None is never.

        Whether it is done. Raises `ModelNotFoundError`.
        """
        ...


class Transport(Protocol):
    """What an exchange needs of its server: the request, and ways to answer it.

    Tornado's handlers have it.
    """

    request: httputil.HTTPServerRequest

    def set_header(self, name: str, value: str) -> None: ...
    def set_status(self, status_code: int) -> None: ...
    def get_query_argument(self, name: str, default: str | None) -> str | None: ...
    def write(self, chunk: str | bytes) -> None: ...
    def flush(self) -> asyncio.Future[None]: ...
    def finish(self, chunk: str | bytes | None = None) -> asyncio.Future[None]: ...


class ClientGoneError(Exception):
    """The client closed the connection, or stopped reading."""


class Exchange:
    """A request to a route: ``method``, ``path`` (under the mount) and ``body``.

    It is answered once, by ``send_json`` or as events. ``identity`` is the caller's, ``address``
    the client's; ``held`` counts the bytes of the answer until they are read.
    """

    is_detached = False  # whether it is a turn's, which no client's connection belongs to

    def __init__(
        self,
        handler: Transport,
        path: str,
        identity: Identity = LOCAL,
        held: Held | None = None,
        address: str | None = None,
    ) -> None:
        self._handler = handler
        self.identity = identity
        self.address = str(handler.request.remote_ip) if address is None else address
        self.counted_as = counted_as(identity, self.address)  # whose limits it counts for
        self.scope = ""  # what its route needs, set by the gateway
        self.max_body_bytes = MAX_BODY_BYTES
        self._held = held or Held()
        self.method = str(handler.request.method)
        self.path = "/" + path.strip("/")
        self.dialect = dialect_of(self.path)  # whose shape its errors have, set by the gateway
        self.path_ends_with_slash = handler.request.path.endswith("/")
        self.args: tuple[str, ...] = ()
        self.request_id = handler.request.headers.get("x-request-id", "")[:100] or random_hex()
        if not self.request_id.isprintable():
            self.request_id = random_hex()
        self.streaming = False
        self.reading: Reading | None = None  # set by the gateway
        self.fetcher = Fetcher()  # the same
        self.keeper: Keeper | None = None  # the same
        self.turns: Turns | None = None  # the same
        # The adapters of its requests that name none; the same.
        self.lora: Callable[[EngineClient], Scales | None] = lambda _: None
        self.relays = False  # whether its route only passes on a turn's events
        self.record = Record(request_id=self.request_id)
        self.route = ""  # the pattern of its path, set by the gateway
        self.cleanup = contextlib.ExitStack()  # closed once the route has ended
        self.before_events: Callable[[], Awaitable[object]] | None = None  # what they wait for
        self.given: frozenset[str] = frozenset()  # names of the fields that the caller sent
        self.ignored: list[str] = []  # fields that are accepted but have no effect
        self.framed_by = "'self'"  # whose pages may show its page in a frame
        self.has_login = False  # whether a browser logs in at /login
        self.proof = ""  # what scripts of its page send with each request
        self._stream: iostream.IOStream | None = getattr(handler.request.connection, "stream", None)
        handler.set_header("x-request-id", self.request_id)

    @property
    def caller(self) -> str:
        """The unit of fair sharing in the engine, never what a client claims to be."""
        return self.identity.name

    def owned(
        self, engine: EngineClient, requests: list[GenerationRequest]
    ) -> list[GenerationRequest]:
        """The requests as this caller's. Raises `InvalidRequestError` for unknown adapters."""
        lora = self.lora(engine)
        return [
            replace(
                r,
                caller=self.caller,
                cache_scope=self.identity.cache_scope,
                weight=self.identity.allowance.weight,
                lora=lora if r.lora is None else r.lora,
            )
            for r in requests
        ]

    def shown_path(self, path: str) -> str:
        """A path as its caller may see it: all of it is for administrators."""
        return path if ADMIN in self.identity.scopes else PurePath(path).name

    def ignore(self, name: str) -> None:
        """Note that a field has no effect. With ``strict``, raises `InvalidRequestError`."""
        if self.reading is not None:
            self.reading.tolerance.note(name)
        self.ignored.append(name)

    @property
    def body(self) -> bytes:
        body = self._handler.request.body
        if len(body) > self.max_body_bytes:
            raise body_too_large(str(len(body)), self.max_body_bytes)
        return body

    async def read(self, schema: type[Schema]) -> Schema:
        """The body as a schema. Raises `InvalidRequestError` naming the first invalid field."""
        assert self.reading is not None
        return await self.reading.read(self, schema)

    async def read_form(self, schema: type[Schema], lists: frozenset[str]) -> Schema:
        """As ``read``, for a form with files; fields in ``lists`` hold lists."""
        assert self.reading is not None
        return await self.reading.read_form(self, schema, lists)

    async def fields(self) -> dict[str, Any]:
        """The body's fields as they came, for a route whose schema depends on them."""
        assert self.reading is not None
        return await self.reading.fields(self)

    @property
    def wants_page(self) -> bool:
        """Whether a browser asks for a page."""
        return self.method == "GET" and "text/html" in self._handler.request.headers.get(
            "Accept", ""
        )

    @property
    def query_string(self) -> str:
        """The query as it was sent, without its question mark."""
        return self._handler.request.query

    def header(self, name: str) -> str | None:
        """A header of the request."""
        return self._handler.request.headers.get(name)

    def set_header(self, name: str, value: str) -> None:
        """A header of the answer, before it begins."""
        self._handler.set_header(name, value)

    def query(self, name: str) -> str | None:
        """A query parameter."""
        return self._handler.get_query_argument(name, None)

    def send_json(
        self, value: Any, status: int = 200, headers: dict[str, str] | None = None
    ) -> None:
        self.send_bytes(json.dumps(value).encode(), status, headers)

    def send_bytes(
        self,
        data: bytes,
        status: int = 200,
        headers: dict[str, str] | None = None,
        content_type: str = "application/json",
    ) -> None:
        """Send a complete answer. A client that reads nothing for a minute is dropped."""
        self._handler.set_status(status)
        self.record.status = status
        for name, text in (headers or {}).items():
            self._handler.set_header(name, text)
        self._say_ignored()
        self._handler.set_header("Content-Type", content_type)
        with contextlib.suppress(iostream.StreamClosedError):
            sent = self._handler.finish(data) if data else self._handler.finish()
            if self._stream is not None and self._stream.writing():
                _unread.add(task := asyncio.ensure_future(self._watch(sent, len(data))))
                task.add_done_callback(_unread.discard)

    async def _watch(self, sent: Any, size: int) -> None:
        """Count an unread answer as held for its caller."""
        try:
            self._held.add(self.counted_as, size)
        except ApiError:
            size = 0
            self.drop()
            return
        try:
            await gen.with_timeout(
                timedelta(seconds=WRITE_TIMEOUT_S),
                sent,
                quiet_exceptions=iostream.StreamClosedError,
            )
        except (iostream.StreamClosedError, TimeoutError):
            self.drop()
        finally:
            self._held.add(self.counted_as, -size)

    def hold(self, size: int) -> None:
        """Count bytes that a request brings in as held for its caller, until its route has ended.

        Raises `ApiError` if too much is held.
        """
        self._held.add(self.counted_as, size)
        self.cleanup.callback(self._held.add, self.counted_as, -size)

    def _say_ignored(self) -> None:
        if self.ignored:
            self._handler.set_header(
                "x-llmkit-ignored", ", ".join(dict.fromkeys(self.ignored))[:2000]
            )

    def send_page(
        self,
        text: str,
        status: int = 200,
        headers: dict[str, str] | None = None,
        *,
        has_assets: bool = False,
    ) -> None:
        """Send HTML that runs no script and fetches nothing.

        With ``has_assets`` it may use the scripts, styles and routes of this server, and no others.
        """
        for name, value in (headers or {}).items():
            self._handler.set_header(name, value)
        allowed = (
            "script-src 'self'; style-src 'self'; img-src 'self' blob:; connect-src 'self'"
            if has_assets
            else "style-src 'unsafe-inline'"
        )
        self._handler.set_header(
            "Content-Security-Policy",
            f"default-src 'none'; {allowed}; form-action 'none'; base-uri 'none'; "
            f"frame-ancestors {self.framed_by}",
        )
        # A link in a text would have its host looked up before anybody follows it.
        self._handler.set_header("X-DNS-Prefetch-Control", "off")
        self.send_bytes(text.encode(), status, content_type="text/html; charset=utf-8")

    def send_error(self, error: ApiError) -> None:
        """Send an error object; in a stream as the last event, with no ``[DONE]`` after it."""
        self.record.status, self.record.error = error.status, error.code or error.type
        dialect = self.dialect
        body = error.body(dialect, self.request_id)
        if not self.streaming:
            self.send_json(body, error.status, error.headers)
            return
        before = {"anthropic": "event: error\ndata: ", "ollama": ""}.get(dialect, "data: ")
        try:
            self._handler.write(
                f"{before}{json.dumps(body)}" + ("\n" if dialect == "ollama" else "\n\n")
            )
            self._handler.finish()
        except (iostream.StreamClosedError, RuntimeError):
            return

    async def start_events(self, content_type: str = "text/event-stream") -> None:
        if self.before_events is not None:
            await self.before_events()
        self.streaming = True
        if self.record.deadline is not None:
            self.record.deadline.begin_stream()
        self.record.status = 200
        if self._stream is not None:
            self._stream.set_nodelay(True)  # else a token may wait 40 ms for the last one's ACK
        self._say_ignored()
        self._handler.set_header("Content-Type", content_type)
        self._handler.set_header("Cache-Control", "no-cache")
        # JupyterHub's and other proxies must not buffer.
        self._handler.set_header("X-Accel-Buffering", "no")

    async def send_text(self, text: str) -> None:
        """Write and flush; waits only for a slow reader.

        Raises `ClientGoneError` if the client is gone, or reads nothing for a minute.
        """
        await self._put(text)

    async def _put(self, data: str | bytes) -> None:
        self._handler.write(data)
        try:
            flushed = self._handler.flush()
            if (
                self._stream is not None
                and not self._stream.writing()
                and not self._stream.closed()
            ):
                return  # the system has it all; awaiting would only cost a turn of the loop
            await gen.with_timeout(timedelta(seconds=WRITE_TIMEOUT_S), flushed)
        except (iostream.StreamClosedError, TimeoutError) as error:
            raise ClientGoneError from error

    async def send_part(self, data: bytes) -> None:
        """Send a part of a long answer, which is held for its caller until it is read.

        Raises what ``send_text`` raises, and `ApiError` if too much is held.
        """
        self._held.add(self.counted_as, len(data))
        try:
            await self._put(data)
        finally:
            self._held.add(self.counted_as, -len(data))

    async def send_event(self, value: Any) -> None:
        await self.send_text(f"data: {json.dumps(value)}\n\n")

    async def send_named_event(self, value: dict[str, Any]) -> None:
        """Send an event with its type."""
        await self.send_text(f"event: {value['type']}\ndata: {json.dumps(value)}\n\n")

    async def send_line(self, value: Any) -> None:
        """Send a line of NDJSON."""
        await self.send_text(json.dumps(value) + "\n")

    def drop(self) -> None:
        """Close the connection, when the client does not read."""
        if self._stream is not None:
            self._stream.close()

    def end_events(self, mark: str = "data: [DONE]\n\n") -> None:
        if mark:
            self._handler.write(mark)
        self._handler.finish()


def body_too_large(size: str, most: int) -> ApiError:
    return ApiError(
        413,
        f"The body has {size:.20} bytes; at most {most} are accepted.",
        code="request_too_large",
    )
