"""The objects of Ollama's answers: messages, the lines of a stream, models. Pure."""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime
from typing import Any

from llmkit.chat.parsers.events import Call, Content, Event, Reasoning
from llmkit.protocol import Completion, ModelDescription

__all__ = [
    "NDJSON",
    "answer_line",
    "ending",
    "loaded_line",
    "message_fields",
    "model_details",
    "model_entry",
    "model_sizes",
    "nanoseconds",
]

NDJSON = "application/x-ndjson"


def message_fields(events: list[Event], num_calls: int = 0) -> dict[str, Any]:
    """Events as the non-empty fields of a message; ``num_calls`` calls came before them."""
    fields: dict[str, Any] = {}
    for event in events:
        match event:
            case Content():
                fields["content"] = fields.get("content", "") + event.text
            case Reasoning():
                fields["thinking"] = fields.get("thinking", "") + event.text
            case Call():
                calls = fields.setdefault("tool_calls", [])
                calls.append(
                    {
                        "id": event.call_id,
                        "function": {
                            "index": num_calls + len(calls),
                            "name": event.name,
                            "arguments": json.loads(event.arguments),
                        },
                    }
                )
    return fields


def answer_line(model: str, fields: dict[str, Any]) -> dict[str, Any]:
    now = datetime.now(UTC).isoformat().replace("+00:00", "Z")
    return {"model": model, "created_at": now, **fields}


def loaded_line(model: str, fields: dict[str, Any], *, ends: bool = False) -> dict[str, Any]:
    """The answer to a request without a prompt, with which clients load a model, or end it."""
    return {**answer_line(model, fields), "done": True, "done_reason": "unload" if ends else "load"}


def ending(completion: Completion, started: float) -> dict[str, Any]:
    """The last fields of an answer to a request of the time ``started``."""
    metrics, usage = completion.metrics, completion.usage
    return {
        "done": True,
        "done_reason": "length" if completion.is_cut else "stop",
        "total_duration": nanoseconds(time.perf_counter() - started),
        "load_duration": 0,
        "prompt_eval_count": usage.prompt_tokens,
        "prompt_eval_duration": nanoseconds(max(metrics.ttft_s - metrics.queue_s, 0.0)),
        "eval_count": usage.completion_tokens,
        "eval_duration": nanoseconds(metrics.decode_s),
    }


def nanoseconds(seconds: float) -> int:
    return int(seconds * 1e9)


def model_entry(model_id: str, model: ModelDescription) -> dict[str, Any]:
    modified = datetime.fromtimestamp(model.created, UTC).isoformat()
    return {
        "name": model_id,
        "model": model_id,
        "modified_at": modified,
        "size": model.weights_bytes,
        "digest": "",
        "details": model_details(model),
    }


def model_sizes(model: ModelDescription) -> dict[str, int]:
    size = model.weights_bytes + model.kv_bytes
    return {
        "size": size,
        "size_vram": size if model.device == "gpu" else 0,
        "context_length": model.n_ctx,
    }


def model_details(model: ModelDescription) -> dict[str, Any]:
    return {
        "parent_model": "",
        "format": "gguf",
        "family": model.architecture,
        "families": [model.architecture],
        "parameter_size": f"{model.n_params / 1e6:.0f}M"
        if model.n_params < 1e9
        else f"{model.n_params / 1e9:.1f}B",
        "quantization_level": model.quantization,
    }
