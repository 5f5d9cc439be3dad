"""What engines and gateways of a fleet say to each other, and where. Pure.

engine → gateway   ANNOUNCE · LEAVE
gateway → engine   HEARD · REFUSED

An engine announces itself every second, to each gateway that it was told of. Bodies are
MessagePack; unknown fields are ignored, missing ones have their default.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from typing import Annotated, Literal

import msgspec

from llmkit.errors import InvalidRequestError
from llmkit.protocol import EngineStats, ModelDescription

__all__ = [
    "ANNOUNCE", "EVERY_S", "HEARD", "LEAVE", "MAX_BYTES", "REFUSED", "TTL_S", "Announcement",
    "Leave", "Place", "Refused", "pack", "unpack_announcement", "unpack_leave", "unpack_refused",
]  # fmt: skip

ANNOUNCE, LEAVE, HEARD, REFUSED = b"ANNOUNCE", b"LEAVE", b"HEARD", b"REFUSED"
EVERY_S, TTL_S = 1.0, 5.0
MAX_BYTES = 1 << 16  # of a message
MAX_NAME = 512
ADDRESS = re.compile(
    r"tcp://(\[[0-9A-Fa-f:.%a-z]{2,64}\]|[A-Za-z0-9._*-]{1,253})(?::([0-9]{1,5}|\*))?"
)
WILD = ("*", "0.0.0.0", "[::]")

Short = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]


@dataclass(frozen=True, slots=True)
class Place:
    """``tcp://HOST:PORT``; port 0 is a free one.

    >>> Place.read("tcp://node-7:7101", "listen")
    Place(host='node-7', port=7101)
    """

    host: str
    port: int

    @classmethod
    def read(cls, address: str, setting: str, *, port: bool = False) -> Place:
        """Raises `InvalidRequestError` naming the setting; ``port``: one must be given."""
        found = ADDRESS.fullmatch(address)
        number = 0 if found is None or found[2] in (None, "*") else int(found[2])
        if found is None or number > 65535 or (port and not number):
            example = "tcp://10.0.0.5:7100"
            raise InvalidRequestError(
                f"{setting} takes an address such as {example}, not {address!r:.200}.", setting
            )
        return cls(found[1], number)

    @property
    def is_wild(self) -> bool:
        """Whether it is all interfaces of a host."""
        return self.host in WILD

    @property
    def is_loopback(self) -> bool:
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host.strip("[]")).is_loopback
        except ValueError:
            return False

    @property
    def address(self) -> str:
        return f"tcp://{self.host}:{self.port or '*'}"


class Announcement(msgspec.Struct, omit_defaults=True):
    """An engine, as it is now.

    ``instance`` is of this run of its process, ``key`` opens its bridge at ``address``. While it is
    ``loading`` neither address nor sizes are known. ``started`` is in seconds since 1970.
    """

    instance: Short
    model: ModelDescription
    phase: Literal["loading", "ready", "draining"] = "ready"
    address: str = ""
    key: Annotated[str, msgspec.Meta(max_length=256)] = ""
    stats: EngineStats = EngineStats()
    model_hash: Annotated[str, msgspec.Meta(max_length=256)] = ""
    host: Annotated[str, msgspec.Meta(max_length=256)] = ""
    pid: int = 0
    started: float = 0.0
    version: int = 0
    llmkit: Annotated[str, msgspec.Meta(max_length=64)] = ""


class Leave(msgspec.Struct):
    """The engine ends."""

    instance: Short


class Refused(msgspec.Struct):
    """Why a gateway does not take the engine, for people."""

    reason: str


_encoder = msgspec.msgpack.Encoder()
_announcement = msgspec.msgpack.Decoder(Announcement)


def pack(message: Announcement | Leave | Refused) -> bytes:
    return _encoder.encode(message)


def unpack_leave(data: bytes) -> Leave:
    """Raises `ValueError`."""
    return msgspec.msgpack.decode(data, type=Leave)


def unpack_refused(data: bytes) -> Refused:
    """Raises `ValueError`."""
    return msgspec.msgpack.decode(data, type=Refused)


def unpack_announcement(data: bytes) -> Announcement:
    """Raises `ValueError` for what no engine would say."""
    found = _announcement.decode(data)
    if not 0 < len(found.model.name) <= MAX_NAME or not found.model.name.isprintable():
        raise ValueError("the model has no proper name")
    if found.phase != "loading":
        place = Place.read(found.address, "address", port=True)
        if place.is_wild:
            raise ValueError("nobody can reach this address")
    return found
