"""A chat in our own words: each dialect translates its bodies to it, and reads its answer's events.

Pure; knows no dialect. What a dialect calls otherwise than we do, its errors call so too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from llmkit.chat.reading import AnswerReader
from llmkit.chat.tools import call_grammar
from llmkit.errors import InvalidRequestError
from llmkit.protocol import (
    GenerationRequest,
    Grammar,
    Message,
    ModelDescription,
    SamplingParams,
    Tool,
)

__all__ = [
    "MAX_TOOLS",
    "Chat",
    "Effort",
    "NamedTool",
    "ToolChoice",
    "check_reasons",
    "sampling_params",
]

MAX_TOOLS = 1024
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh"]


@dataclass(frozen=True, slots=True)
class NamedTool:
    """A choice of tools: this one must be called."""

    name: str


ToolChoice = Literal["auto", "none", "required"] | NamedTool


@dataclass(frozen=True, slots=True, kw_only=True)
class Chat:
    """What is asked of a model: a conversation to answer, and how.

    >>> chat = Chat(
    ...     messages=(Message("user", "hi"),), sampling=SamplingParams(), reasoning_effort="none"
    ... )
    >>> chat.request("r1", ModelDescription("m", "m.gguf")).template_options
    {'reasoning_effort': 'none', 'enable_thinking': False}

    ``tools`` may be called as ``tool_choice`` says, several at once with ``parallel_calls``.
    ``template_options`` go to the chat template; ``reasoning_effort`` too, unless they set it.
    ``continue_final``: the last message, an assistant's, is the beginning of the answer. ``n``
    answers are wanted. ``priority``, ``cache_salt`` and ``media`` are those of `GenerationRequest`;
    there may be more files than the messages hold.

    Raises `InvalidRequestError` for tools that do not fit together, or not with the rest.
    """

    messages: tuple[Message, ...]
    sampling: SamplingParams
    tools: tuple[Tool, ...] = ()
    tool_choice: ToolChoice = "auto"
    parallel_calls: bool = True
    reasoning_effort: Effort | None = None
    template_options: dict[str, Any] = field(default_factory=dict)
    continue_final: bool = False
    n: int = 1
    priority: int = 0
    cache_salt: str = ""
    media: dict[str, bytes] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if len(self.tools) > MAX_TOOLS:
            raise InvalidRequestError(
                f"tools: at most {MAX_TOOLS} are supported, not {len(self.tools)}.", "tools"
            )
        for name, count in Counter(tool.name for tool in self.tools).items():
            if count > 1:
                raise InvalidRequestError(f"tools: the name {name!r} is used twice.", "tools")
        if self._is_forced and not self.tools:
            raise InvalidRequestError(
                "tool_choice: there are no tools to choose from.", "tool_choice"
            )
        grammar = self.sampling.grammar
        if self._offered and grammar is not None:
            raise InvalidRequestError(
                f"tools cannot be combined with {grammar.origin}; leave one of them out, "
                "or set tool_choice to none.",
                "tools",
            )
        if self._is_forced and self.sampling.ignore_eos:
            raise InvalidRequestError(
                "ignore_eos cannot be combined with a tool_choice that forces a call: "
                "the call determines where the text ends.",
                "ignore_eos",
            )

    @property
    def _is_forced(self) -> bool:
        """Whether the answer must be a call."""
        return self.tool_choice == "required" or isinstance(self.tool_choice, NamedTool)

    @property
    def _offered(self) -> tuple[Tool, ...]:
        """The tools that may be called."""
        return () if self.tool_choice == "none" else self.tools

    def request(self, request_id: str, model: ModelDescription) -> GenerationRequest:
        """The engine request for all ``n`` answers.

        Raises `InvalidRequestError`, if only for a tool that cannot be forced.
        """
        grammar = self._call_grammar(model)
        return GenerationRequest(
            request_id,
            self.sampling if grammar is None else replace(self.sampling, grammar=grammar),
            messages=self.messages,
            tools=self._offered,
            template_options=self._options,
            continue_final=self.continue_final,
            priority=self.priority,
            cache_salt=self.cache_salt,
            n=self.n,
            show_marks=True,
            media=self.files_of(self.messages),
        )

    def files_of(self, messages: Sequence[Message]) -> dict[str, bytes]:
        """The files of some messages, by digest."""
        digests = [item.digest for message in messages for item in message.media]
        return {digest: self.media[digest] for digest in digests if digest in self.media}

    def _call_grammar(self, model: ModelDescription) -> Grammar | None:
        """What holds the model to calls that fit their tools."""
        choice = self.tool_choice
        if not self._offered or self.sampling.ignore_eos:
            return None
        if choice == "auto" and model.reasoning:
            return None  # a tool call inside reasoning must not count
        if isinstance(choice, NamedTool):
            return call_grammar(model.tool_form, self.tools, choice.name, parallel=False)
        return call_grammar(model.tool_form, self.tools, choice, parallel=self.parallel_calls)

    @property
    def _options(self) -> dict[str, Any]:
        """The template's variables."""
        effort = self.reasoning_effort
        asked = (
            {}
            if effort is None
            else {"reasoning_effort": effort, "enable_thinking": effort != "none"}
        )
        return {**asked, **self.template_options}

    def reader(self, model: ModelDescription) -> AnswerReader:
        """A reader for one answer."""
        options, last = self._options, self.messages[-1]
        thinks = options.get("enable_thinking", options.get("thinking"))
        return AnswerReader(
            model,
            self._offered,
            thinks=None if thinks is None else bool(thinks),
            forced=self._is_forced,  # a grammar leaves no room for reasoning
            held=self.sampling.grammar is not None,
            continued=last.text if self.continue_final else None,
            after_results=last.role == "tool",
        )

    async def finished(self) -> None:
        """Its answer has been read, and is about to be sent: for those that keep it."""


def sampling_params(names: Mapping[str, str], **values: Any) -> SamplingParams:
    """Parameters from a caller's values, of which None counts as absent.

    Without ``max_tokens`` there is no limit. ``names`` holds what the caller calls our parameters
    where that differs; errors call them so.

    >>> sampling_params({"stop": "stop_sequences"}, stop=[""])
    Traceback (most recent call last):
    ...
    llmkit.errors.InvalidRequestError: stop_sequences must hold strings of 1 to 1000 characters.
    """
    given = {name: value for name, value in values.items() if value is not None}
    try:
        return SamplingParams(**{"max_tokens": None, **given})
    except InvalidRequestError as error:
        own = error.param or ""
        if own not in names:
            raise
        name = names[own]
        raise InvalidRequestError(
            str(error).replace(own, name, 1), name.partition(".")[0]
        ) from None


def check_reasons(model: ModelDescription, param: str) -> None:
    """Raises `InvalidRequestError` naming ``param`` if the model does not reason."""
    if not model.reasoning:
        raise InvalidRequestError(f"{param}: {model.name!r} is not a reasoning model.", param)
