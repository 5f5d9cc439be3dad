"""The messages of a chat socket in both directions, each a JSON object in a text frame. Pure.

`docs/reference/asyncapi.yaml` describes them; a test compares the two.
"""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import UNSET, Raw, Struct, UnsetType

from llmkit.errors import InvalidRequestError
from llmkit.gateway.bodies import check_counts
from llmkit.gateway.conversations.log import TurnEvent
from llmkit.gateway.failures import ApiError

__all__ = [
    "CLIENT_MESSAGES",
    "SERVER_MESSAGES",
    "Auth",
    "Beginning",
    "Call",
    "Cancel",
    "ClientMessage",
    "Delta",
    "Edit",
    "End",
    "Failed",
    "Fault",
    "Head",
    "Hello",
    "Html",
    "Ping",
    "Pong",
    "Pruned",
    "Reasoning",
    "Regenerate",
    "Resume",
    "Send",
    "ServerMessage",
    "TurnStarted",
    "encode",
    "event_message",
    "fault_of",
    "head_of",
    "read",
]

Object = dict[str, Any]
CHECKED_BYTES = 64 << 10  # longer messages are counted before they are parsed
MAX_REF = 200
NOTHING = Raw()  # of no length: the field is not there


class FromClient(Struct, frozen=True, forbid_unknown_fields=True):
    """What a client may send; fields are as in the routes below /v1/sessions."""


class Auth(FromClient, frozen=True, tag="auth"):
    """The key, where no header could carry it. Answered by `Hello`."""

    key: str


class Ping(FromClient, frozen=True, tag="ping"):
    """Asks for a pong with the same ``data``."""

    data: str | None = None


class Resume(FromClient, frozen=True, tag="resume"):
    """Follow a turn, from after event number ``after``."""

    turn: str
    after: int = 0
    render: bool = False
    ref: str | None = None


class Cancel(FromClient, frozen=True, tag="cancel"):
    """End a turn here; what it has so far is kept."""

    turn: str
    ref: str | None = None


class Beginning(FromClient, frozen=True):
    """What all messages share that begin a turn."""

    ref: str | None = None
    model: str | None = None
    settings: Object | None = None
    tools: list[Object] | None = None
    render: bool = False


class Send(Beginning, frozen=True, tag="send", kw_only=True):
    """Say something, and have it answered; without a session in a new one.

    ``parent`` is the message that it follows: by default the last, null for none. With ``branch``
    that one may have other messages after it. ``messages`` are whole ones in place of ``content``,
    for example tool results.
    """

    session: str | None = None
    content: str | list[Object] | None = None
    messages: list[Object] | None = None
    parent: str | UnsetType | None = UNSET
    branch: bool = False


class Edit(Beginning, frozen=True, tag="edit", kw_only=True):
    """Say a message differently: a sibling of it, and its answer."""

    session: str
    message: str
    content: str | list[Object]


class Regenerate(Beginning, frozen=True, tag="regenerate", kw_only=True):
    """Generate another answer next to one, by default the last."""

    session: str
    message: str | None = None


ClientMessage = Auth | Ping | Send | Edit | Regenerate | Cancel | Resume
CLIENT_MESSAGES = (Auth, Ping, Send, Edit, Regenerate, Cancel, Resume)


class FromServer(Struct, frozen=True, omit_defaults=True):
    """What the server sends."""


class Hello(FromServer, frozen=True, tag="hello"):
    """The first message to a caller that is known: what is here for it."""

    version: str
    models: list[str]
    max_message_bytes: int


class TurnStarted(FromServer, frozen=True, tag="turn"):
    """A turn that is followed from now on: ``message`` is the reply's id."""

    turn: str
    session: str
    message: str
    model: str
    parent: str | None = None
    ref: str | None = None


class Delta(FromServer, frozen=True, tag="delta"):
    """More of an answer."""

    turn: str
    seq: int
    text: str


class Reasoning(FromServer, frozen=True, tag="reasoning"):
    """More of what the model thinks before it answers."""

    turn: str
    seq: int
    text: str


class Call(FromServer, frozen=True, tag="call"):
    """A tool call."""

    turn: str
    seq: int
    call: Object


class Html(FromServer, frozen=True, tag="html"):
    """A block of the answer as HTML, in place of the one with this number.

    Empty where there is none any more. It shows the text up to event ``seq``.
    """

    turn: str
    seq: int
    index: int
    html: str


