"""OpenAI's responses: the request schema, its translation to a chat, and the response object.

Pure. The routes are in `responses_routes`, the output items in `event_stream`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import Field

from llmkit.errors import InvalidRequestError
from llmkit.gateway.bodies import UNKNOWN, Strict, validated
from llmkit.gateway.openai.chat import ChatRequest
from llmkit.gateway.openai.items import InputItem, ItemReference
from llmkit.gateway.openai.objects import new_id
from llmkit.gateway.openai.schemas import Metadata
from llmkit.gateway.tolerance import unnoticed
from llmkit.protocol import Completion, ModelDescription

__all__ = ["ResponsesBody", "finished", "input_items", "opened"]

Item = dict[str, Any]


class FunctionTool(Strict):
    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class FunctionChoice(Strict):
    type: Literal["function"]
    name: str


class TextFormat(Strict):
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class TextOptions(Strict):
    format: TextFormat | None = None
    verbosity: Literal["medium"] | None = None


class ReasoningOptions(Strict):
    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max", "ultra"] | None = (
        None
    )


class ResponseStreamOptions(Strict):
    include_obfuscation: bool | None = None


class ResponsesBody(Strict):
    """POST /v1/responses"""

    model: str = "default"
    input: str | list[InputItem]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: float | None = None
    top_p: float | None = None
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    store: bool | None = None
    previous_response_id: str | None = None
    tools: list[FunctionTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | FunctionChoice | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    metadata: Metadata | None = None
    user: str | None = None
    truncation: Literal["disabled"] | None = None
    background: Literal[False] | None = None
    include: list[str] | None = None
    service_tier: Literal["auto", "default"] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None

    def request(
        self,
        before: list[Item],
        own: list[Item] | None = None,
        model: ModelDescription = UNKNOWN,
        ignore: Callable[[str], None] = unnoticed,
    ) -> ChatRequest:
        """The equivalent chat; ``before`` are the items it continues, ``own`` its own items.

        What ``model`` cannot honour and does not change the answer is passed to ``ignore``.
        """
        items = [*before, *(input_items(self) if own is None else own)]
        if self.include:
            raise InvalidRequestError(
                f"include: {self.include[0]:.60} is not supported.", "include"
            )
        system = [{"role": "system", "content": self.instructions}] if self.instructions else []
        fields: dict[str, Any] = {"model": self.model, "messages": [*system, *_messages(items)]}
        sampling = {
            "max_completion_tokens": self.max_output_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
        }
        fields.update((k, v) for k, v in sampling.items() if v is not None)
        if self.tools:
            fields["tools"] = [
                {
                    "type": "function",
                    "function": {
                        "name": t.name,
                        "description": t.description or "",
                        "parameters": t.parameters or {},
                    },
                }
                for t in self.tools
            ]
        if self.tool_choice is not None:
            choice = self.tool_choice
            fields["tool_choice"] = (
                {"type": "function", "function": {"name": choice.name}}
                if isinstance(choice, FunctionChoice)
                else choice
            )
        if self.parallel_tool_calls is not None:
            fields["parallel_tool_calls"] = self.parallel_tool_calls
        form = self.text.format if self.text is not None else None
        if form is not None and form.type == "json_object":
            fields["response_format"] = {"type": "json_object"}
        if form is not None and form.type == "json_schema":
            fields["response_format"] = {
                "type": "json_schema",
                "json_schema": {
                    "name": form.name or "answer",
                    "schema": form.schema_ or {"type": "object"},
                },
            }
        effort = self.reasoning.effort if self.reasoning is not None else None
        if effort is not None and (model.reasoning or effort == "none"):
            fields["reasoning_effort"] = "xhigh" if effort in ("max", "ultra") else effort
        elif effort is not None:
            ignore("reasoning.effort")
        return validated(ChatRequest, fields)


def _not_stored(item_id: str) -> Item:
    raise InvalidRequestError(
        f"input: there is no item {item_id!r:.100}; it was not stored.", "input"
    )


def input_items(body: ResponsesBody, find: Callable[[str], Item] = _not_stored) -> list[Item]:
    """The input as items with ids; ``find`` looks up an item of a stored response by id."""
    if isinstance(body.input, str):
        return [
            {
                "id": new_id("msg", "_"),
                "type": "message",
                "role": "user",
                "status": "completed",
                "content": [{"type": "input_text", "text": body.input}],
            }
        ]
    items = []
    for item in body.input:
        if isinstance(item, ItemReference):
            items.append(find(item.id))
            continue
        data = item.model_dump(exclude_none=True)
        prefix = {"message": "msg", "reasoning": "rs"}.get(item.type, "fc")
        data.setdefault("id", new_id(prefix, "_"))
        if item.type == "message" and isinstance(item.content, str):
            data["content"] = [
                {
                    "type": "output_text" if item.role == "assistant" else "input_text",
                    "text": item.content,
                }
            ]
        items.append(data)
    return items


def _messages(items: list[Item]) -> list[dict[str, Any]]:
    """Items as chat messages; calls and reasoning join the assistant message next to them."""
    messages: list[dict[str, Any]] = []

    def assistant() -> dict[str, Any]:
        if not messages or messages[-1]["role"] != "assistant":
            messages.append({"role": "assistant", "content": ""})
        return messages[-1]

    def add_call(call_id: str, name: str, arguments: str) -> None:
        function = {"name": name, "arguments": arguments}
        assistant().setdefault("tool_calls", []).append(
            {"id": call_id, "type": "function", "function": function}
        )

    for item in items:
        match item["type"]:
            case "message" if item["role"] == "assistant":
                assistant()["content"] += _text(item["content"])
            case "message":
                messages.append({"role": item["role"], "content": _text(item["content"])})
            case "function_call":
                add_call(item["call_id"], item["name"], item["arguments"])
            case "custom_tool_call":
                add_call(item["call_id"], item["name"], json.dumps({"input": item["input"]}))
            case "local_shell_call":
                call_id = item.get("call_id") or item["id"]
                add_call(call_id, "local_shell", json.dumps(item["action"]))
            case "function_call_output" | "custom_tool_call_output" | "local_shell_call_output":
                messages.append(
                    {
                        "role": "tool",
                        "tool_call_id": item.get("call_id") or item["id"],
                        "content": _text(item["output"]),
                    }
                )
            case "reasoning":
                assistant()["reasoning_content"] = _text(item.get("content") or [])
    return messages


def _text(content: str | list[Item]) -> str:
    return (
        content
        if isinstance(content, str)
        else "".join(part.get("text") or part.get("refusal") or "" for part in content)
    )


def opened(body: ResponsesBody, response_id: str, model: str) -> dict[str, Any]:
    """The response object before any output."""
    form = body.text.format if body.text is not None and body.text.format is not None else None
    choice = body.tool_choice
    return {
        "id": response_id,
        "object": "response",
        "created_at": int(time.time()),
        "status": "in_progress",
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata or {},
        "model": model,
        "output": [],
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": body.previous_response_id,
        "reasoning": {"effort": body.reasoning.effort if body.reasoning else None, "summary": None},
        "service_tier": "default",
        "store": body.store is not False,
        "temperature": body.temperature,
        "text": {
            "format": {"type": "text"}
            if form is None
            else form.model_dump(by_alias=True, exclude_none=True)
        },
        "tool_choice": "auto"
        if choice is None
        else choice.model_dump()
        if isinstance(choice, FunctionChoice)
        else choice,
        "tools": [
            {**t.model_dump(), "strict": t.strict is not False, "parameters": t.parameters or {}}
            for t in body.tools or []
        ],
        "top_p": body.top_p,
        "truncation": "disabled",
        "usage": None,
        "user": body.user,
    }


def finished(
    response: dict[str, Any], output: list[Item], completion: Completion
) -> dict[str, Any]:
    """The finished response object."""
    is_cut, usage = completion.is_cut, completion.usage
    return {
        **response,
        "status": "incomplete" if is_cut else "completed",
        "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
        "output": output,
        "usage": {
            "input_tokens": usage.prompt_tokens,
            "input_tokens_details": {"cached_tokens": usage.cached_tokens},
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        },
    }
