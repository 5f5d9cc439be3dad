"""The messages that cross the bridge, as ZMQ frames. Pure.

client → server   HELLO · SUBMIT · EMBED · INQUIRE · ABORT · PING
server → client   WELCOME · DENIED · EVENTS · EMBEDDED · ANSWER · PONG · DRAINING · GOODBYE

The first frame is the kind, the second a body. Greetings, requests and answers are JSON; EVENTS and
PONG, the frequent ones, are MessagePack. SUBMIT, EMBED and INQUIRE have a third frame naming the
caller (`About`), so that the request can be routed unparsed; that of EMBEDDED is the raw vectors.
The sound or the media of a SUBMIT are in a fourth: as text they would take long to write and read.

Kernels and servers have environments of their own, so neighbouring versions must understand each
other. Unknown fields are ignored, missing ones have their default, and messages of an unknown kind
are dropped. HELLO and WELCOME carry the versions; if they are too far apart, both sides say so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Annotated, Any, TypeVar

import msgspec

from llmkit import errors
from llmkit.protocol import (
    Completion,
    Delta,
    EmbeddingRequest,
    Embeddings,
    EngineStats,
    FinishReason,
    GenerationRequest,
    ModelDescription,
    RequestMetrics,
    Resume,
    SamplingParams,
    TokenLogprob,
    Usage,
)
from llmkit.protocol.requests import MAX_CHOICES
from llmkit.version import __version__

__all__ = [
    "ABORT", "ANSWER", "DENIED", "DRAINING", "EMBED", "EMBEDDED", "EVENTS", "GOODBYE", "HELLO",
    "INQUIRE", "PING", "PONG", "RESUMES", "SUBMIT", "VERSION", "WELCOME",
    "About", "Answer", "Denied", "Draining", "Embedded", "End", "Events", "Failure", "Goodbye",
    "Hello", "Name", "News", "Welcome",
    "apart", "choice_ids", "decode", "decode_request", "encode", "encode_request", "pack",
    "stranger", "together", "unpack",
]  # fmt: skip

HELLO, SUBMIT, EMBED, INQUIRE, ABORT, PING = (
    b"HELLO",
    b"SUBMIT",
    b"EMBED",
    b"INQUIRE",
    b"ABORT",
    b"PING",
)
WELCOME, DENIED, EVENTS, EMBEDDED, ANSWER, PONG, DRAINING, GOODBYE = (
    b"WELCOME",
    b"DENIED",
    b"EVENTS",
    b"EMBEDDED",
    b"ANSWER",
    b"PONG",
    b"DRAINING",
    b"GOODBYE",
)
VERSION = 6  # of the protocol
OLDEST = 5  # that is still understood
RESUMES = 6  # the first whose engines go on with an answer that another began

T = TypeVar("T")


class Hello(msgspec.Struct, omit_defaults=True):
    """A client's greeting: the connection file's key, and its own process (pid, start time).

    Version 0 is older than this field. ``weighs``: its requests may have weights above 1, because
    it knows its callers, as a gateway does.
    """

    key: str
    owner: tuple[int, float] | None = None
    version: int = 0
    llmkit: str = ""
    weighs: bool = False


class Welcome(msgspec.Struct):
    description: ModelDescription
    version: int = 0
    llmkit: str = ""


class Denied(msgspec.Struct, omit_defaults=True):
    """``key``: the key is wrong. Otherwise the client is unknown and may greet again."""

    key: bool = False


class Draining(msgspec.Struct):
    """The engine takes nothing new and ends in so many seconds, or once it has nothing to do."""

    seconds_left: float = 0.0


class Goodbye(msgspec.Struct, omit_defaults=True):
    """``failed``: the engine ended by itself, perhaps of a request."""

    reason: str
    failed: bool = False


Id = Annotated[str, msgspec.Meta(max_length=256)]


class About(msgspec.Struct, omit_defaults=True):
    """The id of a request, its caller, and the number of answers wanted."""

    id: Id
    caller: str = ""
    n: Annotated[int, msgspec.Meta(ge=1, le=MAX_CHOICES)] = 1


class Name(msgspec.Struct):
    """The request that an ABORT ends."""

    id: Id


class Failure(msgspec.Struct, omit_defaults=True):
    """One of llmkit's errors."""

    type: str
    message: str
    param: str | None = None
    num_tokens: int = 0
    n_ctx: int = 0

    @classmethod
    def of(cls, error: BaseException) -> Failure:
        param = error.param if isinstance(error, errors.InvalidRequestError) else None
        sizes = (
            {"num_tokens": error.num_tokens, "n_ctx": error.n_ctx}
            if isinstance(error, errors.ContextLengthError)
            else {}
        )
        return cls(type(error).__name__, _sendable(str(error)), param and _sendable(param), **sizes)

    def error(self) -> Exception:
        """The same class on this side; a foreign one becomes an `EngineError`."""
        if self.type == "ContextLengthError":
            return errors.ContextLengthError(self.num_tokens, self.n_ctx, self.param or "prompt")
        if self.type == "InvalidRequestError":
            return errors.InvalidRequestError(self.message, self.param)
        kind = getattr(errors, self.type, None)
        if isinstance(kind, type) and issubclass(kind, errors.LLMKitError):
            return kind(self.message)
        return errors.EngineError(self.message)


