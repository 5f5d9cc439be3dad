"""How a session's answers are made: its settings, and the chat that they come to. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from llmkit.errors import InvalidRequestError
from llmkit.gateway.bodies import Strict, validated
from llmkit.gateway.chats import MAX_TOOLS, Chat, Effort, NamedTool, check_reasons, sampling_params
from llmkit.gateway.sampling_fields import SamplingFields
from llmkit.protocol import Grammar, Message, ModelDescription, Tool

__all__ = ["TurnSettings", "chat_of", "check_settings", "merged"]


class FunctionSetting(Strict):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolSetting(Strict):
    """A tool in OpenAI's form."""

    type: Literal["function"] = "function"
    function: FunctionSetting

    def tool(self) -> Tool:
        made = self.function
        return Tool(made.name, made.description or "", made.parameters or {})


class NamedSetting(Strict):
    name: str


class ChoiceSetting(Strict):
    type: Literal["function"] = "function"
    function: NamedSetting


class TurnSettings(SamplingFields):
    """How answers are sampled, and what tools there are; as in a chat of OpenAI's form."""

    max_tokens: Annotated[int, Field(ge=1)] | None = None
    penalty_last_n: int | None = None  # another name for repeat_last_n
    tools: Annotated[list[ToolSetting], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ChoiceSetting | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Effort | None = None
    json_schema: dict[str, Any] | None = None
    regex: str | None = None
    choice: list[str] | None = None

    def kept(self) -> dict[str, Any]:
        """What was given, to be stored. Raises `InvalidRequestError` for what is out of range."""
        self.sampling()
        return self.model_dump(exclude_none=True)

    def sampling(self) -> Any:
        values = self.sampled()
        if self.penalty_last_n is not None:
            values["penalty_last_n"] = self.penalty_last_n
        grammar = Grammar.of(json_schema=self.json_schema, regex=self.regex, choice=self.choice)
        return sampling_params({}, **values, max_tokens=self.max_tokens, grammar=grammar)


def merged(stored: Mapping[str, Any], given: TurnSettings | None) -> TurnSettings:
    """A turn's settings over its session's, of which other programs may have stored more."""
    own = {} if given is None else given.model_dump(exclude_none=True)
    known = {name: stored[name] for name in TurnSettings.model_fields if name in stored}
    return validated(TurnSettings, {**known, **own})


def check_settings(stored: Mapping[str, Any]) -> None:
    """Raises `InvalidRequestError` for settings that no turn could be answered with."""
    try:
        merged(stored, None).sampling()
    except InvalidRequestError as error:
        raise InvalidRequestError(f"settings.{error}", "settings") from None


def chat_of(settings: TurnSettings, messages: Sequence[Message], model: ModelDescription) -> Chat:
    """The chat that a turn asks for. Raises `InvalidRequestError`."""
    if settings.reasoning_effort not in (None, "none"):
        check_reasons(model, "reasoning_effort")
    choice = settings.tool_choice
    return Chat(
        messages=tuple(messages),
        sampling=settings.sampling(),
        tools=tuple(tool.tool() for tool in settings.tools or ()),
        tool_choice=NamedTool(choice.function.name)
        if isinstance(choice, ChoiceSetting)
        else choice or "auto",
        parallel_calls=settings.parallel_tool_calls is not False,
        reasoning_effort=settings.reasoning_effort,
    )
