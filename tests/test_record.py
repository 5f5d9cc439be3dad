"""What the stages round a route can read of it afterwards."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterator

import pytest
from fakes import FakeClient
from gateway_client import CHAT, Api, serve

from llmkit.gateway.exchange import Exchange
from llmkit.gateway.failures import ApiError
from llmkit.gateway.record import Record


@pytest.fixture
def records() -> list[Record]:
    return []


@pytest.fixture
async def api(model: FakeClient, records: list[Record]) -> AsyncIterator[Api]:
    @contextlib.asynccontextmanager
    async def stage(exchange: Exchange) -> AsyncIterator[None]:
        try:
            yield
        finally:
            records.append(exchange.record)

    async for api in serve(None, stages=[stage]):
        yield api


MESSAGES = {**CHAT, "max_tokens": 6}
RESPONSE = {"model": "fake", "input": "hi", "max_output_tokens": 6}
OLLAMA = {"model": "fake", "messages": CHAT["messages"], "options": {"num_predict": 6}}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {**CHAT, "n": 2}),
        ("/v1/messages", MESSAGES),
        ("/v1/responses", RESPONSE),
        ("/api/chat", OLLAMA),
    ],
)
async def test_a_chat_of_any_dialect_is_recorded(
    api: Api, records: list[Record], path: str, body: dict[str, object], stream: bool
) -> None:
    reply = await api.fetch("POST", path, {**body, "stream": stream})
    assert reply.code == 200
    (record,) = records
    n = int(str(body.get("n", 1)))
    assert (record.operation, record.model, record.status) == ("chat", "fake", 200)
    assert len(record.completions) == n and sum(r.n for r in record.requests) == n
    assert record.usage.completion_tokens == 6 * n and record.usage.prompt_tokens == 8 * n
    assert all(m.completion_tokens == 6 and m.ttft_s > 0 for m in record.metrics)
    assert record.first_token_at is not None and record.first_token_at >= record.started_at


async def test_vectors_and_refusals_are_recorded(api: Api, records: list[Record]) -> None:
    await api.fetch("POST", "/v1/completions", {"model": "fake", "prompt": "a", "max_tokens": 2})
    await api.fetch("POST", "/v1/embeddings", {"model": "fake", "input": ["ab", "c"]})
    await api.fetch("POST", "/v1/chat/completions", {**CHAT, "temperature": -1})
    await api.fetch("POST", "/v1/chat/completions", {**CHAT, "model": "none"})
    text, vectors, refused, missing = records
    assert (text.operation, text.usage.completion_tokens) == ("text_completion", 2)
    assert (vectors.operation, vectors.num_embedded_tokens) == ("embeddings", 3)
    assert vectors.usage.prompt_tokens == 3 and not vectors.completions
    assert (refused.operation, refused.model, refused.usage.total_tokens) == ("", "", 0)
    assert (missing.operation, missing.status, missing.error) == ("", 404, "model_not_found")


async def test_a_stage_that_ends_knows_the_status(model: FakeClient) -> None:
    """The log's stage is the outermost; it must see what an inner one refused."""
    seen: list[tuple[int, str]] = []

    @contextlib.contextmanager
    def outer(exchange: Exchange) -> Iterator[None]:
        try:
            yield
        finally:
            seen.append((exchange.record.status, exchange.record.error))

    @contextlib.contextmanager
    def inner(exchange: Exchange) -> Iterator[None]:
        if exchange.query("refuse"):
            raise ApiError(429, "Too many.", "rate_limit_error", code="rate_limit_exceeded")
        yield

    async for api in serve(None, stages=[outer, inner]):
        await api.fetch("POST", "/v1/chat/completions?refuse=1", CHAT)
        await api.fetch("POST", "/v1/chat/completions", {**CHAT, "model": "none"})
        await api.fetch("POST", "/v1/chat/completions", CHAT)
    assert seen == [(429, "rate_limit_exceeded"), (404, "model_not_found"), (200, "")]