class News(msgspec.Struct, array_like=True):
    """New text of a request, its number of tokens, and log-probabilities and ids if asked for."""

    id: str
    text: str = ""
    num_tokens: int = 0
    logprobs: tuple[TokenLogprob, ...] = ()
    tokens: tuple[int, ...] = ()

    @classmethod
    def of(cls, request_id: str, deltas: Sequence[Delta]) -> News:
        if len(deltas) == 1:
            (d,) = deltas
            return cls(request_id, d.text, d.num_tokens, d.logprobs, d.tokens)
        tokens = tuple(t for d in deltas for t in d.tokens)
        num_tokens = sum(d.num_tokens for d in deltas)
        return cls(
            request_id,
            "".join(d.text for d in deltas),
            num_tokens,
            tuple(p for d in deltas for p in d.logprobs),
            # Part of the ids would look like all of them.
            tokens if len(tokens) == num_tokens else (),
        )

    def delta(self) -> Delta:
        return Delta(self.text, self.num_tokens, self.logprobs, self.tokens)


class End(msgspec.Struct, array_like=True):
    """The end of a request: its completion or failure.

    Text and log-probabilities are left out; the reader has them from the news.
    """

    id: str
    finish_reason: FinishReason | None = None
    usage: Usage = Usage()
    metrics: RequestMetrics = RequestMetrics()
    tokens: tuple[int, ...] = ()
    error: str | None = None
    stop: str | None = None
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    failure: Failure | None = None

    @classmethod
    def of(
        cls, request_id: str, completion: Completion | None, failure: BaseException | None = None
    ) -> End:
        told = None if failure is None else Failure.of(failure)
        if completion is None:
            return cls(request_id, failure=told)
        c = completion
        return cls(
            request_id,
            c.finish_reason,
            c.usage,
            c.metrics,
            c.tokens,
            c.error,
            c.stop,
            c.prompt_logprobs,
            told,
        )

    def completion(self, text: str, logprobs: tuple[TokenLogprob, ...]) -> Completion | None:
        if self.finish_reason is None:
            return None
        return Completion(
            text,
            self.finish_reason,
            self.usage,
            self.metrics,
            self.tokens,
            self.id,
            self.error,
            logprobs,
            self.prompt_logprobs,
            self.stop,
        )


class Events(msgspec.Struct, array_like=True):
    """The results of an engine step for one connection."""

    news: list[News] = []
    ends: list[End] = []


class Answer(msgspec.Struct, omit_defaults=True):
    """The answer to an inquiry, or its failure."""

    id: str
    found: msgspec.Raw = msgspec.Raw(b"null")
    failure: Failure | None = None


class Embedded(msgspec.Struct, omit_defaults=True):
    """Vectors; the numbers are in the next frame."""

    id: str
    size: int = 0
    num_tokens: tuple[int, ...] = ()
    failure: Failure | None = None

    def embeddings(self, data: bytes) -> Embeddings:
        return Embeddings(data, self.size, self.num_tokens)


class _Sampling(msgspec.Struct):
    sampling: dict[str, msgspec.Raw] = {}


def _plain(value: Any) -> Any:
    """numpy's scalars and other subclasses of texts and numbers, as those. Raises `TypeError`."""
    for kind in (str, int, float):
        if isinstance(value, kind):
            return str.__str__(value) if kind is str else kind(value)
    raise TypeError(f"{type(value).__name__} cannot be sent")


