"""Plain frozen data that crosses boundaries; standard library only, no behaviour beyond validation."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, Literal

from llmkit.errors import InvalidRequestError
from llmkit.sampling import Grammar, SamplingParams, check, check_integer, check_number

__all__ = [
    "Completion",
    "Delta",
    "EmbeddingRequest",
    "Embeddings",
    "EngineStats",
    "FinishReason",
    "GenerationRequest",
    "Grammar",
    "Inquiry",
    "InquiryKind",
    "Message",
    "ModelDescription",
    "RequestMetrics",
    "SamplingParams",
    "TokenLogprob",
    "Tool",
    "ToolCall",
    "Usage",
]

MAX_INPUTS = 100_000
MAX_CHOICES = 1024
MAX_DEPTH = 100  # deepest JSON nesting we accept
# Characters a token can stand for at most, on average: a longer text cannot fit, and is refused before it is tokenized.
MAX_CHARS_PER_TOKEN = 64


class FinishReason(StrEnum):
    """Why a request ended."""

    STOP = "stop"
    LENGTH = "length"
    TOOL_CALLS = "tool_calls"
    ABORT = "abort"
    ERROR = "error"
    REPETITION = "repetition"


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that a model may call: ``parameters`` is the JSON schema of its arguments."""

    name: str
    description: str = ""
    parameters: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check(
            isinstance(self.name, str) and re.fullmatch(r"[A-Za-z0-9_.-]{1,128}", self.name) is not None,
            "tools",
            f"names are 1 to 128 of a-z, A-Z, 0-9, _, . and -, not {self.name!r:.80}.",
        )
        check(isinstance(self.parameters, dict), "tools", "must give parameters as a JSON schema.")
        for place in ("$defs", "definitions"):
            check(isinstance(self.parameters.get(place, {}), dict), "tools", f"{self.name}: {place} must be an object.")

    def function(self) -> dict[str, Any]:
        """What a chat template sees, and OpenAI's clients send."""
        described = {"description": self.description} if self.description else {}
        return {"type": "function", "function": {"name": self.name, **described, "parameters": self.parameters}}


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that a model made; ``arguments`` is a JSON object as text, if the model wrote one."""

    call_id: str
    name: str
    arguments: str

    def as_object(self) -> dict[str, Any]:
        """The arguments as an object; what is none stands in it as text.

        >>> ToolCall("1", "ls", '{"path": "/"}').as_object(), ToolCall("1", "ls", '{"pa').as_object()
        ({'path': '/'}, {'arguments': '{"pa'})
        """
        try:
            read = json.loads(self.arguments or "{}")
            shallow = self.arguments.count("[") + self.arguments.count("{") <= MAX_DEPTH or depth_of(read) <= MAX_DEPTH
        except (ValueError, RecursionError):
            read, shallow = None, False
        return read if isinstance(read, dict) and shallow else {"arguments": self.arguments}


@dataclass(frozen=True, slots=True)
class Message:
    """One chat message. ``role`` is system, developer, user, assistant or tool. An assistant's may hold ``tool_calls`` (also given as OpenAI's dicts), a tool's
    says by ``tool_call_id`` which of them it answers."""

    role: str
    content: str = ""
    name: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    reasoning_content: str | None = None

    def __post_init__(self) -> None:
        if self.content is None:
            object.__setattr__(self, "content", "")
        check(isinstance(self.content, str), "messages", "must have text as content.")
        object.__setattr__(self, "tool_calls", tuple(_tool_call(c) for c in self.tool_calls or ()))

    def as_json(self) -> dict[str, Any]:
        """The message for another process or a file: as `as_dict`, with the arguments of calls as they were written."""
        found = self.as_dict()
        for call, entry in zip(self.tool_calls, found.get("tool_calls", ()), strict=True):
            entry["function"]["arguments"] = call.arguments
        return found

    def as_dict(self) -> dict[str, Any]:
        """What a chat template sees."""
        found: dict[str, Any] = {"role": self.role, "content": self.content}
        found.update((key, value) for key in ("name", "tool_call_id", "reasoning_content") if (value := getattr(self, key)))
        if self.tool_calls:
            found["tool_calls"] = [{"id": c.call_id, "type": "function", "function": {"name": c.name, "arguments": c.as_object()}} for c in self.tool_calls]
        return found


def _tool_call(given: Any) -> ToolCall:
    """A call in our form or in OpenAI's. What a model wrote is not judged: an old call that was cut off must not spoil all that follows. Raises
    `InvalidRequestError` for what is no call at all."""
    if isinstance(given, dict):
        function = given.get("function")
        if not isinstance(function, dict):
            raise InvalidRequestError("messages: tool_calls must hold an id and a function with name and arguments.", "messages")
        arguments = function.get("arguments") or "{}"
        given = ToolCall(str(given.get("id") or ""), str(function.get("name") or ""), arguments if isinstance(arguments, str) else json.dumps(arguments))
    if not isinstance(given, ToolCall):
        raise InvalidRequestError("messages: tool_calls must hold calls.", "messages")
    return given


def depth_of(value: Any) -> int:
    """How deeply lists and objects are nested; without recursion."""
    deepest, level = 0, [value]
    while level:
        deepest += 1
        level = [v for x in level if isinstance(x, list | dict) for v in (x.values() if isinstance(x, dict) else x) if isinstance(v, list | dict)]
    return deepest


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """What a caller asks: exactly one of ``prompt`` (text or token ids) and ``messages``.

    A lower ``priority`` goes first (0 is usual). ``caller`` names who asks: callers share the engine fairly, whatever the number of their requests.
    Cached prefixes are shared only among requests of one caller and one ``cache_salt``, so that nobody learns of others' prompts by timing or by counts;
    callers of one ``cache_scope`` share theirs. ``n`` answers are made of a prompt that is rendered and tokenized once.
    ``lora`` names adapters that were loaded with the model, and their scales (None: as loaded, (): none).
    ``keep_on_disk`` (with ``max_tokens=0``) saves the computed prompt for later processes. ``tools`` and ``template_options`` go to the chat template.
    With a ``suffix`` the text between ``prompt`` and it is written, by models that have learned to. ``show_marks`` keeps in the text what the model writes to
    mark calls of tools and reasoning, for `llmkit.chat.reading`. ``continue_final``: the last message, an assistant's, is the beginning of the answer.
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
    parse_special: bool = False  # ``prompt`` spells control tokens
    tools: tuple[Tool, ...] = ()
    template_options: dict[str, Any] = field(default_factory=dict)
    suffix: str | None = None
    show_marks: bool = False
    continue_final: bool = False
    n: int = 1
    cache_scope: str | None = None

    @property
    def salt(self) -> str:
        """Requests of the same salt share cached prefixes: those of one caller (of one ``cache_scope``, where that is given) and one ``cache_salt``."""
        scope = self.caller if self.cache_scope is None else self.cache_scope
        return f"{scope}\0{self.cache_salt}" if scope else self.cache_salt

    def choices(self) -> list[GenerationRequest]:
        """One request for each of the ``n``, with an id and a seed of its own."""
        if self.n == 1:
            return [self]
        seed = self.sampling.seed
        params = [self.sampling if seed is None else replace(self.sampling, seed=seed + i) for i in range(self.n)]
        return [replace(self, n=1, request_id=f"{self.request_id}-{i}", sampling=p) for i, p in enumerate(params)]

    def __post_init__(self) -> None:
        check_integer(self.n, "n", 1, MAX_CHOICES)
        check(self.cache_scope is None or (isinstance(self.cache_scope, str) and len(self.cache_scope) <= 1000), "cache_scope", "must be a short text.")
        check_integer(self.priority, "priority", -(2**31), 2**31)
        for param in ("caller", "cache_salt"):
            check(isinstance(getattr(self, param), str) and len(getattr(self, param)) <= 1000, param, "must be a text of at most 1000 characters.")
        if isinstance(self.lora, dict):
            object.__setattr__(self, "lora", tuple(self.lora.items()))
        for name, scale in self.lora or ():
            check(isinstance(name, str), "lora", "must name adapters.")
            check_number(scale, "lora", -100, 100)
        fills = self.suffix is None or (isinstance(self.suffix, str) and isinstance(self.prompt, str))
        check(fills, "suffix", "must be a text, and so must the prompt.")
        check((self.prompt is None) != (self.messages is None), "prompt", "or messages must be given, and only one of them.")


