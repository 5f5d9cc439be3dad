"""/v1/generate with its token events, and what its service says of itself: /v1/health, /v1/status,
/v1/model/info, /v1/models/active. Tornado loop only.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Annotated, Any

from pydantic import Field

from llmkit.errors import EngineGoneError
from llmkit.gateway.access.authenticator import ANONYMOUS
from llmkit.gateway.answers import Answer
from llmkit.gateway.bodies import SessionId, Strict
from llmkit.gateway.chats import Chat, sampling_params
from llmkit.gateway.compat.llms import finish_reason
from llmkit.gateway.compat.streaming import json_event, stream_text
from llmkit.gateway.conversations.recall import check_no_session, recalled
from llmkit.gateway.directory import EngineDirectory
from llmkit.gateway.exchange import Exchange
from llmkit.gateway.failures import not_supported
from llmkit.gateway.ids import new_id
from llmkit.protocol import Completion, EngineStats, Message, ModelDescription
from llmkit.protocol.client import EngineClient
from llmkit.version import __version__

__all__ = ["GenerateEventsBody", "GeneratingRoutes", "has_model", "model_info"]

NAMES = {  # by our parameter, what its callers call it
    "stop": "sampling_params.stop_sequences",
    "repetition_penalty": "sampling_params.repeat_penalty",
    "penalty_last_n": "sampling_params.repeat_last_n",
}
SAME_NAME = (
    "temperature", "top_k", "top_p", "min_p", "max_tokens", "mirostat", "mirostat_tau",
    "mirostat_eta", "presence_penalty", "frequency_penalty", "typical_p", "seed",
)  # fmt: skip


class EventsSampling(Strict):
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repeat_penalty: float | None = None
    repeat_last_n: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    typical_p: float | None = None
    mirostat: int | None = None
    mirostat_tau: float | None = None
    mirostat_eta: float | None = None
    max_tokens: Annotated[int, Field(ge=1)] = 512
    stop_sequences: list[str] = Field(default_factory=list)
    seed: int | None = None
    session_id: SessionId = None


class GenerateEventsBody(Strict):
    """POST /v1/generate"""

    model: str = "default"
    prompt: Annotated[str, Field(min_length=1)]
    sampling_params: EventsSampling = Field(default_factory=EventsSampling)
    use_chat_template: bool = True

    def chat(self) -> Chat:
        """The chat that it asks for. Raises `InvalidRequestError`."""
        given = self.sampling_params
        names = {**NAMES, **{name: f"sampling_params.{name}" for name in SAME_NAME}}
        sampling = sampling_params(
            names,
            repetition_penalty=given.repeat_penalty,
            penalty_last_n=given.repeat_last_n,
            stop=tuple(given.stop_sequences),
            **{name: getattr(given, name) for name in SAME_NAME},
        )
        return Chat(messages=(Message("user", self.prompt),), sampling=sampling)


class GeneratingRoutes:
    """Routes over the engines of a directory; ``get_model`` runs for a model named as a route."""

    def __init__(
        self,
        directory: EngineDirectory,
        on_use: Callable[[EngineClient], None],
        get_model: Callable[[Exchange], Awaitable[None]],
    ) -> None:
        self._directory, self._on_use, self._get_model = directory, on_use, get_model
        self._started = time.monotonic()

    async def generate(self, exchange: Exchange) -> None:
        body = await exchange.read(GenerateEventsBody)
        engine = self._directory.lookup(body.model, "generate")
        chat, session_id = body.chat(), body.sampling_params.session_id
        if body.use_chat_template:
            chat, prompt = await recalled(exchange, engine, chat, session_id), None
        else:
            check_no_session(exchange, session_id)
            prompt = body.prompt
        answer = Answer(engine, chat, new_id("gen"), exchange, self._on_use, prompt=prompt)
        try:
            await stream_text(
                exchange,
                answer,
                lambda text: json_event({"token": text, "done": False}),
                lambda completion: json_event(_last(completion)),
            )
        finally:
            answer.close()

    async def health(self, exchange: Exchange) -> None:
        """As /health, and for known callers the queue and the time since the start."""
        is_known = exchange.identity != ANONYMOUS
        try:
            engine = self._directory.lookup("default")
        except EngineGoneError:
            if is_known:
                raise
            raise EngineGoneError("No model is ready.") from None
        if not is_known:
            exchange.send_json({"status": "ok"})
            return
        exchange.send_json(
            {
                "status": "ok",
                "version": __version__,
                "model_loaded": True,
                **model_info(engine.description, exchange),
                **self._queue(),
                "uptime_seconds": int(time.monotonic() - self._started),
            }
        )

    async def status(self, exchange: Exchange) -> None:
        exchange.send_json(
            {
                "status": "running",
                "version": __version__,
                **self._queue(),
                "uptime_seconds": int(time.monotonic() - self._started),
            }
        )

    def _queue(self) -> dict[str, int]:
        """Requests of all engines together; as many run at once as ``queue_capacity`` says."""
        stats: list[EngineStats] = [entry.client.stats() for entry in self._directory.entries()]
        return {
            "active_requests": sum(s.num_running for s in stats),
            "queue_size": sum(s.num_waiting for s in stats),
            "queue_capacity": sum(s.num_slots for s in stats),
        }

    async def info(self, exchange: Exchange) -> None:
        engine = self._directory.lookup("default")
        exchange.send_json(model_info(engine.description, exchange))

    async def active(self, exchange: Exchange) -> None:
        """The default model, unless there is one of this very name."""
        if has_model(self._directory, "active"):
            exchange.args = ("active",)
            await self._get_model(exchange)
        else:
            await self.info(exchange)

    async def files(self, exchange: Exchange) -> None:
        """No file, unless there is a model of this very name."""
        if has_model(self._directory, "list"):
            exchange.args = ("list",)
            await self._get_model(exchange)
        else:
            exchange.send_json({"models": []})

    async def refuse_loading(self, exchange: Exchange) -> None:
        raise not_supported(
            "This gateway loads and unloads no models itself: that is done in the notebooks and "
            "programs that have them. `llmkit serve MODEL --admin` has this route."
        )


def has_model(directory: EngineDirectory, name: str) -> bool:
    """Whether a model has this name; none is loaded for that."""
    return name in directory.unloaded or any(e.model_id == name for e in directory.entries())


def _last(completion: Completion) -> dict[str, Any]:
    usage = completion.usage
    return {
        "token": "",
        "done": True,
        "finish_reason": finish_reason(completion),
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
    }


def model_info(model: ModelDescription, exchange: Exchange) -> dict[str, Any]:
    """A model as its service describes it; administrators see where its file is."""
    return {
        "model": model.name,
        "model_path": exchange.shown_path(model.path),
        "context_size": model.n_ctx,
        "gpu_layers": 0 if model.device == "cpu" else -1,  # all that fit
    }
