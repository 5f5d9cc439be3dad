"""Requests to a model: generation and embeddings. Standard library only."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import Any

from llmkit.errors import ContextLengthError
from llmkit.protocol.images import Drawing
from llmkit.protocol.messages import Message, Tool
from llmkit.protocol.sampling import SamplingParams, check, check_integer, check_number
from llmkit.protocol.speech import Hearing, Saying

__all__ = [
    "MAX_CHARS_PER_TOKEN",
    "MAX_CHOICES",
    "MAX_WEIGHT",
    "MIN_WEIGHT",
    "EmbeddingRequest",
    "GenerationRequest",
    "Resume",
    "check_drawing",
    "check_size",
]

MAX_INPUTS = 100_000
MAX_CHOICES = 1024
MAX_ID = 256  # characters: an id comes back with every event
MIN_WEIGHT, MAX_WEIGHT = 0.01, 100.0
MAX_TOKEN, MAX_SENT = 2**63 - 1, 2**31 - 1
# At most so many characters per token on average: longer text cannot fit, and is refused before
# it is tokenized.
MAX_CHARS_PER_TOKEN = 64


@dataclass(frozen=True, slots=True)
class Resume:
    """The beginning of an answer, which another engine with the same model and options generated.

    >>> Resume((12, 7), sent_chars=3)
    Resume(tokens=(12, 7), sent_chars=3)

    ``tokens`` are computed as output, as after a preemption: they count for ``max_tokens``, usage,
    stop strings, penalties, loops and the grammar, and `Completion.tokens` has them. Only what
    comes after ``sent_chars`` characters of the text is sent, and is the completion's text; its
    log-probabilities and times are of the new tokens alone. Those of the prompt are computed again,
    since they only come with the end. An answer that is complete already ends at once.

    What comes out is what the first engine would have sent: exactly so with ``deterministic=True``,
    if greedy or seeded (the generator skips one draw a token). Elsewhere it is drawn from the same
    distribution. XTC and mirostat draw differently, even seeded: how often they drew, and what
    surprised them, is known to the first engine alone.

    To resume at any moment, ask with ``show_tokens`` and add up the deltas. An engine that sends
    fewer ids than it counts (``num_tokens``) is of an older version, or has shifted its context and
    so forgotten some of them: its request cannot be resumed.
    """

    tokens: tuple[int, ...]
    sent_chars: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.tokens, list):
            object.__setattr__(self, "tokens", tuple(self.tokens))
        fine = isinstance(self.tokens, tuple) and all(
            isinstance(t, int) and not isinstance(t, bool) and 0 <= t <= MAX_TOKEN
            for t in self.tokens
        )
        check(fine, "resume", "must hold token ids.")
        check_integer(self.sent_chars, "sent_chars", 0, MAX_SENT if self.tokens else 0)


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One request for text: exactly one of ``prompt`` (text or token ids) and ``messages``.

    Lower ``priority`` goes first (0 is the default). ``caller`` identifies the requester: callers
    share the engine fairly, however many requests each has. Cached prefixes are shared only among
    requests of one caller and one ``cache_salt``, so that nobody learns of others' prompts from
    timing or counts; callers of one ``cache_scope`` share theirs. A caller of twice the ``weight``
    gets twice the service; only a gateway may give more than 1, since it knows its callers. ``n``
    answers come from one prompt, rendered and tokenized once. ``lora`` names adapters loaded with
    the model, and their scales (None: as loaded, (): none). ``keep_on_disk`` (with
    ``max_tokens=0``) saves the computed prompt for later processes. ``tools`` and
    ``template_options`` go to the chat template. ``suffix``: the answer fills in the text between
    ``prompt`` and it, on models trained for that. ``show_marks`` keeps the model's markers of tool
    calls and reasoning in the text, for `llmkit.chat.reading`. ``continue_final``: the last
    message, an assistant's, is the beginning of the answer. ``resume`` goes on where another engine
    stopped, and ``show_tokens`` has deltas carry what that takes. ``hearing`` is for models that
    write down speech, ``saying`` for those that speak the ``prompt``; see `llmkit.protocol.speech`.
    ``drawing`` is for those that draw it; see `llmkit.protocol.images`.
    ``media`` has the files of the messages' `Media`, or of the ``drawing``, by digest.
    """

    request_id: str
    sampling: SamplingParams = field(default_factory=SamplingParams)
    prompt: str | tuple[int, ...] | None = None
    messages: tuple[Message, ...] | None = None
    priority: int = 0
    caller: str = ""
    cache_salt: str = ""
    keep_on_disk: bool = False
    lora: tuple[tuple[str, float], ...] | None = None
    parse_special: bool = False  # control tokens spelled out in ``prompt`` are parsed
    tools: tuple[Tool, ...] = ()
    template_options: dict[str, Any] = field(default_factory=dict)
    suffix: str | None = None
    show_marks: bool = False
    continue_final: bool = False
    n: int = 1
    cache_scope: str | None = None
    weight: float = 1.0
    resume: Resume | None = None
    show_tokens: bool = False
    hearing: Hearing | None = None
    saying: Saying | None = None
    drawing: Drawing | None = None
    media: dict[str, bytes] = field(default_factory=dict, hash=False, repr=False)

    @property
    def salt(self) -> str:
        """Requests of one salt share cached prefixes.

        It joins the caller (or the ``cache_scope``, if given) and the ``cache_salt``.
        """
        scope = self.caller if self.cache_scope is None else self.cache_scope
        return f"{scope}\0{self.cache_salt}" if scope else self.cache_salt

    @property
    def keeps_text(self) -> bool:
        """Whether the whole text is kept until the end; that of images is large."""
        return self.drawing is None

    def choices(self) -> list[GenerationRequest]:
        """One request for each of the ``n`` choices, with its own id and seed."""
        if self.n == 1:
            return [self]
        seed = self.sampling.seed
        params = [
            self.sampling if seed is None else replace(self.sampling, seed=seed + i)
            for i in range(self.n)
        ]
        return [
            replace(self, n=1, request_id=f"{self.request_id}-{i}", sampling=p)
            for i, p in enumerate(params)
        ]

    def __post_init__(self) -> None:
        check_id(self.request_id)
        check_integer(self.n, "n", 1, MAX_CHOICES)
        check_number(self.weight, "weight", MIN_WEIGHT, MAX_WEIGHT)
        check(self.resume is None or self.n == 1, "resume", "is for one answer: n must be 1.")
        check(
            self.cache_scope is None
            or (isinstance(self.cache_scope, str) and len(self.cache_scope) <= 1000),
            "cache_scope",
            "must be a string of at most 1000 characters.",
        )
        check_integer(self.priority, "priority", -(2**31), 2**31)
        for param in ("caller", "cache_salt"):
            check(
                isinstance(getattr(self, param), str) and len(getattr(self, param)) <= 1000,
                param,
                "must be a string of at most 1000 characters.",
            )
        if isinstance(self.lora, dict):
            object.__setattr__(self, "lora", tuple(self.lora.items()))
        for name, scale in self.lora or ():
            check(isinstance(name, str), "lora", "must name adapters.")
            check_number(scale, "lora", -100, 100)
        fills = self.suffix is None or (
            isinstance(self.suffix, str) and isinstance(self.prompt, str)
        )
        check(fills, "suffix", "and prompt must both be strings.")
        check(
            (self.prompt is None) != (self.messages is None),
            "prompt",
            "or messages must be given, but not both.",
        )


