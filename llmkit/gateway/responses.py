"""OpenAI's responses: what is asked and what comes back, as pydantic schemas and plain dicts. Pure; the routes are in `responses_routes`."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import Field

from llmkit.chat.parsers.events import Call, Content, Event, Reasoning
from llmkit.errors import InvalidRequestError
from llmkit.gateway.chat import ChatRequest
from llmkit.gateway.items import InputItem, ItemReference
from llmkit.gateway.objects import new_id
from llmkit.gateway.schemas import Metadata, Strict, validated
from llmkit.gateway.tolerance import unnoticed
from llmkit.types import Completion, ModelDescription

__all__ = ["EventStream", "ResponsesBody", "finished", "input_items", "opened", "output_items"]

Item = dict[str, Any]
Event_ = dict[str, Any]
UNKNOWN = ModelDescription("", "")


def _nowhere(item_id: str) -> Item:
    raise InvalidRequestError(f"input: there is no item {item_id!r:.100}; it was not stored.", "input")


class FunctionTool(Strict):
    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class NamedChoice(Strict):
    type: Literal["function"]
    name: str


class Format(Strict):
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class TextOptions(Strict):
    format: Format | None = None
    verbosity: Literal["medium"] | None = None


class ReasoningOptions(Strict):
    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max", "ultra"] | None = None


class StreamOptions(Strict):
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
    stream_options: StreamOptions | None = None
    store: bool | None = None
    previous_response_id: str | None = None
    tools: list[FunctionTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedChoice | None = None
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
        self, before: list[Item], own: list[Item] | None = None, model: ModelDescription = UNKNOWN, ignore: Callable[[str], None] = unnoticed
    ) -> ChatRequest:
        """The same as a chat; ``before`` are the items of the responses that this one continues, ``own`` its own. What ``model`` cannot honour, and what
        changes no answer, is given to ``ignore``."""
        items = [*before, *(input_items(self) if own is None else own)]
        if self.include:
            raise InvalidRequestError(f"include: {self.include[0]:.60} is not known here.", "include")
        system = [{"role": "system", "content": self.instructions}] if self.instructions else []
        asked: dict[str, Any] = {"model": self.model, "messages": [*system, *_messages(items)]}
        given = {"max_completion_tokens": self.max_output_tokens, "temperature": self.temperature, "top_p": self.top_p}
        asked.update((k, v) for k, v in given.items() if v is not None)
        if self.tools:
            asked["tools"] = [
                {"type": "function", "function": {"name": t.name, "description": t.description or "", "parameters": t.parameters or {}}} for t in self.tools
            ]
        if self.tool_choice is not None:
            choice = self.tool_choice
            asked["tool_choice"] = {"type": "function", "function": {"name": choice.name}} if isinstance(choice, NamedChoice) else choice
        if self.parallel_tool_calls is not None:
            asked["parallel_tool_calls"] = self.parallel_tool_calls
        form = self.text.format if self.text is not None else None
        if form is not None and form.type == "json_object":
            asked["response_format"] = {"type": "json_object"}
        if form is not None and form.type == "json_schema":
            asked["response_format"] = {"type": "json_schema", "json_schema": {"name": form.name or "answer", "schema": form.schema_ or {"type": "object"}}}
        effort = self.reasoning.effort if self.reasoning is not None else None
        if effort is not None and (model.reasoning or effort == "none"):
            asked["reasoning_effort"] = "xhigh" if effort in ("max", "ultra") else effort
        elif effort is not None:
            ignore("reasoning.effort")
        return validated(ChatRequest, asked)


def input_items(body: ResponsesBody, find: Callable[[str], Item] = _nowhere) -> list[Item]:
    """The input as items with ids; ``find`` gives an item of a stored response by its id."""
    if isinstance(body.input, str):
        return [{"id": _id("msg"), "type": "message", "role": "user", "status": "completed", "content": [{"type": "input_text", "text": body.input}]}]
    found = []
    for item in body.input:
        if isinstance(item, ItemReference):
            found.append(find(item.id))
            continue
        data = item.model_dump(exclude_none=True)
        data.setdefault("id", _id({"message": "msg", "reasoning": "rs"}.get(item.type, "fc")))
        if item.type == "message" and isinstance(item.content, str):
            data["content"] = [{"type": "output_text" if item.role == "assistant" else "input_text", "text": item.content}]
        found.append(data)
    return found


def _messages(items: list[Item]) -> list[dict[str, Any]]:
    """Items as chat messages: calls and reasoning belong to the assistant's message beside them."""
    found: list[dict[str, Any]] = []

    def assistant() -> dict[str, Any]:
        if not found or found[-1]["role"] != "assistant":
            found.append({"role": "assistant", "content": ""})
        return found[-1]

    for item in items:
        match item["type"]:
            case "message" if item["role"] == "assistant":
                assistant()["content"] += _text(item["content"])
            case "message":
                found.append({"role": item["role"], "content": _text(item["content"])})
            case "function_call":
                call = {"id": item["call_id"], "type": "function", "function": {"name": item["name"], "arguments": item["arguments"]}}
                assistant().setdefault("tool_calls", []).append(call)
            case "custom_tool_call":
                arguments = json.dumps({"input": item["input"]})
                call = {"id": item["call_id"], "type": "function", "function": {"name": item["name"], "arguments": arguments}}
                assistant().setdefault("tool_calls", []).append(call)
            case "local_shell_call":
                made = {"name": "local_shell", "arguments": json.dumps(item["action"])}
                assistant().setdefault("tool_calls", []).append({"id": item.get("call_id") or item["id"], "type": "function", "function": made})
            case "function_call_output" | "custom_tool_call_output" | "local_shell_call_output":
                found.append({"role": "tool", "tool_call_id": item.get("call_id") or item["id"], "content": _text(item["output"])})
            case "reasoning":
                assistant()["reasoning_content"] = _text(item.get("content") or [])
    return found


