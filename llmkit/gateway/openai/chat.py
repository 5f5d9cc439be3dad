"""OpenAI's chat: the request schema, its translation for the engine, and the answer's objects.

Pure. The other dialects translate to this one; it knows none of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from llmkit.chat.parsers.events import Call, Content, Event, Reasoning
from llmkit.chat.reading import AnswerReader
from llmkit.chat.template import RESERVED
from llmkit.chat.tools import call_grammar
from llmkit.errors import InvalidRequestError
from llmkit.gateway.bodies import Strict
from llmkit.gateway.openai.logprobs import chat_logprobs
from llmkit.gateway.openai.objects import Head, ending, usage_object
from llmkit.gateway.openai.schemas import MAX_TOP_LOGPROBS, GenerationFields
from llmkit.protocol import (
    Completion,
    Delta,
    FinishReason,
    GenerationRequest,
    Message,
    ModelDescription,
    TokenLogprob,
    Tool,
    Usage,
)

__all__ = ["ChatChunks", "ChatMessage", "ChatRequest", "RefusalPart", "ToolBody", "chat_object"]

MAX_TOOLS = 1024


class TextPart(Strict):
    type: Literal["text"]
    text: str


class RefusalPart(Strict):
    type: Literal["refusal"]
    refusal: str

    @property
    def text(self) -> str:
        return self.refusal


class CalledFunction(Strict):
    name: str
    arguments: str = "{}"


class CalledTool(Strict):
    id: str
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None


class ChatMessage(Strict):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Annotated[TextPart | RefusalPart, Field(discriminator="type")]] | None = (
        None
    )
    name: str | None = None
    refusal: str | None = None
    tool_calls: list[CalledTool] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None  # another name for reasoning_content
    annotations: list[Any] | None = None  # from an earlier answer
    audio: None = None
    function_call: None = None

    def message(self) -> Message:
        content = (
            self.content
            if isinstance(self.content, str)
            else "".join(part.text for part in self.content or [])
        )
        calls: Any = tuple(call.model_dump() for call in self.tool_calls or ())
        return Message(
            self.role,
            content,
            self.name,
            calls,
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
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    continue_final_message: bool | None = None
    add_generation_prompt: bool | None = None

    def requests(self, reply_id: str, model: ModelDescription) -> list[GenerationRequest]:
        """A list with the one engine request for all choices."""
        limit = (
            self.max_completion_tokens
            if self.max_completion_tokens is not None
            else self.max_tokens
        )
        if limit == 0:
            name = "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"
            raise InvalidRequestError(f"{name} must be at least 1.", name)
        messages = tuple(m.message() for m in self.messages)
        options: dict[str, Any] = {
            "messages": messages,
            "tools": self.wanted_tools,
            "template_options": self._template_options(model),
            "show_marks": True,
        }
        if self.continue_final_message:
            if self.add_generation_prompt:
                raise InvalidRequestError(
                    "continue_final_message cannot be combined with add_generation_prompt.",
                    "continue_final_message",
                )
            if messages[-1].role != "assistant" or messages[-1].tool_calls:
                raise InvalidRequestError(
                    "continue_final_message: the last message must be an assistant message "
                    "without tool calls.",
                    "continue_final_message",
                )
            options["continue_final"] = True
        elif self.add_generation_prompt is False:
            raise InvalidRequestError(
                "add_generation_prompt: false is only for /tokenize; to continue the last message, "
                "set continue_final_message.",
                "add_generation_prompt",
            )
        request = self._request(reply_id, self.n or 1, limit, **options)
        grammar = self._call_grammar(model)
        return [
            request
            if grammar is None
            else replace(request, sampling=replace(request.sampling, grammar=grammar))
        ]

    @property
    def wanted_tools(self) -> tuple[Tool, ...]:
        """The tools that may be called.

        Raises `InvalidRequestError` for a duplicate name, and for a choice without tools.
        """
        tools = tuple(tool.tool() for tool in self.tools or ())
        names = [tool.name for tool in tools]
        for name in names:
            if names.count(name) > 1:
                raise InvalidRequestError(f"tools: the name {name!r} is used twice.", "tools")
        if not tools and self.tool_choice not in (None, "none", "auto"):
            raise InvalidRequestError(
                "tool_choice: there are no tools to choose from.", "tool_choice"
            )
        return () if self.tool_choice == "none" else tools

    def _call_grammar(self, model: ModelDescription) -> Any:
        tools = self.wanted_tools
        if not tools:
            return None
        if self._grammar() is not None:
            raise InvalidRequestError(
                "tools cannot be combined with a response_format or grammar; "
                "leave one of them out, or set tool_choice to none.",
                "tools",
            )
        if self.ignore_eos:
            if self.tool_choice not in (None, "auto"):
                raise InvalidRequestError(
                    "ignore_eos cannot be combined with a tool_choice that forces a call: "
                    "the call determines where the text ends.",
                    "ignore_eos",
                )
            return None
        choice = (
            self.tool_choice.function.name
            if isinstance(self.tool_choice, NamedChoice)
            else self.tool_choice or "auto"
        )
        if choice == "auto" and model.reasoning:
            return None  # a tool call inside reasoning must not count
        return call_grammar(
            model.tool_form,
            tools,
            choice,
            parallel=self.parallel_tool_calls is not False
            and not isinstance(self.tool_choice, NamedChoice),
        )

    def _template_options(self, model: ModelDescription) -> dict[str, Any]:
        options = dict(self.chat_template_kwargs or {})
        reserved = sorted(options.keys() & RESERVED)
        if reserved:
            raise InvalidRequestError(
                f"chat_template_kwargs: {reserved[0]} is set by the server "
                "and cannot be overridden.",
                "chat_template_kwargs",
            )
        if self.reasoning_effort is not None:
            if not model.reasoning and self.reasoning_effort != "none":
                raise InvalidRequestError(
                    f"reasoning_effort: {model.name!r} is not a reasoning model.",
                    "reasoning_effort",
                )
            options.setdefault("reasoning_effort", self.reasoning_effort)
            options.setdefault("enable_thinking", self.reasoning_effort != "none")
        return options

    def reader(self, model: ModelDescription) -> AnswerReader:
        """A reader for one answer."""
        options = self._template_options(model)
        thinks = options.get("enable_thinking", options.get("thinking"))
        # A grammar leaves no room for reasoning.
        forced = self.tool_choice == "required" or isinstance(self.tool_choice, NamedChoice)
        continued = self.messages[-1].message().text if self.continue_final_message else None
        return AnswerReader(
            model,
            self.wanted_tools,
            thinks=None if thinks is None else bool(thinks),
            forced=forced,
            held=self._grammar() is not None,
            continued=continued,
            after_results=self.messages[-1].role == "tool",
        )

    def wanted_logprobs(self) -> dict[str, int | None]:
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequestError(
                "top_logprobs is only allowed when logprobs is true.", "top_logprobs"
            )
        return {"logprobs": (self.top_logprobs or 0) if self.logprobs else None}


class ChatChunks:
    """The chunks of a streamed chat, with one reader per choice."""

    def __init__(self, readers: Sequence[AnswerReader]) -> None:
        self._readers = readers
        self._num_calls = [0] * len(readers)
        self.usages: dict[int, Usage] = {}

    def __call__(
        self, head: Head, index: int, deltas: Sequence[Delta], completion: Completion | None
    ) -> list[Head]:
        reader = self._readers[index]
        events = reader.read(deltas)
        entries = [e for d in deltas for e in d.logprobs]
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
        return chunks

    def first(self, head: Head, index: int) -> Head:
        """The first chunk of a choice."""
        return self._chunk(head, index, {"role": "assistant", "content": ""})

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
                {
                    "id": c.call_id,
                    "type": "function",
                    "function": {"name": c.name, "arguments": c.arguments},
                }
                for c in calls
            ]
        end = ending(
            chat_logprobs(completion.logprobs) if logprobs else None,
            finish_reason(completion, len(calls)),
        )
        choices.append({"index": i, "message": message, **end})
    return {**head, "choices": choices, "usage": usage_object([c.usage for _, c in answers])}
