"""The objects of llama-server's answers, field by field. Pure."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from typing import Any

from llmkit.protocol import Completion, FinishReason, SamplingParams, TokenLogprob

__all__ = [
    "RANDOM_SEED",
    "compact",
    "final",
    "listed",
    "partial",
    "picked",
    "probabilities",
    "settings",
    "stop_type",
    "timings",
]

LOWEST = -3.4028234663852886e38  # what llama-server sends for minus infinity
RANDOM_SEED = 4294967295
SAMPLERS = ["penalties", "dry", "top_k", "typ_p", "top_p", "min_p", "xtc", "temperature"]


def compact(value: Any) -> str:
    """JSON without spaces: llama.vim looks for ``"content":"`` in it."""
    return json.dumps(value, separators=(",", ":"))


def timings(completion: Completion) -> dict[str, Any]:
    """How fast an answer was: times in milliseconds, rates in tokens per second.

    >>> timings(Completion("", FinishReason.STOP))["predicted_per_second"]
    0.0
    """
    metrics, usage = completion.metrics, completion.usage
    prompt_n = usage.prompt_tokens - usage.cached_tokens
    prompt_ms = max(metrics.ttft_s - metrics.queue_s, 0.0) * 1000
    steps, predicted_ms = max(usage.completion_tokens - 1, 0), metrics.decode_s * 1000
    made = {
        "cache_n": usage.cached_tokens,
        "prompt_n": prompt_n,
        "prompt_ms": prompt_ms,
        "prompt_per_token_ms": _ratio(prompt_ms, prompt_n),
        "prompt_per_second": _ratio(prompt_n * 1000, prompt_ms),
        "predicted_n": usage.completion_tokens,
        "predicted_ms": predicted_ms,
        "predicted_per_token_ms": _ratio(predicted_ms, steps),
        "predicted_per_second": _ratio(steps * 1000, predicted_ms),
    }
    if metrics.draft_tokens:
        made |= {"draft_n": metrics.draft_tokens, "draft_n_accepted": metrics.accepted_tokens}
    return made


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0


def settings(
    sampling: SamplingParams,
    *,
    stream: bool = False,
    lora: Sequence[tuple[int, float]] = (),
) -> dict[str, Any]:
    """Sampling as ``generation_settings``; ``lora`` has ids of adapters and their scales."""
    limit = -1 if sampling.max_tokens is None else sampling.max_tokens
    grammar = sampling.grammar
    return {
        "seed": RANDOM_SEED if sampling.seed is None else sampling.seed,
        "temperature": sampling.temperature,
        "dynatemp_range": 0.0,
        "dynatemp_exponent": 1.0,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "min_p": sampling.min_p,
        "top_n_sigma": -1.0,
        "xtc_probability": sampling.xtc_probability,
        "xtc_threshold": sampling.xtc_threshold,
        "typical_p": sampling.typical_p,
        "repeat_last_n": sampling.penalty_last_n,
        "repeat_penalty": sampling.repetition_penalty,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "dry_multiplier": sampling.dry_multiplier,
        "dry_base": sampling.dry_base,
        "dry_allowed_length": sampling.dry_allowed_length,
        "dry_penalty_last_n": sampling.dry_penalty_last_n,
        "dry_sequence_breakers": list(sampling.dry_sequence_breakers),
        "mirostat": sampling.mirostat,
        "mirostat_tau": sampling.mirostat_tau,
        "mirostat_eta": sampling.mirostat_eta,
        "adaptive_target": -1.0,
        "adaptive_decay": 0.9,
        "stop": list(sampling.stop),
        "max_tokens": limit,
        "n_predict": limit,
        "n_keep": 0,
        "n_discard": 0,
        "ignore_eos": sampling.ignore_eos,
        "stream": stream,
        "logit_bias": [{"bias": bias, "token": token} for token, bias in sampling.logit_bias],
        "n_probs": sampling.logprobs or 0,
        "min_keep": 0,
        "grammar": grammar.text if grammar is not None and grammar.kind == "gbnf" else "",
        "grammar_lazy": False,
        "grammar_triggers": [],
        "preserved_tokens": [],
        "chat_format": "Content-only",
        "reasoning_format": "none",
        "reasoning_in_content": False,
        "generation_prompt": "",
        "samplers": SAMPLERS,
        "speculative.types": "none",
        "timings_per_token": False,
        "post_sampling_probs": False,
        "backend_sampling": False,
        "lora": [{"id": adapter, "scale": scale} for adapter, scale in lora],
    }


