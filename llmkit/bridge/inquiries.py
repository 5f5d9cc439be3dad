"""Inquiries and their answers as messages of the bridge. Pure."""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec

from llmkit.bridge import wire
from llmkit.errors import InvalidRequestError
from llmkit.protocol import (
    DescribeVocabulary,
    Detokenize,
    Inquiry,
    ListRequests,
    ListSlots,
    ListSteps,
    Question,
    RenderChat,
    RunningRequest,
    SlotContent,
    Step,
    Tokenize,
    TokenizeChat,
    Tokens,
    Unload,
    Vocabulary,
)

__all__ = ["decode_answer", "decode_inquiry", "encode_answer", "encode_inquiry"]

T = TypeVar("T")


class _Inquiry(msgspec.Struct):
    """An inquiry; ``kind`` names the type of its question."""

    request_id: wire.Id
    kind: str
    question: msgspec.Raw
    caller: str = ""


# Question, its name on the wire, and the type of its answer.
_QUESTIONS: tuple[tuple[str, type[Question[Any]], Any], ...] = (
    ("tokenize", Tokenize, Tokens),
    ("detokenize", Detokenize, str),
    ("render_chat", RenderChat, str),
    ("tokenize_chat", TokenizeChat, Tokens),
    ("vocabulary", DescribeVocabulary, Vocabulary),
    ("steps", ListSteps, tuple[Step, ...]),
    ("slots", ListSlots, tuple[SlotContent, ...]),
    ("requests", ListRequests, tuple[RunningRequest, ...]),
    ("unload", Unload, bool),
)
_KINDS = {question: kind for kind, question, _ in _QUESTIONS}
_BY_KIND = {kind: question for kind, question, _ in _QUESTIONS}
_ANSWERS = {question: answer for _, question, answer in _QUESTIONS}


def encode_inquiry(inquiry: Inquiry[Any]) -> bytes:
    """An inquiry as JSON. Raises what `wire.encode` raises."""
    question = inquiry.question
    raw = msgspec.Raw(wire.encode(question))
    return wire.encode(_Inquiry(inquiry.request_id, _KINDS[type(question)], raw, inquiry.caller))


def decode_inquiry(data: bytes) -> Inquiry[Any]:
    """Parse an inquiry. Raises `InvalidRequestError` for a question of a newer version."""
    received = wire.decode(data, _Inquiry)
    kind = _BY_KIND.get(received.kind)
    if kind is None:
        raise InvalidRequestError(
            f"the llmkit in the model's process, which is another version, cannot answer "
            f"{received.kind!r:.60}."
        )
    question = wire.decode(bytes(received.question), kind)
    return Inquiry(received.request_id, question, received.caller)


def encode_answer(request_id: str, answer: Any) -> wire.Answer:
    """The answer to an inquiry."""
    return wire.Answer(request_id, msgspec.Raw(wire.encode(answer)))


def decode_answer(data: bytes, question: Question[T]) -> T:
    """Parse the answer to a question."""
    answer: T = wire.decode(data, _ANSWERS[type(question)])
    return answer