def _text(content: str | list[Item]) -> str:
    return content if isinstance(content, str) else "".join(part.get("text") or part.get("refusal") or "" for part in content)


def opened(body: ResponsesBody, response_id: str, model: str) -> dict[str, Any]:
    """The response object, before anything came."""
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
        "text": {"format": {"type": "text"} if form is None else form.model_dump(by_alias=True, exclude_none=True)},
        "tool_choice": "auto" if choice is None else choice.model_dump() if isinstance(choice, NamedChoice) else choice,
        "tools": [{**t.model_dump(), "strict": t.strict is not False, "parameters": t.parameters or {}} for t in body.tools or []],
        "top_p": body.top_p,
        "truncation": "disabled",
        "usage": None,
        "user": body.user,
    }


def finished(response: dict[str, Any], output: list[Item], completion: Completion) -> dict[str, Any]:
    """The response object at its end."""
    cut = completion.is_cut
    usage = completion.usage
    return {
        **response,
        "status": "incomplete" if cut else "completed",
        "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
        "output": output,
        "usage": {
            "input_tokens": usage.prompt_tokens,
            "input_tokens_details": {"cached_tokens": usage.cached_tokens},
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        },
    }


def output_items(events: list[Event], completion: Completion) -> list[Item]:
    """All events of an answer as items; the last one is incomplete where the text was cut."""
    stream = EventStream()
    stream.take(events)
    stream.close("incomplete" if completion.is_cut else "completed")
    return stream.items


def _id(prefix: str) -> str:
    return new_id(prefix).replace("-", "_")


class EventStream:
    """Events of an answer as events of the stream: neighbours of a kind are one item. ``items`` are the finished ones."""

    def __init__(self) -> None:
        self.items: list[Item] = []
        self._open: Item | None = None
        self._text = ""

    def take(self, events: list[Event]) -> list[Event_]:
        found: list[Event_] = []
        for event in events:
            match event:
                case Content():
                    found += self._begin("message", {"id": _id("msg"), "type": "message", "status": "in_progress", "role": "assistant", "content": []})
                    self._text += event.text
                    found.append(self._about("response.output_text.delta", content_index=0, delta=event.text, logprobs=[]))
                case Reasoning():
                    found += self._begin("reasoning", {"id": _id("rs"), "type": "reasoning", "status": "in_progress", "summary": [], "content": []})
                    self._text += event.text
                    found.append(self._about("response.reasoning_text.delta", content_index=0, delta=event.text))
                case Call():
                    found += self._call(event)
        return found

    def _call(self, call: Call) -> list[Event_]:
        item = {"id": _id("fc"), "type": "function_call", "status": "in_progress", "call_id": call.call_id, "name": call.name, "arguments": ""}
        found = self._begin("function_call", item)
        found.append(self._about("response.function_call_arguments.delta", delta=call.arguments))
        found.append(self._about("response.function_call_arguments.done", arguments=call.arguments, name=call.name))
        self._text = call.arguments
        return [*found, *self.close()]

    def _part(self, text: str) -> Item:
        assert self._open is not None
        if self._open["type"] == "message":
            return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
        return {"type": "reasoning_text", "text": text}

    def _begin(self, kind: str, item: Item) -> list[Event_]:
        if self._open is not None and self._open["type"] == kind:
            return []
        found = self.close()
        self._open, self._text = item, ""
        found.append({"type": "response.output_item.added", "output_index": len(self.items), "item": json.loads(json.dumps(item))})
        if kind != "function_call":
            found.append(self._about("response.content_part.added", content_index=0, part=self._part("")))
        return found

    def _about(self, kind: str, **more: Any) -> Event_:
        assert self._open is not None
        return {"type": kind, "item_id": self._open["id"], "output_index": len(self.items), **more}

    def close(self, status: str = "completed") -> list[Event_]:
        """Finish the item that is open."""
        item = self._open
        if item is None:
            return []
        found: list[Event_] = []
        if item["type"] == "function_call":
            item["arguments"] = self._text
        else:
            part = self._part(self._text)
            done = "response.output_text.done" if item["type"] == "message" else "response.reasoning_text.done"
            found.append(self._about(done, content_index=0, text=self._text, **({"logprobs": []} if item["type"] == "message" else {})))
            found.append(self._about("response.content_part.done", content_index=0, part=part))
            item["content"] = [part]
        item["status"] = status
        found.append({"type": "response.output_item.done", "output_index": len(self.items), "item": item})
        self.items.append(item)
        self._open = None
        return found
