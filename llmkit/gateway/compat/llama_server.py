"""llama-server's own routes for text and vectors: /completion, /infill, /embedding.

Tornado loop only.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from llmkit.errors import InvalidRequestError, ModelNotFoundError
from llmkit.gateway.compat import llama_objects as objects
from llmkit.gateway.compat.infilling import infill_prompt
from llmkit.gateway.compat.llama_schemas import (
    InfillBody,
    LlamaCompletionBody,
    LlamaEmbeddingBody,
    LlamaGenerationBody,
    Prompt,
    scales_of,
)
from llmkit.gateway.compat.stopping import Stopping
from llmkit.gateway.directory import EngineDirectory
from llmkit.gateway.exchange import Exchange
from llmkit.gateway.failures import not_supported
from llmkit.gateway.ids import new_id
from llmkit.gateway.streams import StreamUpdate, close_all, merge, submit_all
from llmkit.gateway.vectors import embed, vectors_of
from llmkit.protocol import (
    Completion,
    Detokenize,
    EmbeddingRequest,
    GenerationRequest,
    Inquiry,
    SamplingParams,
    Tokenize,
)
from llmkit.protocol.client import EngineClient
from llmkit.protocol.stream import Stream

__all__ = ["LlamaServerRoutes"]


@dataclass(frozen=True, slots=True)
class Asked:
    """One answer that is wanted: the prompt, as text too, and its length in tokens if known."""

    prompt: Prompt
    text: str
    suffix: str | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.prompt) if isinstance(self.prompt, tuple) else 0


class LlamaServerRoutes:
    """Routes over the engines of a directory."""

    def __init__(self, directory: EngineDirectory, on_use: Callable[[EngineClient], None]) -> None:
        self._directory, self._on_use = directory, on_use

    async def completion(self, exchange: Exchange) -> None:
        body = await exchange.read(LlamaCompletionBody)
        engine = self._engine(body.model)
        asked = [await _asked(exchange, engine, prompt) for prompt in body.prompts]
        await self._answer(exchange, engine, body, asked, is_many=body.is_many)

    async def infill(self, exchange: Exchange) -> None:
        body = await exchange.read(InfillBody)
        engine = self._engine(body.model)
        prefix, suffix = await infill_prompt(exchange, engine, body)
        asked = [Asked(prefix, prefix, suffix)]
        try:
            await self._answer(exchange, engine, body, asked, is_many=body.n > 1)
        except InvalidRequestError as error:
            if error.param != "suffix" or exchange.streaming:
                raise
            raise not_supported(
                f"Infill is not supported by this model: {str(error).removeprefix('suffix: ')}"
            ) from error

    async def embedding(self, exchange: Exchange) -> None:
        body = await exchange.read(LlamaEmbeddingBody)
        try:
            engine = self._directory.lookup(body.model, "embed")
        except ModelNotFoundError:
            if body.model != "default":
                raise
            raise not_supported(
                "This server does not support embeddings: load a model for it."
            ) from None
        self._on_use(engine)
        request = EmbeddingRequest(
            new_id("embd"), body.inputs, body.embd_normalize == 2, caller=exchange.caller
        )
        vectors = await asyncio.to_thread(vectors_of, await embed(engine, request))
        made = [{"index": i, "embedding": [vector.tolist()]} for i, vector in enumerate(vectors)]
        exchange.send_bytes(objects.compact(made).encode())

    def _engine(self, model: str) -> EngineClient:
        engine = self._directory.lookup(model, "generate")
        self._on_use(engine)
        return engine

    async def _answer(
        self,
        exchange: Exchange,
        engine: EngineClient,
        body: LlamaGenerationBody,
        asked: Sequence[Asked],
        *,
        is_many: bool,
    ) -> None:
        sampling, reply_id = body.sampling(engine.description), new_id("llama")
        lora = scales_of(body.lora, engine.description) if body.lora else None
        requests = [
            GenerationRequest(
                f"{reply_id}-{i}",
                sampling,
                prompt=each.prompt,
                suffix=each.suffix,
                parse_special=each.suffix is None,
                n=body.n,
                lora=lora,
            )
            for i, each in enumerate(asked)
        ]
        streams = submit_all(engine, exchange.owned(engine, requests))
        answers = [each for each in asked for _ in range(body.n)]
        answering = Answering(exchange, engine, body, sampling, answers)
        on_use = partial(self._on_use, engine)
        try:
            if body.stream:
                await self._stream(exchange, answering, streams, on_use)
                return
            async for _ in answering.read(merge(streams), on_use):
                pass
            made = [answering.final(i) for i in range(len(answers))]
            exchange.send_bytes(objects.compact(made if is_many else made[0]).encode())
        finally:
            close_all(streams)

    @staticmethod
    async def _stream(
        exchange: Exchange,
        answering: Answering,
        streams: list[Stream],
        on_use: Callable[[], None],
    ) -> None:
        async for event in answering.read(merge(streams), on_use):
            if not exchange.streaming:  # an error before the first byte keeps its HTTP status
                await exchange.start_events()
            if event is None:
                await exchange.send_text(":\n\n")
            else:
                await exchange.send_text(f"data: {objects.compact(event)}\n\n")
        exchange.end_events("")  # llama-server ends here without a mark


class Answering:
    """All answers to one request, as they are generated."""

    def __init__(
        self,
        exchange: Exchange,
        engine: EngineClient,
        body: LlamaGenerationBody,
        sampling: SamplingParams,
        asked: Sequence[Asked],
    ) -> None:
        self._exchange, self._engine, self._body = exchange, engine, body
        self._sampling, self._asked = sampling, asked
        self._stopping = [Stopping(body.t_max_predict_ms, body.n_indent) for _ in asked]
        self._done: dict[int, Completion] = {}

    async def read(
        self, updates: AsyncIterator[StreamUpdate | None], on_wait: Callable[[], None]
    ) -> AsyncIterator[dict[str, Any] | None]:
        """The events of a stream until all answers have ended; None after a silence."""
        async for update in updates:
            on_wait()
            if update is None:
                yield None
                continue
            index, deltas, completion = update
            if index in self._done:  # stopped by us
                continue
            stopping = self._stopping[index]
            text = stopping.take("".join(d.text for d in deltas), sum(d.num_tokens for d in deltas))
            entries = [e for d in deltas for e in d.logprobs]
            if text or entries:
                yield self._partial(index, text, entries)
            if completion is not None:
                self._done[index] = completion
            elif stopping.is_over:
                self._done[index] = await self._stopped(index)
            if index in self._done:
                yield self.final(index)
            if len(self._done) == len(self._asked):
                return

    def _partial(self, index: int, text: str, entries: list[Any]) -> dict[str, Any]:
        asked, count = self._asked[index], self._stopping[index].num_tokens
        event = objects.partial(index, text, count, asked.num_tokens, entries)
        if self._body.n_probs:
            event["completion_probabilities"] = objects.probabilities(entries)
        if self._body.timings_per_token:
            event["timings"] = objects.timings(self._stopping[index].so_far(asked.num_tokens))
        return event

    async def _stopped(self, index: int) -> Completion:
        """The completion of an answer that was ended here, counted as if the engine had."""
        asked, stopping = self._asked[index], self._stopping[index]
        count = asked.num_tokens or await _count(self._exchange, self._engine, asked)
        completion = stopping.so_far(count)
        self._exchange.record.progress(completion, -stopping.num_tokens)
        return completion

    def final(self, index: int) -> dict[str, Any]:
        body, completion = self._body, self._done[index]
        answer = objects.final(
            index,
            self._engine.description.name,
            completion,
            self._sampling,
            self._asked[index].text,
            stream=body.stream,
            tokens=completion.tokens if body.return_tokens and not body.stream else (),
            lora=sorted((each.id, each.scale) for each in body.lora or ()),
        )
        if body.n_probs and not body.stream:
            answer["completion_probabilities"] = objects.probabilities(completion.logprobs)
        return objects.picked(body.response_fields, answer)


async def _asked(exchange: Exchange, engine: EngineClient, prompt: str | list[int | str]) -> Asked:
    if isinstance(prompt, str):
        return Asked(prompt, prompt)
    tokens: list[int] = []
    for part in prompt:
        if isinstance(part, int):
            tokens.append(part)
        else:
            tokens += await _tokens(exchange, engine, part, add_special=not tokens)
    question = Detokenize(tuple(tokens))
    inquiry = Inquiry(new_id("ask"), question, exchange.caller)
    return Asked(tuple(tokens), await asyncio.wrap_future(engine.inquire(inquiry)))


async def _count(exchange: Exchange, engine: EngineClient, asked: Asked) -> int:
    """The number of tokens of a prompt."""
    if asked.suffix is None:
        return len(await _tokens(exchange, engine, asked.text))
    parts = [
        await _tokens(exchange, engine, p, add_special=False) for p in (asked.text, asked.suffix)
    ]
    return sum(map(len, parts)) + 3  # and the tokens that say what is to be filled in


async def _tokens(
    exchange: Exchange, engine: EngineClient, text: str, *, add_special: bool = True
) -> tuple[int, ...]:
    inquiry = Inquiry(new_id("ask"), Tokenize(text, add_special), exchange.caller)
    return (await asyncio.wrap_future(engine.inquire(inquiry))).tokens
