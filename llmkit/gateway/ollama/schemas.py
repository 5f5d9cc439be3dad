"""Ollama's requests: the schemas, and their translation to a chat. Pure."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from llmkit.errors import InvalidRequestError
from llmkit.gateway.bodies import Strict, validated
from llmkit.gateway.openai.chat import ChatRequest, ToolBody
from llmkit.gateway.tolerance import unnoticed
from llmkit.protocol import ModelDescription

__all__ = ["ChatBody", "EmbedBody", "GenerateBody", "GenerationBody", "OldEmbedBody", "ShowBody"]

SAME_NAME = (  # options that OpenAI's request calls the same
    "temperature", "top_k", "top_p", "min_p", "typical_p", "seed", "stop", "repeat_penalty",
    "repeat_last_n", "presence_penalty", "frequency_penalty", "mirostat", "mirostat_tau",
    "mirostat_eta",
)  # fmt: skip
INTEGERS = ("top_k", "seed", "repeat_last_n", "num_ctx", "num_predict", "mirostat")


class OllamaFunction(Strict):
    name: str
    arguments: dict[str, Any] | str = Field(default_factory=dict)
    index: int | None = None


class OllamaCall(Strict):
    function: OllamaFunction
    id: str | None = None
    type: str | None = None


class OllamaMessage(Strict):
    role: Annotated[
        Literal["system", "developer", "user", "assistant", "tool"],
        BeforeValidator(lambda r: r.lower() if isinstance(r, str) else r),
    ]
    content: str | None = None
    thinking: str | None = None
    tool_calls: list[OllamaCall] | None = None
    tool_name: str | None = None
    tool_call_id: str | None = None
    images: Annotated[list[str], Field(max_length=0)] | None = None

    def message(self, index: int) -> dict[str, Any]:
        """The same as OpenAI's message; ``index`` is its position in the chat."""
        message: dict[str, Any] = {"role": self.role, "content": self.content or ""}
        if self.tool_calls:
            message["tool_calls"] = [
                {
                    "id": c.id or f"call_{index}_{i}",
                    "type": "function",
                    "function": {
                        "name": c.function.name,
                        "arguments": _arguments(c.function.arguments),
                    },
                }
                for i, c in enumerate(self.tool_calls)
            ]
        optional = {
            "reasoning_content": self.thinking,
            "name": self.tool_name,
            "tool_call_id": self.tool_call_id,
        }
        return {**message, **{k: v for k, v in optional.items() if v is not None}}


def _arguments(arguments: dict[str, Any] | str) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments)


class GenerationBody(Strict):
    """The fields of both endpoints, chat and generate."""

    model: str
    stream: bool = True
    format: Literal["", "json"] | dict[str, Any] | None = None
    options: dict[str, Any] = Field(default_factory=dict)
    keep_alive: str | int | float | None = None  # ignored: whoever loads a model unloads it
    think: bool | Literal["low", "medium", "high", "max"] | None = None

    def openai_fields(
        self, model: ModelDescription, ignore: Callable[[str], None] = unnoticed
    ) -> dict[str, Any]:
        """The same as fields of OpenAI's request. Raises `InvalidRequestError`.

        What ``model`` cannot honour and does not change the answer is passed to ``ignore``.
        """
        fields: dict[str, Any] = {"model": self.model}
        for name, value in self.options.items():
            if isinstance(value, float) and value.is_integer() and name in INTEGERS:
                value = int(value)  # JavaScript has no integers
            is_int = isinstance(value, int) and not isinstance(value, bool)
            if value is None or (name in ("seed", "num_predict") and is_int and value < 0):
                continue  # absent, a random seed, or no limit
            if name == "num_ctx":
                if not is_int or value <= 0:
                    raise InvalidRequestError(
                        "options.num_ctx must be a number of tokens.", "options"
                    )
                if value > model.n_ctx:  # a prompt that does not fit is refused all the same
                    ignore("options.num_ctx")
            elif name == "num_predict":
                if not is_int or value == 0:
                    raise InvalidRequestError(
                        "options.num_predict must be a number of tokens, or negative for no limit.",
                        "options",
                    )
                fields["max_tokens"] = value
            elif name == "repeat_last_n" and is_int and value < 0:
                fields[name] = model.n_ctx
            elif name in SAME_NAME:
                fields[name] = value
            else:
                known = (*SAME_NAME, "num_ctx", "num_predict")
                near = difflib.get_close_matches(name[:60], known, n=1)
                hint = f" Did you mean {near[0]}?" if near else ""
                raise InvalidRequestError(
                    f"options.{name:.60} is not supported for a loaded model.{hint}", "options"
                )
        if self.format == "json":
            fields["response_format"] = {"type": "json_object"}
        elif isinstance(self.format, dict):
            fields["json_schema"] = self.format
        if self.think is not None and (model.reasoning or self.think):
            effort = (
                "none"
                if self.think is False
                else self.think
                if isinstance(self.think, str)
                else "medium"
            )
            fields["reasoning_effort"] = "xhigh" if effort == "max" else effort
        return {k: v for k, v in fields.items() if v is not None}


class ChatBody(GenerationBody):
    """POST /api/chat"""

    messages: list[OllamaMessage] = Field(default_factory=list)
    tools: list[ToolBody] | None = None

    def request(
        self, model: ModelDescription, ignore: Callable[[str], None] = unnoticed
    ) -> ChatRequest:
        fields = self.openai_fields(model, ignore)
        fields["messages"] = [m.message(i) for i, m in enumerate(self.messages)]
        if self.tools:
            fields["tools"] = [t.model_dump() for t in self.tools]
        if self.messages[-1].role == "assistant" and not self.messages[-1].tool_calls:
            fields["continue_final_message"] = True  # the reply's prefill
        return validated(ChatRequest, fields)


class GenerateBody(GenerationBody):
    """POST /api/generate"""

    prompt: str = ""
    suffix: str | None = None
    system: str | None = None
    raw: bool = False

    def request(
        self, model: ModelDescription, ignore: Callable[[str], None] = unnoticed
    ) -> ChatRequest:
        fields = self.openai_fields(model, ignore)
        system = [{"role": "system", "content": self.system}] if self.system else []
        fields["messages"] = [*system, {"role": "user", "content": self.prompt}]
        return validated(ChatRequest, fields)


class EmbedBody(Strict):
    """POST /api/embed"""

    model: str
    input: str | list[str]
    truncate: bool = True
    dimensions: Annotated[int, Field(ge=1)] | None = None
    keep_alive: str | int | float | None = None
    options: dict[str, Any] = Field(default_factory=dict)


class OldEmbedBody(Strict):
    """POST /api/embeddings"""

    model: str
    prompt: str
    keep_alive: str | int | float | None = None
    options: dict[str, Any] = Field(default_factory=dict)


class ShowBody(Strict):
    """POST /api/show"""

    model: str | None = None
    name: str | None = None
    verbose: bool = False