@dataclass(frozen=True, slots=True)
class EmbeddingRequest:
    """Texts (or their token ids) to turn into vectors, of length 1 unless ``normalize`` is False; with a ``query``, documents to score. ``caller`` asks."""

    request_id: str
    inputs: tuple[str | tuple[int, ...], ...]
    normalize: bool = True
    query: str | None = None
    caller: str = ""

    def __post_init__(self) -> None:
        check(0 < len(self.inputs) <= MAX_INPUTS, "input", f"must hold 1 to {MAX_INPUTS} texts.")
        check(all(isinstance(i, str | tuple) for i in self.inputs), "input", "must hold texts or lists of token ids.")


@dataclass(frozen=True, slots=True)
class Embeddings:
    """Vectors as little-endian float32, one after the other, ``size`` numbers each; ``num_tokens`` of each text."""

    data: bytes
    size: int
    num_tokens: tuple[int, ...]


InquiryKind = Literal["tokenize", "detokenize", "render", "tokenize_chat", "info", "steps", "slots", "requests"]


@dataclass(frozen=True, slots=True)
class Inquiry:
    """A question about a model's vocabulary or chat template, or about the engine's last ``steps``, ``slots`` and ``requests``. ``data`` is JSON-ready:
    ``text``, ``tokens`` or ``messages``, and options."""

    request_id: str
    kind: InquiryKind
    data: dict[str, Any]
    caller: str = ""


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of one request; ``cached_tokens`` of the prompt came from a cached prefix, ``reasoning_tokens`` of the completion were reasoning (counted
    where an answer is read as a chat's)."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    reasoning_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True)
class RequestMetrics:
    """Times of one request in seconds, measured in the engine.

    ``ttft_s`` from arrival to the first token, ``queue_s`` of it spent waiting, ``decode_s`` from the first to the last token,
    ``max_itl_s`` the largest gap between two tokens.
    """

    queue_s: float = 0.0
    ttft_s: float = 0.0
    decode_s: float = 0.0
    max_itl_s: float = 0.0


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token, the bytes it stands for, its natural log-probability under the model (before temperature and penalties), and the likeliest tokens in its place.

    ``logprob`` is None for the first token of a prompt: nothing comes before it.
    """

    token: int
    piece: bytes
    logprob: float | None
    top: tuple[tuple[int, bytes, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Delta:
    """New text of one stream, how many tokens it took, and their log-probabilities where asked."""

    text: str
    num_tokens: int
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Completion:
    """One finished generation: text, why it ended, token counts and times.

    ``tokens`` holds the generated token ids (without the end-of-generation token), ``logprobs`` one entry for each of them where asked,
    ``prompt_logprobs`` one for each token of the prompt.
    """

    text: str
    finish_reason: FinishReason
    usage: Usage = Usage()
    metrics: RequestMetrics = field(default=RequestMetrics(), compare=False)
    tokens: tuple[int, ...] = ()
    request_id: str = field(default="", compare=False)
    error: str | None = None
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    stop: str | None = None  # the stop string that was met
    reasoning: str = ""  # of a chat: what the model wrote for itself

    @property
    def is_cut(self) -> bool:
        """Whether it was cut short: by length, repetition or an abort."""
        return self.finish_reason in (FinishReason.LENGTH, FinishReason.REPETITION, FinishReason.ABORT)

    @property
    def decode_tok_s(self) -> float:
        """Generated tokens a second after the first one (nan below two tokens)."""
        n = self.usage.completion_tokens - 1
        return n / self.metrics.decode_s if n > 0 and self.metrics.decode_s > 0 else math.nan

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        u = self.usage
        return (
            f"Completion({self.text!r}, finish_reason={self.finish_reason.value!r}, prompt_tokens={u.prompt_tokens}, completion_tokens={u.completion_tokens})"
        )


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot of one engine; counters only grow. KV figures are in tokens (cells), times in seconds."""

    num_running: int = 0
    num_waiting: int = 0
    kv_used_tokens: int = 0
    kv_cached_tokens: int = 0
    kv_capacity_tokens: int = 0
    num_slots: int = 0
    prompt_tokens_total: int = 0
    cached_tokens_total: int = 0
    generation_tokens_total: int = 0
    requests_total: int = 0
    steps_total: int = 0
    step_seconds_total: float = 0.0
    preemptions_total: int = 0
    draft_tokens_total: int = 0
    accepted_tokens_total: int = 0
    host_cached_tokens: int = 0
    backend_seconds_total: float = 0.0

    @property
    def kv_usage(self) -> float:
        """Share of the KV cells that running requests occupy, 0 to 1."""
        return self.kv_used_tokens / self.kv_capacity_tokens if self.kv_capacity_tokens else 0.0


@dataclass(frozen=True, slots=True)
class ModelDescription:
    """What a client needs to know of a loaded model; sizes in bytes."""

    name: str
    path: str
    architecture: str = ""
    quantization: str = ""
    n_params: int = 0
    n_ctx: int = 0
    n_ctx_train: int = 0
    n_slots: int = 0
    n_vocab: int = 0
    weights_bytes: int = 0
    kv_bytes: int = 0
    compute_bytes: int = 0  # about: what the vocabulary's tables and the activations of a step take
    device_bytes: dict[str, int] = field(default_factory=dict, hash=False)  # of these, on GPUs: "weights", "kv", "compute"; nothing without a GPU
    embedding_size: int = 0
    ranks: bool = False  # it scores pairs of texts
    tool_form: str = "general"  # how it writes calls of tools, see llmkit.chat.tools
    reasoning: str = ""  # how it reasons before it answers, see `ChatTemplate.reasoning`; nothing where it does not
    reasons_after_results: bool = True  # also where the last message is what a tool gave
    device: Literal["cpu", "gpu"] = "cpu"
    created: int = 0
