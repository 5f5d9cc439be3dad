"""OpenAI's responses: the request schema, its translation to a chat, and the response object.

Pure. The routes are in `responses_routes`, the output items in `event_stream`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from itertools import groupby
from typing import Annotated, Any, Literal

from pydantic import Field

from llmkit.errors import InvalidRequestError
from llmkit.gateway.bodies import SessionId, Strict
from llmkit.gateway.chats import Chat, Effort, NamedTool, sampling_params
from llmkit.gateway.ids import new_id
from llmkit.gateway.media.attached import Attached
from llmkit.gateway.openai.items import InputItem, ItemReference
from llmkit.gateway.openai.parts import kept
from llmkit.gateway.openai.schemas import Metadata
from llmkit.gateway.tolerance import unnoticed
from llmkit.protocol import Completion, Grammar, Message, ModelDescription, Tool, ToolCall
from llmkit.protocol.messages import Part

__all__ = ["ResponsesBody", "finished", "input_items", "opened", "referenced"]

Item = dict[str, Any]
CALLS = ("function_call", "custom_tool_call", "local_shell_call")


class FunctionTool(Strict):
    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    def tool(self) -> Tool:
        return Tool(self.name, self.description or "", self.parameters or {})


class FunctionChoice(Strict):
    type: Literal["function"]
    name: str


class TextFormat(Strict):
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None

    def grammar(self) -> Grammar | None:
        if self.type == "text":
            return None
        schema = self.schema_ if self.type == "json_schema" else None
        return Grammar(
            "json_schema", json.dumps(schema or {"type": "object"}), origin="text.format"
        )


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
    session_id: SessionId = None
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

    def chat(
        self,
        items: list[Item],
        model: ModelDescription,
        attached: Attached,
        ignore: Callable[[str], None] = unnoticed,
    ) -> Chat:
        """The chat that it asks for; ``items`` are those it continues, and its own.

        What these hold beside text is noted in ``attached``. What ``model`` cannot honour and does
        not change the answer is passed to ``ignore``. Raises `InvalidRequestError`.
        """
        if self.include:
            raise InvalidRequestError(
                f"include: {self.include[0]:.60} is not supported.", "include"
            )
        system = [Message("system", self.instructions)] if self.instructions else []
        messages = (*system, *_messages(items, attached))
        if not messages:
            raise InvalidRequestError("input must hold at least one item.", "input")
        form = self.text.format if self.text is not None else None
        choice = self.tool_choice
        return Chat(
            messages=messages,
            sampling=sampling_params(
                {"max_tokens": "max_output_tokens"},
                max_tokens=self.max_output_tokens,
                temperature=self.temperature,
                top_p=self.top_p,
                grammar=None if form is None else form.grammar(),
            ),
            tools=tuple(tool.tool() for tool in self.tools or ()),
            tool_choice=NamedTool(choice.name)
            if isinstance(choice, FunctionChoice)
            else choice or "auto",
            parallel_calls=self.parallel_tool_calls is not False,
            reasoning_effort=self._effort(model, ignore),
        )

    def _effort(self, model: ModelDescription, ignore: Callable[[str], None]) -> Effort | None:
        effort = self.reasoning.effort if self.reasoning is not None else None
        if effort is None:
            return None
        if not model.reasoning and effort != "none":
            ignore("reasoning.effort")
            return None
        return "xhigh" if effort == "max" or effort == "ultra" else effort


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


def referenced(body: ResponsesBody) -> list[str]:
    """The ids of the stored items that stand in the input, as often as they do."""
    if isinstance(body.input, str):
        return []
    return [item.id for item in body.input if isinstance(item, ItemReference)]


def _messages(items: list[Item], attached: Attached) -> Iterator[Message]:
    """Items as messages; calls and reasoning join the assistant message next to them."""
    for is_assistants, group in groupby(items, _is_assistants):
        if is_assistants:
            yield _assistant_message(group)
        else:
            yield from (_message(item, attached) for item in group)


def _is_assistants(item: Item) -> bool:
    return item.get("role") == "assistant" or item["type"] in ("reasoning", *CALLS)


def _message(item: Item, attached: Attached) -> Message:
    if item["type"] == "message":
        return Message(item["role"], _content(item["content"], attached))
    call_id = item.get("call_id") or item["id"]
    return Message("tool", _content(item["output"], attached), tool_call_id=call_id)


def _content(content: str | list[Item], attached: Attached) -> str | tuple[Part, ...]:
    return content if isinstance(content, str) else tuple(kept(p, attached) for p in content)


def _assistant_message(items: Iterator[Item]) -> Message:
    text, reasoning = "", ""
    calls: list[ToolCall] = []
    for item in items:
        match item["type"]:
            case "message":
                text += _text(item["content"])
            case "reasoning":
                reasoning = _text(item.get("content") or [])
            case _:
                calls.append(_call(item))
    return Message("assistant", text, tool_calls=tuple(calls), reasoning_content=reasoning or None)


def _call(item: Item) -> ToolCall:
    call_id = item.get("call_id") or item["id"]
    match item["type"]:
        case "custom_tool_call":
            return ToolCall(call_id, item["name"], json.dumps({"input": item["input"]}))
        case "local_shell_call":
            return ToolCall(call_id, "local_shell", json.dumps(item["action"]))
    return ToolCall(call_id, item["name"], item["arguments"] or "{}")


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