class Pruned(FromServer, frozen=True, tag="pruned"):
    """What was left out of the prompt, for want of room."""

    turn: str
    seq: int
    message: Object


class End(FromServer, frozen=True, tag="end"):
    """The end of a turn: the reply as it is stored."""

    turn: str
    seq: int
    message: Object
    usage: Object | None = None


class Fault(Struct, frozen=True):
    """An error, in the words of OpenAI's API."""

    type: str
    code: str | None
    message: str
    param: str | None


class Failed(FromServer, frozen=True, tag="error"):
    """What went wrong: with the message that has this ``ref``, with a turn, or with the socket.

    With ``seq`` it is the turn's last event, and ``message`` what is stored of the reply.
    """

    error: Fault
    ref: str | None = None
    turn: str | None = None
    seq: int | None = None
    message: Object | None = None


class Pong(FromServer, frozen=True, tag="pong"):
    """The answer to a ping."""

    data: str | None = None


ServerMessage = (
    Hello | TurnStarted | Delta | Reasoning | Call | Html | Pruned | End | Failed
    | Pong
)  # fmt: skip
SERVER_MESSAGES = (
    Hello, TurnStarted, Delta, Reasoning, Call, Html, Pruned, End, Failed, Pong,
)  # fmt: skip


class Head(Struct, frozen=True):
    """What tells the kind of a message, and what an error about it refers to."""

    type: str | None = None
    ref: str | None = None
    messages: Raw = NOTHING
    prompt: Raw = NOTHING
    stream: Raw = NOTHING
    model_name: Raw = msgspec.field(default=NOTHING, name="model-name")

    @property
    def is_body(self) -> bool:
        """Whether this is the body of a request, as other services' clients send it."""
        return self.type is None and bool(self.messages or self.prompt)


_head = msgspec.json.Decoder(Head)
_message: msgspec.json.Decoder[ClientMessage] = msgspec.json.Decoder(ClientMessage)
_encoder = msgspec.json.Encoder()
encode = _encoder.encode


def head_of(data: bytes) -> Head:
    """The head of a message. Raises `ApiError` for what is no JSON object."""
    try:
        if len(data) > CHECKED_BYTES:
            check_counts(data)
        head = _head.decode(data)
    except (InvalidRequestError, msgspec.MsgspecError, RecursionError, UnicodeError) as error:
        raise _invalid(error) from None
    if head.ref is not None and len(head.ref) > MAX_REF:
        raise ApiError(
            400, f"ref: at most {MAX_REF} characters.", param="ref", code="invalid_message"
        )
    return head


def read(data: bytes) -> ClientMessage:
    """A client's message. Raises `ApiError` naming the first invalid field."""
    try:
        return _message.decode(data)
    except (msgspec.MsgspecError, RecursionError, UnicodeError) as error:
        raise _invalid(error) from None


def _invalid(error: Exception) -> ApiError:
    if isinstance(error, RecursionError):
        return ApiError(400, "The message is nested too deeply.", code="invalid_message")
    reason = str(error)
    if not isinstance(error, msgspec.ValidationError):
        reason = reason.removeprefix("JSON is malformed: ")
        return ApiError(400, f"The message is not valid JSON: {reason}", code="invalid_message")
    reason, _, path = reason.partition(" - at `$")
    field = path.strip("`.")
    if field in ("", "type"):
        known = ", ".join(str(m.__struct_config__.tag) for m in CLIENT_MESSAGES)
        reason += f". A message is an object with a type, one of {known}, or a body."
    where = f"{field}: " if field else ""
    return ApiError(400, f"{where}{reason}", param=field or None, code="invalid_message")


def event_message(turn: str, event: TurnEvent) -> ServerMessage | None:
    """The message for an event of a turn; None for its start, which `TurnStarted` says."""
    seq = event.seq
    match event.type:
        case "delta":
            return Delta(turn, seq, event.text)
        case "reasoning":
            return Reasoning(turn, seq, event.text)
        case "call":
            return Call(turn, seq, event.call or {})
        case "pruned":
            return Pruned(turn, seq, event.message or {})
        case "end":
            return End(turn, seq, event.message or {}, event.usage)
        case "error":
            fault = msgspec.convert(event.error, Fault)
            return Failed(fault, turn=turn, seq=seq, message=event.message)
        case _:
            return None


def fault_of(error: ApiError) -> Fault:
    return Fault(error.type, error.code, error.message, error.param)