def probabilities(entries: Sequence[TokenLogprob]) -> list[dict[str, Any]]:
    """``completion_probabilities`` of tokens."""
    return [
        {
            **_token(e.token, e.piece, LOWEST if e.logprob is None else e.logprob),
            "top_logprobs": [_token(*each) for each in e.top],
        }
        for e in entries
    ]


def _token(token: int, piece: bytes, logprob: float) -> dict[str, Any]:
    return {
        "id": token,
        "token": piece.decode("utf-8", "ignore"),
        "bytes": list(piece),
        "logprob": max(logprob, LOWEST),
    }


def partial(
    index: int, text: str, num_tokens: int, prompt_tokens: int, entries: Sequence[TokenLogprob]
) -> dict[str, Any]:
    """An event of a stream; ``num_tokens`` have been generated so far."""
    return {
        "index": index,
        "content": text,
        "tokens": [e.token for e in entries],
        "stop": False,
        "id_slot": -1,
        "tokens_predicted": num_tokens,
        "tokens_evaluated": prompt_tokens,
    }


def final(
    index: int,
    model: str,
    completion: Completion,
    sampling: SamplingParams,
    prompt: str,
    *,
    stream: bool,
    tokens: Sequence[int] = (),
    lora: Sequence[tuple[int, float]] = (),
) -> dict[str, Any]:
    """A whole answer; in a stream, its last event."""
    usage = completion.usage
    return {
        "index": index,
        "content": "" if stream else completion.text,
        "tokens": list(tokens),
        "id_slot": -1,
        "stop": True,
        "model": model,
        "tokens_predicted": usage.completion_tokens,
        "tokens_evaluated": usage.prompt_tokens,
        "generation_settings": settings(sampling, stream=stream, lora=lora),
        "prompt": prompt,
        "has_new_line": "\n" in completion.text,
        "truncated": False,
        "stop_type": stop_type(completion),
        "stopping_word": completion.stop or "",
        "tokens_cached": max(usage.prompt_tokens + usage.completion_tokens - 1, 0),
        "timings": timings(completion),
    }


def listed(model: str, inputs: Collection[str] | None) -> dict[str, Any]:
    """A model in ``models`` of /v1/models; llama-server leaves most of it empty too. ``inputs`` are
    what its chats may hold; None if it has none."""
    capabilities = [] if inputs is None else ["completion"]
    if {"image", "audio"} & {*(inputs or ())}:
        capabilities.append("multimodal")
    details = {
        "parent_model": "",
        "format": "gguf",
        "family": "",
        "families": [""],
        "parameter_size": "",
        "quantization_level": "",
    }
    return {
        "name": model,
        "model": model,
        "modified_at": "",
        "size": "",
        "digest": "",
        "type": "model",
        "description": "",
        "tags": [""],
        "capabilities": capabilities,
        "parameters": "",
        "details": details,
    }


def stop_type(completion: Completion) -> str:
    """eos, word or limit."""
    if completion.finish_reason is not FinishReason.STOP:
        return "limit"
    return "word" if completion.stop else "eos"


def picked(paths: Sequence[str], answer: dict[str, Any]) -> dict[str, Any]:
    """The wanted fields of an answer, each by its path; all of them without any.

    >>> picked(["timings/prompt_n", "none"], {"content": "", "timings": {"prompt_n": 3}})
    {'timings/prompt_n': 3}
    """
    if not paths:
        return answer
    found = {}
    for path in paths:
        value: Any = answer
        for name in path.split("/"):
            if not isinstance(value, dict) or name not in value:
                break
            value = value[name]
        else:
            found[path] = value
    return found
