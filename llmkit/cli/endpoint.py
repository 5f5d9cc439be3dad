"""Any OpenAI-compatible endpoint as the command calls it: blocking, one connection a request.

Requests go straight to the endpoint, never through a proxy from the environment, which would see
the key; and no redirect is followed, for the same reason.
"""

from __future__ import annotations

import http.client
import json
import os
import ssl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from llmkit.errors import InvalidRequestError, LLMKitError
from llmkit.system.urls import UNRESERVED, http_parts

__all__ = ["Endpoint", "EndpointError", "Reply", "events_of"]

MAX_BODY, MAX_LINE = 64 << 20, 4 << 20
CONNECT_S, SILENCE_S = 10.0, 600.0
HINTS = {
    401: "the key is missing or wrong; give --api-key or set LLMKIT_API_KEY or OPENAI_API_KEY",
    403: "this key may not do that",
    404: "is the address right? It usually ends in /v1",
}


class EndpointError(LLMKitError):
    """The endpoint refused, failed, or sent what nobody can read; ``status`` 0: no answer."""

    def __init__(self, message: str, status: int = 0, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code = status, code


@dataclass(frozen=True, slots=True)
class Reply:
    """A whole reply; header names are lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        """Raises `EndpointError` if the body is not JSON."""
        try:
            return json.loads(self.body)
        except (ValueError, RecursionError):
            shown = self.body[:80].decode(errors="replace")
            raise EndpointError(
                f"the reply (status {self.status}) is not JSON: {shown!r}", self.status
            ) from None


class Endpoint:
    """An endpoint by its address.

    >>> endpoint = Endpoint("http://127.0.0.1:3000")
    >>> endpoint.base, endpoint.root
    ('http://127.0.0.1:3000/v1', 'http://127.0.0.1:3000')

    ``base`` is where OpenAI's routes are, ``root`` what is above its ``/v1``. Without a key, that
    of the environment is sent, unless ``from_environment`` is false: for an address that the user
    did not name. Raises `InvalidRequestError` for what is no address.
    """

    def __init__(
        self, base_url: str, api_key: str | None = None, *, from_environment: bool = True
    ) -> None:
        found = http_parts(base_url)
        if found is None:
            raise InvalidRequestError(
                f"an endpoint's address looks like http://127.0.0.1:3000/v1, not {base_url!r:.200}",
                "base_url",
            )
        url, self._port = found
        self._secure, self._host = url.scheme == "https", str(url.hostname)
        place = f"{url.scheme}://{url.netloc.rpartition('@')[2]}"
        path = quote(url.path.rstrip("/") or "/v1", safe=UNRESERVED)
        self.base, self.root = place + path, place + path.removesuffix("/v1")
        self._paths = {self.base: path, self.root: path.removesuffix("/v1")}
        key = api_key or (_environment_key() if from_environment else "")
        if any(not " " < c < "\x7f" for c in key):
            raise InvalidRequestError("the key holds characters that no key has.", "api_key")
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}

    def call(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        at_root: bool = False,
        headers: Mapping[str, str] | None = None,
        timeout_s: float = SILENCE_S,
    ) -> Reply:
        """Send ``body`` (bytes, or JSON), and read the whole reply. Raises `EndpointError`."""
        with self.open(
            method, path, body, at_root=at_root, headers=headers, timeout_s=timeout_s
        ) as response:
            return _whole(response)

    @contextmanager
    def open(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        at_root: bool = False,
        headers: Mapping[str, str] | None = None,
        timeout_s: float = SILENCE_S,
    ) -> Iterator[http.client.HTTPResponse]:
        """The same, with the reply still to be read; leaving closes the connection.

        ``timeout_s`` is the longest silence.
        """
        connection = self._connection()
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        sent = {"Accept": "*/*", "User-Agent": "llmkit", "Connection": "close", **self._headers}
        if data is not None:
            sent["Content-Type"] = "application/json"
        where = self._paths[self.root if at_root else self.base] + path
        try:
            try:
                connection.connect()
                connection.sock.settimeout(timeout_s)
                connection.request(method, where, data, {**sent, **(headers or {})})
                response = connection.getresponse()
            except (OSError, http.client.HTTPException, UnicodeError) as error:
                raise EndpointError(self._unreachable(error)) from None
            try:
                with response:  # it, not the connection, holds the socket
                    yield response
            except (OSError, http.client.HTTPException) as error:
                raise EndpointError(
                    f"the connection to {self.base} broke: {error or type(error).__name__}"
                ) from None
        finally:
            connection.close()

    def _connection(self) -> http.client.HTTPConnection:
        if self._secure:
            return http.client.HTTPSConnection(
                self._host, self._port, timeout=CONNECT_S, context=ssl.create_default_context()
            )
        return http.client.HTTPConnection(self._host, self._port, timeout=CONNECT_S)

    def _unreachable(self, error: Exception) -> str:
        if isinstance(error, ssl.SSLCertVerificationError):
            return f"the certificate of {self.base} is not trusted: {error.verify_message}"
        if isinstance(error, TimeoutError):
            return f"{self.base} does not answer in time."
        reason = getattr(error, "strerror", None) or error or type(error).__name__
        return f"nothing answers at {self.base}: {reason}"


def _environment_key() -> str:
    return os.environ.get("LLMKIT_API_KEY") or os.environ.get("OPENAI_API_KEY") or ""


def _whole(response: http.client.HTTPResponse) -> Reply:
    body = response.read(MAX_BODY + 1)
    if len(body) > MAX_BODY:
        raise EndpointError(f"the reply is longer than {MAX_BODY >> 20} MiB.", response.status)
    headers = {name.lower(): value for name, value in response.getheaders()}
    return Reply(response.status, headers, body)


def checked(reply: Reply) -> Reply:
    """The reply if it is a success. Raises `EndpointError` with the endpoint's own words."""
    if reply.status < 300:
        return reply
    if reply.status < 400:
        where = reply.headers.get("location", "elsewhere")
        raise EndpointError(f"the endpoint has moved to {where}; name that.", reply.status)
    message, code = "", None
    try:
        said = json.loads(reply.body)
        error = said.get("error", said) if isinstance(said, dict) else said
        if isinstance(error, dict):
            message = str(error.get("message") or error.get("detail") or "")
            code = str(error["code"]) if error.get("code") is not None else None
        else:
            message = str(error)
    except (ValueError, RecursionError):
        pass
    message = f"{message:.500}" or f"the endpoint answers with status {reply.status}"
    hint = HINTS.get(reply.status, "")
    raise EndpointError(f"{message} ({hint})" if hint else message, reply.status, code)


def events_of(response: http.client.HTTPResponse) -> Iterator[Any]:
    """The events of a stream (SSE); or the one object of an endpoint that does not stream.

    Raises `EndpointError` for a refusal, an event that is an error or is not JSON.
    """
    if response.status != 200:
        checked(_whole(response))
    if "event-stream" not in (response.getheader("content-type") or ""):
        yield _whole(response).json()
        return
    while line := response.readline(MAX_LINE + 1):
        if len(line) > MAX_LINE:
            raise EndpointError(f"an event is longer than {MAX_LINE >> 20} MiB.")
        if not line.startswith(b"data:"):
            continue  # names of events, and pings
        data = line[5:].strip()
        if data == b"[DONE]":
            return
        event = Reply(200, {}, data).json()
        if isinstance(event, dict) and event.get("error"):
            checked(Reply(500, {}, data))
        yield event
