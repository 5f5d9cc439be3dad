"""Questions about a model that compute nothing, and their answers. Standard library only.

They are about its vocabulary, its chat template, and what its engine is doing; one asks its process
to unload it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from llmkit.protocol.messages import Message, Tool

__all__ = [
    "DescribeVocabulary",
    "Detokenize",
    "Inquiry",
    "ListRequests",
    "ListSlots",
    "ListSteps",
    "Question",
    "RenderChat",
    "RunningRequest",
    "SlotContent",
    "Step",
    "StepChunk",
    "Tokenize",
    "TokenizeChat",
    "Tokens",
    "Unload",
    "Vocabulary",
]

Answer_co = TypeVar("Answer_co", covariant=True)


class Question(Generic[Answer_co]):
    """Base of the questions; its parameter is the type of the answer."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class Inquiry(Generic[Answer_co]):
    """A question of a ``caller``."""

    request_id: str
    question: Question[Answer_co]
    caller: str = ""


@dataclass(frozen=True, slots=True)
class Tokens:
    """Token ids; ``pieces`` are their bytes, if wanted."""

    tokens: tuple[int, ...]
    pieces: tuple[bytes, ...] | None = None


@dataclass(frozen=True, slots=True)
class Tokenize(Question[Tokens]):
    """The tokens of a text.

    ``add_special`` adds the initial token (BOS) if the model wants one; ``parse_special`` parses
    control tokens that are spelled out.
    """

    text: str
    add_special: bool = True
    parse_special: bool = True
    with_pieces: bool = False


@dataclass(frozen=True, slots=True)
class Detokenize(Question[str]):
    """The text of tokens, with control tokens spelled out."""

    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class RenderChat(Question[str]):
    """A conversation as the chat template renders it."""

    messages: tuple[Message, ...]
    tools: tuple[Tool, ...] = ()
    template_options: dict[str, Any] = field(default_factory=dict)
    add_generation_prompt: bool = True
    continue_final: bool = False


@dataclass(frozen=True, slots=True)
class TokenizeChat(Question[Tokens]):
    """The tokens of a conversation as the chat template renders it.

    ``media`` has the files of the messages' `Media`, by digest.
    """

    messages: tuple[Message, ...]
    tools: tuple[Tool, ...] = ()
    template_options: dict[str, Any] = field(default_factory=dict)
    add_generation_prompt: bool = True
    continue_final: bool = False
    with_pieces: bool = False
    media: dict[str, bytes] = field(default_factory=dict, hash=False, repr=False)


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Special tokens as text, and the source of the chat template (None without one)."""

    bos_token: str
    eos_token: str
    adds_bos: bool
    chat_template: str | None


@dataclass(frozen=True, slots=True)
class DescribeVocabulary(Question[Vocabulary]):
    """The special tokens and the chat template."""


@dataclass(frozen=True, slots=True)
class StepChunk:
    """What a step computed for one slot.

    ``tokens`` includes ``draft``, the drafted ones; ``is_prompt`` if they were part of a prompt.
    """

    slot: int
    request: str
    tokens: int
    draft: int
    is_prompt: bool


@dataclass(frozen=True, slots=True)
class Step:
    """A step of the engine; ``at`` is when it began, in seconds relative to the answer (< 0)."""

    at: float
    seconds: float
    chunks: tuple[StepChunk, ...]


@dataclass(frozen=True, slots=True)
class ListSteps(Question[tuple[Step, ...]]):
    """The engine's last steps, oldest first."""


@dataclass(frozen=True, slots=True)
class SlotContent:
    """The tokens in a slot, the request that uses it, and how many leading tokens it shares with
    an earlier slot."""

    slot: int
    tokens: int
    shared: int
    request: str | None = None


@dataclass(frozen=True, slots=True)
class ListSlots(Question[tuple[SlotContent, ...]]):
    """What the engine's slots hold."""


@dataclass(frozen=True, slots=True)
class RunningRequest:
    """A request that has a slot; counts are in tokens, ``seconds`` are since its arrival.

    ``is_encoding``: it waits for an image or a sound of its prompt to be encoded.
    """

    request: str
    caller: str
    slot: int | None
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    seconds: float
    is_encoding: bool = False


@dataclass(frozen=True, slots=True)
class ListRequests(Question[tuple[RunningRequest, ...]]):
    """The engine's running requests."""


@dataclass(frozen=True, slots=True)
class Unload(Question[bool]):
    """Asks the model's process to free its memory, from another one.

    Answered with True once the memory is free. Running requests end with `ModelUnloadedError`.
    """
