"""Routes without a prefix: /completions, /chat/completions, /models. Tornado loop only.

They speak OpenAI's language and, by the fields of a request, that of a service whose clients send
``model-name`` and ``prompt`` and read the bare text of events.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from typing import Annotated, Any, ClassVar

from pydantic import AliasChoices, Field

from llmkit.chat.parsers.events import Content
from llmkit.errors import InvalidRequestError
from llmkit.gateway.answers import Answer
from llmkit.gateway.bodies import SessionId, Strict
from llmkit.gateway.chats import Chat, sampling_params
from llmkit.gateway.compat.llms import finish_reason
from llmkit.gateway.compat.streaming import stream_text
from llmkit.gateway.conversations.recall import recalled
from llmkit.gateway.directory import EngineDirectory
from llmkit.gateway.exchange import Exchange
from llmkit.gateway.ids import new_id
from llmkit.gateway.openai.routes import OpenAIRoutes
from llmkit.gateway.openai.schemas import CompletionRequest
from llmkit.protocol import Message, ModelDescription
from llmkit.protocol.client import EngineClient

__all__ = ["PlainCompletionRequest", "PromptedChatBody", "UnprefixedRoutes", "as_event"]

DEVICES = {"cpu": "cpu", **dict.fromkeys(("cuda", "gpu", "metal", "vulkan", "rocm"), "gpu")}
NAMES = {  # what a prompted chat calls our parameters
    "max_tokens": "max-token",
    "top_p": "top-p",
    "top_k": "top-k",
    "repetition_penalty": "repeat-penalty",
}
# Of them /completion alone knows these: a body that has one is llama-server's.
LLAMA_SERVER_FIELDS = frozenset({"n_predict", "n_probs", "response_fields", "return_tokens"})
NEWLINE = re.compile(r"\r\n|\r|\n")
Run = Callable[[Exchange], Awaitable[None]]


def _dashed(name: str) -> Any:
    """A field whose name has dashes, as its clients write it."""
    return AliasChoices(name.replace("_", "-"), name)


class PlainCompletionRequest(CompletionRequest):
    """POST /completions"""

    default_max_tokens: ClassVar[int] = 128


class PromptedChatBody(Strict):
    """POST /chat/completions with a prompt"""

    model: str = Field("default", validation_alias=AliasChoices("model-name", "model"))
    prompt: Annotated[str, Field(min_length=1)]
    system_prompt: str | None = Field(None, validation_alias=_dashed("system_prompt"))
    session_id: SessionId = None
    max_tokens: Annotated[int, Field(ge=1)] = Field(
        512, validation_alias=AliasChoices("max-token", "max-tokens", "max_token", "max_tokens")
    )
    temperature: float | None = None
    top_p: float | None = Field(None, validation_alias=_dashed("top_p"))
    top_k: int | None = Field(None, validation_alias=_dashed("top_k"))
    repeat_penalty: float | None = Field(None, validation_alias=_dashed("repeat_penalty"))
    seed: int | None = None
    stop: str | list[str] | None = None
    device: str | None = None
    stream: bool = True

    def chat(self, model: ModelDescription) -> Chat:
        """The chat that it asks for. Raises `InvalidRequestError`."""
        check_device(model, self.device)
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        sampling = sampling_params(
            NAMES,
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            repetition_penalty=self.repeat_penalty,
            seed=self.seed,
            stop=stop,
        )
        system = [Message("system", self.system_prompt)] if self.system_prompt else []
        return Chat(messages=(*system, Message("user", self.prompt)), sampling=sampling)


def check_device(model: ModelDescription, device: str | None) -> None:
    """Raises `InvalidRequestError` if the model computes elsewhere: it cannot move."""
    name = (device or "auto").strip().lower().partition(":")[0]
    if name == "auto":
        return
    if name not in DEVICES:
        raise InvalidRequestError(
            f"device: {device!r:.40} is not one of auto, {', '.join(DEVICES)}.", "device"
        )
    if DEVICES[name] != model.device:
        where = "the CPU" if model.device == "cpu" else "a GPU"
        raise InvalidRequestError(
            f"device: {model.name!r} was loaded on {where}, and a request cannot move it; leave "
            "device out.",
            "device",
        )


class UnprefixedRoutes:
    """Routes over the engines of a directory.

    ``openai`` are the routes that have a prefix, ``chat`` and ``completion`` what runs for a body
    of OpenAI's chat and of llama-server's completions.
    """

    def __init__(
        self,
        directory: EngineDirectory,
        on_use: Callable[[EngineClient], None],
        openai: OpenAIRoutes,
        chat: Run,
        completion: Run,
    ) -> None:
        self._directory, self._on_use = directory, on_use
        self._openai, self._chat, self._completion = openai, chat, completion

    async def completions(self, exchange: Exchange) -> None:
        if not LLAMA_SERVER_FIELDS.isdisjoint(await exchange.fields()):
            exchange.dialect = "llama-server"
            await self._completion(exchange)
        else:
            await self._openai.completions(exchange, PlainCompletionRequest, with_text)

    async def chat_completions(self, exchange: Exchange) -> None:
        fields = await exchange.fields()
        if "prompt" in fields and "messages" not in fields:
            await self._prompted(exchange)
            return
        if "model-name" in fields:
            fields["model"] = fields.pop("model-name")
            fields.setdefault("stream", True)
        for name, its in (("max-token", "max_tokens"), ("repeat-penalty", "repeat_penalty"),
                          ("top-p", "top_p"), ("top-k", "top_k")):  # fmt: skip
            if name in fields:
                fields[its] = fields.pop(name)
        if (device := fields.pop("device", None)) is not None:
            if not isinstance(device, str):
                raise InvalidRequestError("device must be a string.", "device")
            model = fields.get("model", "default")
            if isinstance(model, str):
                check_device(self._directory.lookup(model, "generate").description, device)
        await self._chat(exchange)

    async def _prompted(self, exchange: Exchange) -> None:
        body = await exchange.read(PromptedChatBody)
        engine = self._directory.lookup(body.model, "generate")
        chat = body.chat(engine.description)
        chat = await recalled(exchange, engine, chat, body.session_id)
        answer = Answer(engine, chat, new_id("chat"), exchange, self._on_use)
        try:
            if body.stream:
                await stream_text(exchange, answer, as_event)
                return
            events, completion = await answer.whole()
            text = "".join(e.text for e in events if isinstance(e, Content))
            exchange.send_json(
                {
                    "text": text,
                    "model": engine.description.name,
                    "tokens": completion.usage.completion_tokens,
                    "finish_reason": finish_reason(completion),
                }
            )
        finally:
            answer.close()

    async def models(self, exchange: Exchange) -> None:
        listing = self._openai.listing()
        exchange.send_json({**listing, "models": [model["id"] for model in listing["data"]]})

    async def model(self, exchange: Exchange) -> None:
        found = self._openai.model(exchange.args[0])
        meta = found.get("meta", {})
        exchange.send_json(
            {
                **found,
                "name": found["id"],
                "context_length": meta.get("n_ctx"),
                "quantization": meta.get("quantization"),
            }
        )


def with_text(answer: dict[str, Any]) -> dict[str, Any]:
    """An answer of OpenAI's completions with its first text at the top, and its tokens."""
    choices, usage = answer.get("choices"), answer.get("usage")
    tokens = {"tokens": usage["completion_tokens"]} if usage else {}
    return {**answer, **({"text": choices[0]["text"]} if choices else {}), **tokens}


def as_event(text: str) -> str:
    r"""Text as an event: a line of data for each of its lines.

    >>> as_event(" a\nb")
    'data:  a\ndata: b\n\n'
    """
    return "".join(f"data: {line}\n" for line in NEWLINE.split(text)) + "\n"