@dataclass(frozen=True, slots=True)
class EmbeddingRequest:
    """Texts (or their token ids) to embed, as unit vectors unless ``normalize`` is False.

    With a ``query`` they are documents to score. ``caller`` identifies the requester, ``weight`` is
    its share, as in `GenerationRequest`.
    """

    request_id: str
    inputs: tuple[str | tuple[int, ...], ...]
    normalize: bool = True
    query: str | None = None
    caller: str = ""
    weight: float = 1.0

    def __post_init__(self) -> None:
        check_id(self.request_id)
        check_number(self.weight, "weight", MIN_WEIGHT, MAX_WEIGHT)
        check(0 < len(self.inputs) <= MAX_INPUTS, "input", f"must hold 1 to {MAX_INPUTS} texts.")
        check(
            all(isinstance(i, str | tuple) for i in self.inputs),
            "input",
            "must hold texts or lists of token ids.",
        )


def check_id(request_id: str) -> None:
    """Raises `InvalidRequestError` for what is no request's id."""
    fine = isinstance(request_id, str) and len(request_id) <= MAX_ID
    check(fine, "request_id", f"must be a string of at most {MAX_ID} characters.")


def check_drawing(request: GenerationRequest, inputs: Collection[str]) -> None:
    """Refuse a picture to start from where a model has no such ``inputs`` before it is sent: an
    older llmkit would leave it out, and draw the prompt alone. Raises `InvalidRequestError`."""
    if request.drawing is not None and request.drawing.image:
        check(
            "image" in inputs,
            "image",
            "cannot be read by this model: it has nothing that reads pictures, or its process has "
            "an older llmkit. It can draw without one.",
        )


def check_size(request: GenerationRequest, n_ctx: int) -> None:
    """Refuse a request that cannot fit the context before it is sent.

    Raises `ContextLengthError`.
    """
    if request.messages is None:
        size = len(request.prompt or ()) + len(request.suffix or "")
        tokens = size if isinstance(request.prompt, tuple) else size // MAX_CHARS_PER_TOKEN
    else:  # each message and each call takes at least one token
        size = sum(
            len(msg.text) + sum(len(c.arguments) for c in msg.tool_calls)
            for msg in request.messages
        )
        tokens = max(
            size // MAX_CHARS_PER_TOKEN,
            len(request.messages) + sum(len(msg.tool_calls) for msg in request.messages),
        )
    if tokens >= n_ctx:
        raise ContextLengthError(
            tokens, n_ctx, "prompt" if request.messages is None else "messages"
        )
