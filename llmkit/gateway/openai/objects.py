"""The objects of OpenAI's answers. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llmkit.gateway.openai.logprobs import Offsets, text_logprobs
from llmkit.gateway.openai.schemas import CompletionRequest
from llmkit.protocol import Completion, FinishReason, ModelDescription, TokenLogprob, Usage

__all__ = [
    "Head",
    "completion_object",
    "ending",
    "model_object",
    "text_chunk",
    "unloaded_object",
    "usage_object",
]

FINISH_REASONS = {
    FinishReason.STOP: "stop",
    FinishReason.LENGTH: "length",
    FinishReason.TOOL_CALLS: "tool_calls",
    FinishReason.ABORT: "stop",
    FinishReason.REPETITION: "length",  # the only value clients know for truncated text
}
Head = dict[str, Any]


def usage_object(usages: list[Usage], num_prompts: int = 1) -> dict[str, Any]:
    """Tokens of a reply: each prompt counts once, the output of all choices is added up."""
    choices_per_prompt = max(1, len(usages) // num_prompts)
    prompts = usages[::choices_per_prompt]
    prompt = sum(u.prompt_tokens for u in prompts)
    completion = sum(u.completion_tokens for u in usages)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {
            "cached_tokens": sum(u.cached_tokens for u in prompts),
            **_media_tokens(prompts),
        },
        "completion_tokens_details": {"reasoning_tokens": sum(u.reasoning_tokens for u in usages)},
    }


def _media_tokens(prompts: list[Usage]) -> dict[str, int]:
    """Tokens that stand for pictures and sounds, where there are any."""
    images, sounds = (sum(getattr(u, f"{k}_tokens") for u in prompts) for k in ("image", "audio"))
    return {"image_tokens": images, "audio_tokens": sounds} if images or sounds else {}


def text_chunk(
    head: Head,
    index: int,
    text: str,
    finish: FinishReason | None = None,
    entries: Sequence[TokenLogprob] = (),
    offsets: Offsets | None = None,
) -> Head:
    return {
        **head,
        "choices": [
            {
                "text": text,
                "index": index,
                **ending(text_logprobs(entries, offsets) if entries else None, finish),
            }
        ],
    }


def ending(logprobs: Any, finish: FinishReason | None) -> dict[str, Any]:
    """The last fields of a choice."""
    return {
        "logprobs": logprobs,
        "finish_reason": None if finish is None else FINISH_REASONS[finish],
    }


def completion_object(
    head: Head, request: CompletionRequest, completions: list[Completion]
) -> Head:
    choices = [
        {
            "text": request.echo_text(i, c) + c.text,
            "index": i,
            "logprobs": request.choice_logprobs(c),
            "finish_reason": FINISH_REASONS[c.finish_reason],
        }
        for i, c in enumerate(request.best(completions))
    ]
    return {
        **head,
        "choices": choices,
        "usage": usage_object([c.usage for c in completions], len(request.prompts)),
    }


def model_object(model_id: str, description: ModelDescription) -> dict[str, Any]:
    n_embd = description.embedding_size or description.n_embd
    meta = {
        "vocab_type": description.vocab_type,
        "n_ctx": description.n_ctx,
        "n_ctx_train": description.n_ctx_train,
        "n_params": description.n_params,
        "n_vocab": description.n_vocab,
        "quantization": description.quantization,
        "ftype": description.quantization,
        "size": description.weights_bytes,
        **({"n_embd": n_embd} if n_embd else {}),
    }
    return {
        "id": model_id,
        "object": "model",
        "created": description.created,
        "owned_by": "llmkit",
        "status": {"value": "loaded"},
        **(
            {"architecture": _modalities(description)}
            if description.use in ("generate", "draw")
            else {}
        ),
        "meta": meta,
    }


def _modalities(description: ModelDescription) -> dict[str, Any]:
    made = "image" if description.use == "draw" else "text"
    return {"input_modalities": ["text", *description.inputs], "output_modalities": [made]}


def unloaded_object(model_id: str) -> dict[str, Any]:
    """A model that a request would load."""
    return {
        "id": model_id,
        "object": "model",
        "created": 0,
        "owned_by": "llmkit",
        "status": {"value": "unloaded"},
    }
