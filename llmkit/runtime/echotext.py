"""What an `EchoEngine` says, and what its tokens and vectors are. Pure."""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Iterator
from typing import Any

from llmkit.errors import ContextLengthError, InvalidRequestError
from llmkit.protocol import (
    DescribeVocabulary,
    Detokenize,
    EmbeddingRequest,
    Embeddings,
    GenerationRequest,
    ListRequests,
    ListSlots,
    ListSteps,
    Message,
    Question,
    RenderChat,
    RunningRequest,
    Tokenize,
    TokenizeChat,
    Tokens,
    Vocabulary,
)

__all__ = [
    "ECHO",
    "N_VOCAB",
    "inquired",
    "piece",
    "prompt_tokens",
    "reply_text",
    "tokenize",
    "vectors",
]

ECHO = "echo"
TOKEN_BYTES = 4
BITS = 8 * TOKEN_BYTES
MARK = 1 << (BITS + 4)  # above the ids of any model; between it and the bytes is their number
N_VOCAB = 1 << 16  # what is said of it: its ids are larger, but clients allocate by this number
VECTOR_SIZE = 32
MAX_CHARS = 1 << 24


def tokenize(text: str) -> list[int]:
    """A text as tokens.

    >>> [piece(token) for token in tokenize("Grüße!")]
    [b'Gr\\xc3\\xbc', b'\\xc3\\x9fe!']
    """
    if len(text) > MAX_CHARS:
        raise ContextLengthError(len(text) // TOKEN_BYTES, MAX_CHARS // TOKEN_BYTES)
    return [MARK | len(data) << BITS | int.from_bytes(data, "big") for data in _pieces(text)]


def _pieces(text: str) -> Iterator[bytes]:
    data = b""
    for character in text:
        encoded = character.encode("utf-8", "replace")
        if len(data) + len(encoded) > TOKEN_BYTES:
            yield data
            data = b""
        data += encoded
    if data:
        yield data


def piece(token: int) -> bytes:
    """The bytes of a token; another model's, which clients may send, are spelled out.

    >>> piece(11)
    b'<11>'
    """
    size = (token ^ MARK) >> BITS
    if not 0 < size <= TOKEN_BYTES:
        return f"<{token}>".encode()
    return (token & ((1 << BITS) - 1)).to_bytes(TOKEN_BYTES, "big")[-size:]


def prompt_tokens(request: GenerationRequest) -> list[int]:
    """The prompt of a request. Raises `InvalidRequestError`."""
    if request.messages is not None:
        return tokenize(_rendered(request.messages))
    if isinstance(request.prompt, tuple):
        return list(request.prompt)
    tokens = tokenize((request.prompt or "") + (request.suffix or ""))
    if not tokens:
        raise InvalidRequestError("the prompt is empty; give at least one token.", "prompt")
    return tokens


def _rendered(messages: tuple[Message, ...]) -> str:
    return "".join(f"[{message.role}]{message.text}\n" for message in messages)


def reply_text(request: GenerationRequest) -> str:
    """What is answered: "Echo: " and the last message of a user, or the prompt."""
    if request.messages is None:
        prompt = request.prompt or ""
        if isinstance(prompt, tuple):
            prompt = b"".join(map(piece, prompt)).decode("utf-8", "replace")
        return f"Echo: {prompt}"
    asked = [message for message in request.messages if message.role == "user"]
    reply = f"Echo: {(asked or request.messages)[-1].text}"
    begun = request.messages[-1].text if request.continue_final else ""
    return reply.removeprefix(begun)


def vectors(request: EmbeddingRequest) -> Embeddings:
    """Unit vectors that depend on the words of a text alone: alike for texts that share some."""
    texts = [_text(given) for given in request.inputs]
    counts = tuple(len(tokenize(text)) for text in texts)
    if not all(counts):
        raise InvalidRequestError("a text to embed is empty.", "input")
    return Embeddings(b"".join(map(_vector, texts)), VECTOR_SIZE, counts)


def _text(given: str | tuple[int, ...]) -> str:
    return given if isinstance(given, str) else b"".join(map(piece, given)).decode(errors="replace")


def _vector(text: str) -> bytes:
    total = [0.0] * VECTOR_SIZE
    for word in text.lower().split() or [text]:
        digest = hashlib.sha256(word.encode("utf-8", "replace")).digest()
        total = [sum_ + byte - 127.5 for sum_, byte in zip(total, digest, strict=True)]
    norm = math.hypot(*total) or 1.0
    return struct.pack(f"<{VECTOR_SIZE}f", *(number / norm for number in total))


def inquired(question: Question[Any], running: tuple[RunningRequest, ...]) -> Any:
    """The answer to a question about the echo. Raises `InvalidRequestError`."""
    match question:
        case Tokenize(text):
            return _described(tokenize(text), question.with_pieces)
        case Detokenize(tokens):
            return b"".join(map(piece, tokens)).decode("utf-8", "replace")
        case RenderChat(messages):
            return _rendered(messages)
        case TokenizeChat(messages):
            return _described(tokenize(_rendered(messages)), question.with_pieces)
        case DescribeVocabulary():
            return Vocabulary("", "", False, None)
        case ListRequests():
            return running
        case ListSlots() | ListSteps():
            return ()
    raise InvalidRequestError("there is no model here, only an echo.", "model")


def _described(tokens: list[int], with_pieces: bool) -> Tokens:
    return Tokens(tuple(tokens), tuple(map(piece, tokens)) if with_pieces else None)
