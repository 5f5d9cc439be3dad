"""Raw requests to a gateway over a socket, as curl sends them, and their events."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

__all__ = ["Raw", "curl"]


@dataclass(frozen=True)
class Raw:
    """An answer as it came: ``text`` is its body, without the chunks' frames."""

    code: int
    headers: dict[str, str]
    text: str

    @property
    def json(self) -> Any:
        return json.loads(self.text)

    @property
    def events(self) -> list[str]:
        """The data of the events; lines of one event are joined."""
        blocks = [b for b in self.text.split("\n\n") if b and not b.startswith(":")]
        return ["\n".join(line[6:] for line in block.split("\n")) for block in blocks]

    @property
    def objects(self) -> list[Any]:
        return [json.loads(event) for event in self.events]


async def curl(
    url: str,
    path: str,
    body: Any = None,
    *,
    method: str | None = None,
    headers: dict[str, str] | None = None,
) -> Raw:
    """One request over a socket of its own; with a ``body`` it is a POST."""
    address = urlsplit(url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    data = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    method = method or ("GET" if body is None else "POST")
    lines = [
        f"{method} {path} HTTP/1.1",
        f"Host: {address.netloc}",
        "Connection: close",
        "Accept: */*",
        *(f"{name}: {value}" for name, value in (headers or {}).items()),
    ]
    if body is not None:
        lines += ["Content-Type: application/json", f"Content-Length: {len(data)}"]
    writer.write("\r\n".join([*lines, "", ""]).encode() + data)
    await writer.drain()
    received = await reader.read()
    writer.close()
    head, _, rest = received.partition(b"\r\n\r\n")
    status, *fields = head.decode().split("\r\n")
    named = dict(field.lower().split(": ", 1) for field in fields)
    if named.get("transfer-encoding") == "chunked":
        rest = _joined(rest)
    return Raw(int(status.split()[1]), named, rest.decode())


def _joined(data: bytes) -> bytes:
    """The content of chunks."""
    parts = []
    while data:
        size, _, data = data.partition(b"\r\n")
        length = int(size, 16)
        if not length:
            break
        parts.append(data[:length])
        data = data[length + 2 :]
    return b"".join(parts)
