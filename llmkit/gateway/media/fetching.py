"""Pictures from other hosts: only from those that the operator names, and only from the internet.

Tornado loop only. What an address says is a stranger's wish: this server may reach what the
stranger cannot. So the host must be on the list, its addresses public, and the connection goes to
the very address that was looked at; redirects are not followed.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import math
import socket
import ssl
from collections.abc import Awaitable, Callable, Collection, Sequence
from urllib.parse import SplitResult, urlsplit

from llmkit.errors import InvalidRequestError
from llmkit.version import __version__

__all__ = ["Fetcher"]

MAX_BYTES = 10_000_000
MAX_HEAD = 32 << 10
FETCH_S = 10.0
CONNECT_S = 3.0  # to one of several addresses
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

    async def fetch(self, url: str, param: str, until: float = math.inf) -> bytes:
        """The file at an address, by a time of the loop's clock.

        Raises `InvalidRequestError`. Why a host cannot be reached is not said: nothing is to be
        learnt about what this server can reach.
        """
        parts = self._allowed(url, param)
        now = asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout_at(min(until, now + FETCH_S)):
                return await self._get(parts)
        except (OSError, TimeoutError, ValueError, EOFError, asyncio.LimitOverrunError) as error:
            why = str(error) if isinstance(error, FetchError) else "it cannot be reached"
            raise InvalidRequestError(
                f"{param}: could not fetch the file from {parts.hostname:.100}: {why}. Send it as "
                "a data: URL.",
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
                f"{param}: pictures and sounds must be sent as a data: URL"
                + ("" if not hosts else ", or be at an https:// address")
                + ".",
                param,
            )
        host = (parts.hostname or "").rstrip(".")
        if host not in {each.lower() for each in hosts}:
            raise InvalidRequestError(
                f"{param}: this server fetches nothing from {host:.100}: send the file as "
                "a data: URL. (Its operator may allow hosts by media_hosts.)",
                param,
            )
        return parts

    async def _get(self, parts: SplitResult) -> bytes:
        host = str(parts.hostname).rstrip(".").encode("idna").decode()
        addresses = await self._resolve(host, HTTPS)
        if not addresses or not all(_is_public(each) for each in addresses):
            raise FetchError("its address is not a public one")
        if self._tls is None:  # reads all certificates of the system
            self._tls = await asyncio.to_thread(ssl.create_default_context)
        reader, writer = await _connected(addresses, host, self._tls)
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


async def _connected(
    addresses: Sequence[str], host: str, tls: ssl.SSLContext
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """To the first address that answers. Raises what the last one did."""
    for i, address in enumerate(addresses):
        is_last = i + 1 == len(addresses)
        try:
            async with asyncio.timeout(None if is_last else CONNECT_S):
                return await asyncio.open_connection(
                    address, HTTPS, ssl=tls, server_hostname=host, limit=MAX_HEAD
                )
        except OSError:  # also a timeout
            if is_last:
                raise
    raise FetchError("it has no address")


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
