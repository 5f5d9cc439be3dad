"""Ollama's requests: the schemas, and their translation to a chat. Pure."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from llmkit.errors import InvalidRequestError
from llmkit.gateway.bodies import SessionId, Strict
from llmkit.gateway.chats import Chat, Effort, check_reasons, sampling_params
from llmkit.gateway.media.attached import Attached
from llmkit.gateway.ollama.durations import read_keep_alive
from llmkit.gateway.tolerance import unnoticed
from llmkit.protocol import (
    Grammar,
    Media,
    Message,
    ModelDescription,
    SamplingParams,
    Tool,
    ToolCall,
)

__all__ = ["ChatBody", "EmbedBody", "GenerateBody", "GenerationBody", "OldEmbedBody", "ShowBody"]

SAME_NAME = (  # options that the engine calls the same
    "temperature", "top_k", "top_p", "min_p", "typical_p", "seed", "stop", "presence_penalty",
    "frequency_penalty", "mirostat", "mirostat_tau", "mirostat_eta",
)  # fmt: skip
PARAMETERS = {  # by option, the engine's parameter
    **{name: name for name in SAME_NAME},
    "repeat_penalty": "repetition_penalty",
    "repeat_last_n": "penalty_last_n",
    "num_predict": "max_tokens",
}
OPTIONS = {parameter: f"options.{option}" for option, parameter in PARAMETERS.items()}
# Ollama's own client sends each text of a request, also one that nobody has set.
NoneIfEmpty = Annotated[str | None, BeforeValidator(lambda text: None if text == "" else text)]
INTEGERS = ("top_k", "seed", "repeat_last_n", "num_ctx", "num_predict", "mirostat")


class OllamaFunction(Strict):
    name: str
    arguments: dict[str, Any] | str = Field(default_factory=dict)
    index: int | None = None


class OllamaCall(Strict):
    function: OllamaFunction
    id: str | None = None
    type: str | None = None

    def call(self, call_id: str) -> ToolCall:
        """As our call; ``call_id`` is its id if it has none."""
        arguments = self.function.arguments
        text = arguments if isinstance(arguments, str) else json.dumps(arguments)
        return ToolCall(self.id or call_id, self.function.name, text or "{}")


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
    images: list[str] | None = None

    def message(self, index: int, attached: Attached) -> Message:
        """As our message; ``index`` is its position in the chat."""
        calls = tuple(c.call(f"call_{index}_{i}") for i, c in enumerate(self.tool_calls or ()))
        return Message(
            self.role,
            (*_images(self.images, attached), self.content or ""),
            self.tool_name,
            calls,
            self.tool_call_id,
            self.thinking,
        )


def _images(images: list[str] | None, attached: Attached) -> list[Media]:
    """Pictures stand before the text, as Ollama has them."""
    return [attached.image(data, is_url=False) for data in images or ()]


class OllamaToolFunction(Strict):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class OllamaTool(Strict):
    """A tool in OpenAI's shape, as Ollama itself defines it."""

    type: Literal["function"] = "function"
    function: OllamaToolFunction

    def tool(self) -> Tool:
        made = self.function
        return Tool(made.name, made.description or "", made.parameters or {})


class GenerationBody(Strict):
    """The fields of both endpoints, chat and generate."""

    model: str
    stream: bool = True
    format: Literal["", "json"] | dict[str, Any] | None = None
    options: dict[str, Any] = Field(default_factory=dict)
    keep_alive: str | int | float | None = None
    think: bool | Literal["low", "medium", "high", "max"] | None = None

    @property
    def ends_model(self) -> bool:
        """Whether the model is to be unloaded once this is answered."""
        return self.keep_alive is not None and read_keep_alive(self.keep_alive) == 0

    def _chat(
        self,
        messages: list[Message],
        model: ModelDescription,
        ignore: Callable[[str], None],
        **more: Any,
    ) -> Chat:
        """A chat of these messages. Raises `InvalidRequestError`.

        What ``model`` cannot honour and does not change the answer is passed to ``ignore``.
        """
        return Chat(
            messages=tuple(messages),
            sampling=self._sampling(model, ignore),
            reasoning_effort=self._effort(model),
            **more,
        )

    def _sampling(self, model: ModelDescription, ignore: Callable[[str], None]) -> SamplingParams:
        values: dict[str, Any] = {"grammar": self._grammar()}
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
                continue
            if name not in PARAMETERS:
                near = difflib.get_close_matches(name[:60], (*PARAMETERS, "num_ctx"), n=1)
                hint = f" Did you mean {near[0]}?" if near else ""
                raise InvalidRequestError(
                    f"options.{name:.60} is not supported for a loaded model.{hint}", "options"
                )
            if name == "num_predict" and (not is_int or value == 0):
                raise InvalidRequestError(
                    "options.num_predict must be a number of tokens, or negative for no limit.",
                    "options",
                )
            if name == "repeat_last_n" and is_int and value < 0:
                value = model.n_ctx
            values[PARAMETERS[name]] = value
        return sampling_params(OPTIONS, **values)

    def _grammar(self) -> Grammar | None:
        if self.format is None or self.format == "":
            return None
        schema = {"type": "object"} if self.format == "json" else self.format
        return Grammar("json_schema", json.dumps(schema), origin="format")

    def _effort(self, model: ModelDescription) -> Effort | None:
        if not self.think:
            return None if self.think is None or not model.reasoning else "none"
        check_reasons(model, "think")
        if self.think is True:
            return "medium"
        return "xhigh" if self.think == "max" else self.think


class ChatBody(GenerationBody):
    """POST /api/chat"""

    messages: list[OllamaMessage] = Field(default_factory=list)
    session_id: SessionId = None
    tools: list[OllamaTool] | None = None

    @property
    def uses_model(self) -> bool:
        """Whether the model must be loaded: not to be unloaded only."""
        return bool(self.messages) or not self.ends_model

    def chat(
        self,
        model: ModelDescription,
        attached: Attached,
        ignore: Callable[[str], None] = unnoticed,
    ) -> Chat:
        """The chat that it asks for, as in `_chat`; pictures are noted in ``attached``."""
        last = self.messages[-1]
        return self._chat(
            [m.message(i, attached) for i, m in enumerate(self.messages)],
            model,
            ignore,
            tools=tuple(tool.tool() for tool in self.tools or ()),
            continue_final=last.role == "assistant" and not last.tool_calls,  # a prefill
        )


class GenerateBody(GenerationBody):
    """POST /api/generate"""

    prompt: str = ""
    suffix: NoneIfEmpty = None
    system: NoneIfEmpty = None
    raw: bool = False
    images: list[str] | None = None

    @property
    def is_asked(self) -> bool:
        """Whether there is anything to answer."""
        return bool(self.prompt or self.images) or self.suffix is not None

    @property
    def uses_model(self) -> bool:
        """Whether the model must be loaded: not to be unloaded only."""
        return self.is_asked or not self.ends_model

    def chat(
        self,
        model: ModelDescription,
        attached: Attached,
        ignore: Callable[[str], None] = unnoticed,
    ) -> Chat:
        """The chat that it asks for, as in `_chat`; pictures are noted in ``attached``."""
        system = [Message("system", self.system)] if self.system else []
        asked = Message("user", (*_images(self.images, attached), self.prompt))
        return self._chat([*system, asked], model, ignore)


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
