"""What crosses the bridge: ZMQ messages (kind, JSON), and the translation of llmkit's types and errors. Pure.

client → server   HELLO key, owner · SUBMIT request · EMBED request · INQUIRE question · ABORT id · PING
                  SUBMIT, EMBED and INQUIRE have a third frame: id, caller and n, for whoever only passes them on.
server → client   WELCOME description · DENIED · EVENTS [[id, text, tokens, logprobs], …] [[id, completion, failure], …] · EMBEDDED id, vectors, failure ·
                  ANSWER id, answer, failure · PONG stats · GOODBYE reason
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from typing import Any

from llmkit import errors
from llmkit.bridge.connection import known
from llmkit.types import (
    Completion,
    EmbeddingRequest,
    Embeddings,
    EngineStats,
    FinishReason,
    GenerationRequest,
    Message,
    ModelDescription,
    RequestMetrics,
    SamplingParams,
    TokenLogprob,
    Tool,
    Usage,
)

VERSION = 3  # of what is said; fields that the other side does not know are passed over, fields that it does not send have their defaults

__all__ = [
    "ABORT",
    "ANSWER",
    "DENIED",
    "EMBED",
    "EMBEDDED",
    "EVENTS",
    "GOODBYE",
    "HELLO",
    "INQUIRE",
    "PING",
    "PONG",
    "SUBMIT",
    "VERSION",
    "WELCOME",
    "choice_ids",
    "completion_from",
    "completion_to",
    "description_from",
    "description_to",
    "embedding_request_from",
    "embedding_request_to",
    "embeddings_from",
    "embeddings_to",
    "error_from",
    "error_to",
    "logprobs_from",
    "logprobs_to",
    "pack",
    "request_from",
    "request_to",
    "stats_from",
    "stats_to",
    "unpack",
]  # fmt: skip

HELLO, SUBMIT, EMBED, INQUIRE, ABORT, PING = b"HELLO", b"SUBMIT", b"EMBED", b"INQUIRE", b"ABORT", b"PING"
WELCOME, DENIED, EVENTS, EMBEDDED, ANSWER, PONG, GOODBYE = b"WELCOME", b"DENIED", b"EVENTS", b"EMBEDDED", b"ANSWER", b"PONG", b"GOODBYE"


def pack(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def unpack(data: bytes) -> Any:
    return json.loads(data)


def choice_ids(request_id: str, n: int) -> list[str]:
    """The ids of the answers to a request, as `GenerationRequest.choices` makes them."""
    return [request_id] if n == 1 else [f"{request_id}-{i}" for i in range(n)]


def request_to(request: GenerationRequest) -> dict[str, Any]:
    return {
        "id": request.request_id,
        "sampling": request.sampling.as_dict(),
        "prompt": request.prompt,
        "messages": None if request.messages is None else [m.as_json() for m in request.messages],
        "priority": request.priority,
        "caller": request.caller,
        "cache_salt": request.cache_salt,
        "keep_on_disk": request.keep_on_disk,
        "lora": request.lora,
        "parse_special": request.parse_special,
        "tools": [asdict(tool) for tool in request.tools],
        "template_options": request.template_options,
        "suffix": request.suffix,
        "show_marks": request.show_marks,
        "continue_final": request.continue_final,
        "n": request.n,
        "cache_scope": request.cache_scope,
    }


def request_from(data: dict[str, Any]) -> GenerationRequest:
    """Raises `InvalidRequestError` for values out of range, and for what this version cannot do."""
    sampling = dict(data["sampling"])
    unknown = sampling.keys() - {f.name for f in fields(SamplingParams)}
    if unknown:
        raise errors.InvalidRequestError(f"{min(unknown)} is not known to the llmkit in the model's process, which is of another version.", min(unknown))
    if "dry_sequence_breakers" in sampling:
        sampling["dry_sequence_breakers"] = tuple(sampling["dry_sequence_breakers"])
    if "logit_bias" in sampling:
        sampling["logit_bias"] = tuple((t, b) for t, b in sampling["logit_bias"])
    prompt = data["prompt"]
    return GenerationRequest(
        data["id"],
        SamplingParams(**sampling),
        prompt=tuple(prompt) if isinstance(prompt, list) else prompt,
        messages=None if data["messages"] is None else tuple(Message(**m) for m in data["messages"]),
        priority=data["priority"],
        caller=data["caller"],
        cache_salt=data["cache_salt"],
        keep_on_disk=data["keep_on_disk"],
        lora=None if data["lora"] is None else tuple((name, scale) for name, scale in data["lora"]),
        parse_special=data["parse_special"],
        tools=tuple(Tool(**tool) for tool in data["tools"]),
        template_options=data["template_options"],
        suffix=data["suffix"],
        show_marks=data["show_marks"],
        continue_final=data.get("continue_final", False),
        n=data.get("n", 1),
        cache_scope=data.get("cache_scope"),
    )


def embedding_request_to(request: EmbeddingRequest) -> dict[str, Any]:
    return {"id": request.request_id, "inputs": request.inputs, "normalize": request.normalize, "query": request.query, "caller": request.caller}


def embedding_request_from(data: dict[str, Any]) -> EmbeddingRequest:
    inputs = tuple(i if isinstance(i, str) else tuple(i) for i in data["inputs"])
    return EmbeddingRequest(data["id"], inputs, data["normalize"], data["query"], data.get("caller", ""))


def embeddings_to(found: Embeddings) -> dict[str, Any]:
    return {"data": base64.b64encode(found.data).decode(), "size": found.size, "num_tokens": found.num_tokens}


def embeddings_from(data: dict[str, Any]) -> Embeddings:
    return Embeddings(base64.b64decode(data["data"]), data["size"], tuple(data["num_tokens"]))


def logprobs_to(entries: Sequence[TokenLogprob]) -> list[Any]:
    return [[e.token, e.piece.decode("latin-1"), e.logprob, [[t, b.decode("latin-1"), p] for t, b, p in e.top]] for e in entries]


def logprobs_from(data: list[Any]) -> tuple[TokenLogprob, ...]:
    return tuple(TokenLogprob(t, b.encode("latin-1"), p, tuple((i, x.encode("latin-1"), q) for i, x, q in top)) for t, b, p, top in data)


def completion_to(completion: Completion) -> dict[str, Any]:
    """Without the text and its log-probabilities: the reader has them from the deltas."""
    prompt_logprobs = logprobs_to(completion.prompt_logprobs)
    data = asdict(replace(completion, logprobs=(), prompt_logprobs=()))
    del data["text"], data["request_id"], data["logprobs"]
    return {**data, "prompt_logprobs": prompt_logprobs}


def completion_from(data: dict[str, Any], request_id: str, text: str, logprobs: tuple[TokenLogprob, ...] = ()) -> Completion:
    return Completion(
        text=text,
        finish_reason=FinishReason(data["finish_reason"]),
        usage=Usage(**known(Usage, data["usage"])),
        metrics=RequestMetrics(**known(RequestMetrics, data["metrics"])),
        tokens=tuple(data["tokens"]),
        request_id=request_id,
        error=data["error"],
        logprobs=logprobs,
        prompt_logprobs=logprobs_from(data["prompt_logprobs"]),
        stop=data["stop"],
    )


def description_to(description: ModelDescription) -> dict[str, Any]:
    return asdict(description)


def description_from(data: dict[str, Any]) -> ModelDescription:
    return ModelDescription(**known(ModelDescription, data))


def stats_to(stats: EngineStats) -> dict[str, Any]:
    return asdict(stats)


def stats_from(data: dict[str, Any]) -> EngineStats:
    return EngineStats(**known(EngineStats, data))


def error_to(error: Exception) -> dict[str, Any]:
    data: dict[str, Any] = {"type": type(error).__name__, "message": str(error)}
    if isinstance(error, errors.InvalidRequestError):
        data["param"] = error.param
    if isinstance(error, errors.ContextLengthError):
        data |= {"num_tokens": error.num_tokens, "n_ctx": error.n_ctx}
    return data


def error_from(data: dict[str, Any]) -> Exception:
    """The same class on this side; what is not llmkit's becomes an `EngineError`."""
    name, message = data["type"], data["message"]
    if name == "ContextLengthError":
        return errors.ContextLengthError(data["num_tokens"], data["n_ctx"], data["param"])
    if name == "InvalidRequestError":
        return errors.InvalidRequestError(message, data["param"])
    kind = getattr(errors, name, None)
    return kind(message) if isinstance(kind, type) and issubclass(kind, errors.LLMKitError) else errors.EngineError(message)
