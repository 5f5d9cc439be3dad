"""The bridge's messages where HTTP carries them: between a gateway and `llmkit.attach`. Pure.

    GET  engine?model=         → `Engine`                  POST engine/embed    EMBED → EMBEDDED
    POST engine/submit SUBMIT  → SSE of EVENTS             POST engine/inquire  INQUIRE → ANSWER

The bodies are those of the frames in `llmkit.bridge.wire`. An event's data is an EVENTS message in
base64, or an error object, which begins with a brace. Both sides name their version in a header.
"""

from __future__ import annotations

import base64
from typing import Any

import msgspec

from llmkit.bridge import wire
from llmkit.errors import EngineError, InvalidRequestError
from llmkit.protocol import (
    READY,
    Embeddings,
    EngineState,
    EngineStats,
    ListRequests,
    ListSlots,
    ListSteps,
    ModelDescription,
    Question,
)
from llmkit.version import __version__

__all__ = [
    "EVENT_STREAM", "LOOKS", "MAX_TEXTS", "WIRE", "Engine", "event", "given", "look_of", "pack",
    "stranger", "told", "unpack", "unpack_event",
]  # fmt: skip

WIRE = "x-llmkit-wire"  # a header of requests and answers
EVENT_STREAM = "text/event-stream"
MAX_TEXTS = 2048  # in one request for vectors
# What is looked at all the time, and computes nothing: `GET engine?model=…&look=…`.
LOOKS: dict[str, type[Question[Any]]] = {
    "requests": ListRequests,
    "slots": ListSlots,
    "steps": ListSteps,
}


class Engine(msgspec.Struct, omit_defaults=True):
    """An engine behind a gateway; ``model`` is the name to ask for, ``llmkit`` the version."""

    model: str
    description: ModelDescription
    version: int = 0
    llmkit: str = ""
    state: EngineState = READY
    stats: EngineStats = EngineStats()


class _Sampling(msgspec.Struct):
    sampling: dict[str, msgspec.Raw] = {}


def told() -> str:
    """The value of the header `WIRE`.

    >>> stranger(told())
    """
    return f"{wire.VERSION} {__version__}"


def stranger(header: str) -> str | None:
    """Why the other end, of this version, cannot be understood; None if it can."""
    number, _, llmkit = header.strip().partition(" ")
    version = int(number) if number.isascii() and number.isdigit() and len(number) < 10 else 0
    return wire.stranger(version, f"{llmkit:.40}")


def given(request: bytes) -> frozenset[str]:
    """The sampling parameters that a SUBMIT names; the others are left to the server."""
    return frozenset(wire.decode(request, _Sampling).sampling)


def look_of(question: Question[Any]) -> str | None:
    """The name of a question in `LOOKS`; None for others."""
    return next((name for name, kind in LOOKS.items() if type(question) is kind), None)


def event(events: wire.Events) -> str:
    """EVENTS as an event of a stream.

    >>> text = event(wire.Events([wire.News("r", "hi", 1)]))
    >>> unpack_event(text.encode()[6:-2]).news[0].text
    'hi'
    """
    return f"data: {base64.b64encode(wire.pack(events)).decode()}\n\n"


def unpack_event(data: bytes) -> wire.Events:
    """EVENTS from an event's data. Raises `EngineError` for anything else."""
    try:
        events: wire.Events = wire.unpack(base64.b64decode(data, validate=True), wire.EVENTS)
    except (ValueError, msgspec.MsgspecError):
        raise EngineError(f"the server sent an event that nobody can read: {data[:60]!r}") from None
    return events


def pack(request_id: str, made: Embeddings) -> bytes:
    """EMBEDDED in a line, and the raw vectors behind it."""
    head = wire.Embedded(request_id, made.size, made.num_tokens)
    return wire.encode(head) + b"\n" + made.data


def unpack(body: bytes) -> Embeddings:
    """The vectors of such a body. Raises `EngineError` for anything else."""
    head, _, data = body.partition(b"\n")
    try:
        made = wire.decode(head, wire.Embedded)
        if made.size <= 0 or len(data) != 4 * made.size * len(made.num_tokens):
            raise ValueError("its length")
    except (ValueError, InvalidRequestError, msgspec.MsgspecError):
        raise EngineError("the server sent vectors that nobody can read") from None
    return made.embeddings(data)