_json = msgspec.json.Encoder(enc_hook=_plain)
_msgpack = msgspec.msgpack.Encoder(enc_hook=_plain)
_decoders: dict[Any, msgspec.json.Decoder[Any]] = {}
_events, _stats = msgspec.msgpack.Decoder(Events), msgspec.msgpack.Decoder(EngineStats)
_media = msgspec.msgpack.Decoder(dict[str, bytes])
# Among the sampling parameters, of which an older engine refuses those that it does not know: it
# would begin the answer anew otherwise.
_RESUME = "resume"
_SAMPLING = {_RESUME, *(f.name for f in fields(SamplingParams))}


def encode(value: Any) -> bytes:
    """A message as JSON. Raises `ValueError`, `TypeError` or `RecursionError` if it cannot be."""
    return _json.encode(value)


def decode(data: bytes, kind: type[T]) -> T:
    """Parse a message. Raises what its checks raise, and `msgspec.ValidationError`."""
    decoder = _decoders.get(kind)
    if decoder is None:
        decoder = _decoders.setdefault(kind, msgspec.json.Decoder(kind))
    try:
        found: T = decoder.decode(data)
    except msgspec.ValidationError as error:
        if isinstance(error.__cause__, errors.LLMKitError):
            raise error.__cause__ from None
        raise
    return found


def pack(value: Events | EngineStats) -> bytes:
    """A frequent message, as MessagePack."""
    return _msgpack.encode(value)


def unpack(data: bytes, kind: bytes) -> Any:
    """`Events` or `EngineStats`, by the kind of message."""
    return _events.decode(data) if kind == EVENTS else _stats.decode(data)


def choice_ids(request_id: str, n: int) -> list[str]:
    """The ids of a request's answers, as in `GenerationRequest.choices`."""
    return [request_id] if n == 1 else [f"{request_id}-{i}" for i in range(n)]


def encode_request(request: GenerationRequest | EmbeddingRequest) -> bytes:
    """A request as JSON.

    Default sampling parameters are left out, so that an older engine refuses only what it must.
    """
    if not isinstance(request, GenerationRequest):
        return encode(request)
    sampling = request.sampling.as_dict()
    if request.resume is not None:
        sampling[_RESUME] = request.resume
    named = {f.name: getattr(request, f.name) for f in fields(request) if f.name != _RESUME}
    return encode({**named, "sampling": sampling})


def decode_request(data: bytes) -> GenerationRequest:
    """Parse a request.

    Raises `InvalidRequestError` for values out of range and unknown sampling parameters.
    """
    sampling = decode(data, _Sampling).sampling
    unknown = sampling.keys() - _SAMPLING
    if unknown:
        name = min(unknown)
        raise errors.InvalidRequestError(
            f"{name} is unknown to the llmkit in the model's process, which is another version.",
            name,
        )
    request = decode(data, GenerationRequest)
    if _RESUME not in sampling:
        return request
    return replace(request, resume=decode(bytes(sampling[_RESUME]), Resume))


def apart(request: GenerationRequest) -> tuple[GenerationRequest, bytes]:
    """A request without the bytes of its sound or media, and these bytes as one frame."""
    hearing = request.hearing
    if hearing is not None:
        return replace(request, hearing=replace(hearing, audio=b"")), hearing.audio
    if request.media:
        return replace(request, media={}), _msgpack.encode(request.media)
    return request, b""


def together(request: GenerationRequest, frame: bytes) -> GenerationRequest:
    """The opposite of `apart`; a frame that nothing in the request asks for is left out.

    Raises `msgspec.DecodeError` for one that cannot be read.
    """
    if not frame:
        return request
    if request.hearing is not None:
        return replace(request, hearing=replace(request.hearing, audio=frame))
    if request.drawing is not None or any(message.media for message in request.messages or ()):
        return replace(request, media=_media.decode(frame))
    return request


def stranger(version: int, llmkit: str) -> str | None:
    """Why the other end, of this ``version``, cannot be understood; None if it can."""
    if version >= OLDEST:
        return None
    theirs = f"llmkit {llmkit}" if llmkit else "an older llmkit"
    return (
        f"one end of the connection is {theirs}, which llmkit {__version__} cannot talk to; "
        "restart the older one with the newer version"
    )


def _sendable(text: str) -> str:
    """The text with halves of surrogate pairs spelled out: UTF-8 has no bytes for them."""
    return text.encode("utf-8", "backslashreplace").decode()
