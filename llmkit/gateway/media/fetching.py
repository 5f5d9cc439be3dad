"""Pictures from other hosts: only from those that the operator names, and only from the internet.

Tornado loop only. What an address says is a stranger's wish: this server may reach what the
stranger cannot. So the host must be on the list, its addresses public, and the connection goes to
the very address that was looked at; redirects are not followed.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import socket
import ssl
from collections.abc import Awaitable, Callable, Collection
from urllib.parse import SplitResult, urlsplit

from llmkit.errors import InvalidRequestError
from llmkit.version import __version__

__all__ = ["Fetcher"]

MAX_BYTES = 10_000_000
MAX_HEAD = 32 << 10
FETCH_S = 10.0
HTTPS = 443
MAX_URL = 4096
Resolve = Callable[[str, int], Awaitable[list[str]]]


class Fetcher:
    """Fetches from ``hosts``; without any, nothing is fetched.

    ``resolve`` gives the addresses of a host, and ``tls`` checks its certificate.
    """

    def __init__(
        self,
        hosts: Callable[[], Collection[str]] = tuple,
        *,
        resolve: Resolve | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._hosts, self._resolve, self._tls = hosts, resolve or _resolved, tls

    async def fetch(self, url: str, param: str) -> bytes:
        """The file at an address. Raises `InvalidRequestError`, for each reason in the same words:
        nothing is to be learnt about what this server can reach."""
        parts = self._allowed(url, param)
        try:
            async with asyncio.timeout(FETCH_S):
                return await self._get(parts)
        except (OSError, TimeoutError, ValueError, EOFError, asyncio.LimitOverrunError) as error:
            why = str(error) if isinstance(error, FetchError) else "it cannot be reached"
            raise InvalidRequestError(
                f"{param}: {parts.hostname:.100} gave no file: {why}. Send it as data:…;base64,…",
                param,
            ) from None

    def _allowed(self, url: str, param: str) -> SplitResult:
        hosts = self._hosts()
        try:
            parts = urlsplit(url) if len(url) <= MAX_URL else None
            port = None if parts is None else parts.port
        except ValueError:
            parts, port = None, None
        is_plain = parts is not None and not parts.username and not parts.password
        if parts is None or not is_plain or parts.scheme != "https" or port not in (None, HTTPS):
            raise InvalidRequestError(
                f"{param}: pictures and sounds must be sent as data:…;base64,…"
                + ("" if not hosts else ", or be at an https:// address")
                + ".",
                param,
            )
        host = (parts.hostname or "").rstrip(".")
        if host not in {each.lower() for each in hosts}:
            raise InvalidRequestError(
                f"{param}: this server fetches nothing from {host:.100}: send the file as "
                "data:…;base64,…. (Its operator may allow hosts by media_hosts.)",
                param,
            )
        return parts

    async def _get(self, parts: SplitResult) -> bytes:
        host = str(parts.hostname).rstrip(".").encode("idna").decode()
        addresses = await self._resolve(host, HTTPS)
        if not addresses or not all(_is_public(each) for each in addresses):
            raise FetchError("its address is not a public one")
        context = self._tls or ssl.create_default_context()
        reader, writer = await asyncio.open_connection(
            addresses[0], HTTPS, ssl=context, server_hostname=host, limit=MAX_HEAD
        )
        try:
            target = parts.path or "/"
            target += f"?{parts.query}" if parts.query else ""
            if not target.isascii() or not target.isprintable() or " " in target:
                raise FetchError("its address must be percent-encoded")
            head = (
                f"GET {target} HTTP/1.0\r\nHost: {host}\r\nUser-Agent: llmkit/{__version__}\r\n"
                "Accept: image/*, audio/*\r\nAccept-Encoding: identity\r\n"
                "Connection: close\r\n\r\n"
            )
            writer.write(head.encode())
            await writer.drain()
            status, length = _head(await reader.readuntil(b"\r\n\r\n"))
            if 300 <= status < 400:
                raise FetchError("it leads elsewhere, and redirects are not followed")
            if status != 200:
                raise FetchError(f"it answered {status}")
            data = await _body(reader)
            if length is not None and len(data) < length:
                raise FetchError("it was cut off")
            return data
        finally:
            writer.close()
            with contextlib.suppress(OSError, ssl.SSLError):
                writer.transport.abort()


class FetchError(ValueError):
    """Why there is no file; a caller may know."""


async def _body(reader: asyncio.StreamReader) -> bytes:
    data = bytearray()
    while chunk := await reader.read(1 << 16):
        data += chunk
        if len(data) > MAX_BYTES:
            raise FetchError(f"it has more than {MAX_BYTES // 1_000_000} MB")
    return bytes(data)


def _head(head: bytes) -> tuple[int, int | None]:
    """Status and length of an answer."""
    line, *lines = head.decode("latin-1").split("\r\n")
    version, _, rest = line.partition(" ")
    if not version.startswith("HTTP/1.") or not rest[:3].isdecimal():
        raise FetchError("it speaks no HTTP")
    parts = (each.partition(":") for each in lines)
    fields = {name.strip().lower(): value.strip() for name, _, value in parts}
    if "transfer-encoding" in fields:  # which no server may send to HTTP/1.0
        raise FetchError("it speaks no HTTP/1.0")
    length = fields.get("content-length", "")
    return int(rest[:3]), int(length) if length.isdecimal() and len(length) < 19 else None


async def _resolved(host: str, port: int) -> list[str]:
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(each[4][0]) for each in found]


def _is_public(address: str) -> bool:
    """Whether it is an address of the internet at large, whatever it is written as."""
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(found, ipaddress.IPv6Address):
        if found.ipv4_mapped or found.sixtofour or found.teredo:
            return False
        if found in ipaddress.ip_network("64:ff9b::/96"):  # NAT64: an IPv4 address within
            return False
    return found.is_global and not found.is_multicast and not found.is_reserved
