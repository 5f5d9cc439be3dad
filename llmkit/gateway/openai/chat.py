"""OpenAI's chat: the request schema, its translation, and the answer's objects. Pure."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from llmkit.chat.parsers.events import Call, Content, Event, Reasoning
from llmkit.chat.reading import AnswerReader
from llmkit.chat.template import RESERVED
from llmkit.errors import InvalidRequestError
from llmkit.gateway.bodies import SessionId, Strict
from llmkit.gateway.chats import MAX_TOOLS, Chat, Effort, NamedTool, check_reasons
from llmkit.gateway.media.attached import Attached
from llmkit.gateway.openai.logprobs import chat_logprobs
from llmkit.gateway.openai.objects import Head, ending, usage_object
from llmkit.gateway.openai.parts import ChatPart
from llmkit.gateway.openai.schemas import MAX_TOP_LOGPROBS, GenerationFields
from llmkit.protocol import (
    Completion,
    Delta,
    FinishReason,
    Message,
    ModelDescription,
    TokenLogprob,
    Tool,
    ToolCall,
    Usage,
)

__all__ = ["ChatChunks", "ChatMessage", "ChatRequest", "ToolBody", "chat_object"]

MARK = "\0"  # in no name or text of ours


class CalledFunction(Strict):
    name: str
    arguments: str = "{}"


class CalledTool(Strict):
    id: str
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None

    def call(self) -> ToolCall:
        return ToolCall(self.id, self.function.name, self.function.arguments or "{}")


class ChatMessage(Strict):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[ChatPart] | None = None
    name: str | None = None
    refusal: str | None = None
    tool_calls: list[CalledTool] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None  # another name for reasoning_content
    annotations: list[Any] | None = None  # from an earlier answer
    audio: None = None
    function_call: None = None

    def message(self, attached: Attached) -> Message:
        content = self.content
        return Message(
            self.role,
            content
            if isinstance(content, str)
            else tuple(part.part(attached) for part in content or ()),
            self.name,
            tuple(call.call() for call in self.tool_calls or ()),
            self.tool_call_id,
            self.reasoning_content or self.reasoning,
        )


class FunctionBody(Strict):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolBody(Strict):
    type: Literal["function"] = "function"
    function: FunctionBody

    def tool(self) -> Tool:
        return Tool(
            self.function.name, self.function.description or "", self.function.parameters or {}
        )


class NamedFunction(Strict):
    name: str


class NamedChoice(Strict):
    type: Literal["function"]
    function: NamedFunction


class ChatRequest(GenerationFields):
    """POST /v1/chat/completions"""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    session_id: SessionId = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    modalities: list[Literal["text"]] | None = None
    tools: Annotated[list[ToolBody], Field(min_length=1, max_length=MAX_TOOLS)] | None = None
    tool_choice: Annotated[
        Literal["none", "auto", "required"] | NamedChoice | None,
        BeforeValidator(lambda c: "required" if c == "any" else c),
    ] = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Effort | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    continue_final_message: bool | None = None
    add_generation_prompt: bool | None = None

    def chat(self, model: ModelDescription, attached: Attached) -> Chat:
        """The chat that it asks for, but for what is ``attached``. Raises `InvalidRequestError`."""
        limit = (
            self.max_completion_tokens
            if self.max_completion_tokens is not None
            else self.max_tokens
        )
        if limit == 0:
            name = "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"
            raise InvalidRequestError(f"{name} must be at least 1.", name)
        if self.reasoning_effort not in (None, "none"):
            check_reasons(model, "reasoning_effort")
        choice = self.tool_choice
        return Chat(
            messages=tuple(m.message(attached) for m in self.messages),
            sampling=self.sampling(limit),
            tools=tuple(tool.tool() for tool in self.tools or ()),
            tool_choice=NamedTool(choice.function.name)
            if isinstance(choice, NamedChoice)
            else choice or "auto",
            parallel_calls=self.parallel_tool_calls is not False,
            reasoning_effort=self.reasoning_effort,
            template_options=self._template_options(),
            continue_final=self._continues(),
            n=self.n or 1,
            priority=self.priority or 0,
            cache_salt=self.cache_salt or "",
        )

    def _template_options(self) -> dict[str, Any]:
        options = self.chat_template_kwargs or {}
        reserved = sorted(options.keys() & RESERVED)
        if reserved:
            raise InvalidRequestError(
                f"chat_template_kwargs: {reserved[0]} is set by the server "
                "and cannot be overridden.",
                "chat_template_kwargs",
            )
        return options

    def _continues(self) -> bool:
        """Whether the last message is the beginning of the answer."""
        if self.continue_final_message:
            if self.add_generation_prompt:
                raise InvalidRequestError(
                    "continue_final_message cannot be combined with add_generation_prompt.",
                    "continue_final_message",
                )
            if self.messages[-1].role != "assistant" or self.messages[-1].tool_calls:
                raise InvalidRequestError(
                    "continue_final_message: the last message must be an assistant message "
                    "without tool calls.",
                    "continue_final_message",
                )
            return True
        if self.add_generation_prompt is False:
            raise InvalidRequestError(
                "add_generation_prompt: false is only for /tokenize; to continue the last message, "
                "set continue_final_message.",
                "add_generation_prompt",
            )
        return False

    def wanted_logprobs(self) -> dict[str, int | None]:
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequestError(
                "top_logprobs is only allowed when logprobs is true.", "top_logprobs"
            )
        return {"logprobs": (self.top_logprobs or 0) if self.logprobs else None}


class ChatChunks:
    """The chunks of a streamed chat as JSON, with one reader per choice; ``timings`` are added to
    the last one."""

    def __init__(
        self,
        readers: Sequence[AnswerReader],
        timings: Callable[[Completion], Head] | None = None,
    ) -> None:
        self._readers, self._timings = readers, timings
        self._num_calls = [0] * len(readers)
        self._frames: dict[int, tuple[str, str]] = {}  # by choice, what stands round mere text
        self.usages: dict[int, Usage] = {}

    def __call__(
        self, head: Head, index: int, deltas: Sequence[Delta], completion: Completion | None
    ) -> list[str]:
        reader = self._readers[index]
        events = reader.read(deltas)
        entries = [e for d in deltas for e in d.logprobs]
        if completion is None and not entries and len(events) == 1:
            (event,) = events
            if isinstance(event, Content):  # as nearly all are
                before, after = self._frames.get(index) or self._frame(head, index)
                return [f"{before}{json.dumps(event.text)}{after}"]
        if completion is not None:
            rest, completion = reader.end(completion)
            events += rest
            self.usages[index] = completion.usage
        parts = [part for event in events for part in self._parts(index, event)]
        if entries and not parts:
            parts = [{}]  # the log-probabilities of text that the parser still holds back
        chunks = [
            self._chunk(head, index, part, entries=entries if i == 0 else ())
            for i, part in enumerate(parts)
        ]
        if completion is not None:
            chunks.append(
                self._chunk(head, index, {}, finish_reason(completion, self._num_calls[index]))
            )
            if self._timings is not None:
                chunks[-1]["timings"] = self._timings(completion)
        return [json.dumps(chunk) for chunk in chunks]

    def first(self, head: Head, index: int) -> str:
        """The first chunk of a choice."""
        return json.dumps(self._chunk(head, index, {"role": "assistant", "content": ""}))

    def _frame(self, head: Head, index: int) -> tuple[str, str]:
        """A chunk of mere text, before and after the text: written once, it costs little more than
        the text."""
        chunk = json.dumps(self._chunk(head, index, {"content": MARK}))
        before, _, after = chunk.rpartition(json.dumps(MARK))
        self._frames[index] = before, after
        return before, after

    def _parts(self, index: int, event: Event) -> list[dict[str, Any]]:
        match event:
            case Content():
                return [{"content": event.text}]
            case Reasoning():
                return [{"reasoning_content": event.text}]
            case Call():
                position = self._num_calls[index]
                self._num_calls[index] += 1
                begin = {
                    "index": position,
                    "id": event.call_id,
                    "type": "function",
                    "function": {"name": event.name, "arguments": ""},
                }
                arguments = {"index": position, "function": {"arguments": event.arguments}}
                return [{"tool_calls": [begin]}, {"tool_calls": [arguments]}]

    @staticmethod
    def _chunk(
        head: Head,
        index: int,
        delta: dict[str, Any],
        finish: FinishReason | None = None,
        entries: Sequence[TokenLogprob] = (),
    ) -> Head:
        return {
            **head,
            "choices": [
                {
                    "index": index,
                    "delta": delta,
                    **ending(chat_logprobs(entries) if entries else None, finish),
                }
            ],
        }


def finish_reason(completion: Completion, num_calls: int) -> FinishReason:
    return (
        FinishReason.TOOL_CALLS
        if num_calls and completion.finish_reason is FinishReason.STOP
        else completion.finish_reason
    )


def chat_object(
    head: Head, answers: Sequence[tuple[list[Event], Completion]], logprobs: bool = False
) -> Head:
    """A whole chat completion, one choice per answer."""
    choices = []
    for i, (events, completion) in enumerate(answers):
        calls = [e for e in events if isinstance(e, Call)]
        content = "".join(e.text for e in events if isinstance(e, Content))
        reasoning = "".join(e.text for e in events if isinstance(e, Reasoning))
        message: dict[str, Any] = {
            "role": "assistant",
            "content": content if content or not calls else None,
            "refusal": None,
        }
        if reasoning:
            message["reasoning_content"] = reasoning
        if calls:
            message["tool_calls"] = [
                ToolCall(c.call_id, c.name, c.arguments).as_json() for c in calls
            ]
        end = ending(
            chat_logprobs(completion.logprobs) if logprobs else None,
            finish_reason(completion, len(calls)),
        )
        choices.append({"index": i, "message": message, **end})
    return {**head, "choices": choices, "usage": usage_object([c.usage for _, c in answers])}
