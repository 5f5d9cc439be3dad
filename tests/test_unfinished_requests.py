"""What requests cost that did not end: their prompts by estimate, and nothing if the engine refused
them."""

from __future__ import annotations

import asyncio
import json
from concurrent.futures import Future
from datetime import date
from typing import Any

import pytest
from access_client import entry, served
from fakes import FakeClient, wait_for
from scripted_model import ScriptedModel

from llmkit.bridge import wire
from llmkit.bridge.over_http import told
from llmkit.bridge.server import BridgeServer
from llmkit.errors import QueueFullError
from llmkit.gateway.access.limiting import spending_of
from llmkit.gateway.record import Record, recording
from llmkit.gateway.streams import merge
from llmkit.gateway.vectors import embed
from llmkit.protocol import Delta, EmbeddingRequest, Embeddings, GenerationRequest
from llmkit.protocol.speech import Facts, Hearing, Lines, Saying, Segment
from llmkit.protocol.stream import Channel, Stream
from llmkit.store.database import Database
from llmkit.store.usage import UsageStore

PROMPT = "x" * 400  # about 100 tokens


class Silent(FakeClient):
    """Takes requests, and answers none."""

    def __init__(self) -> None:
        super().__init__()
        self.taken: list[str] = []
        self.vectors: Future[Embeddings] = Future()

    def submit(self, request: GenerationRequest) -> Stream:
        self.taken.append(request.request_id)
        return Stream(Channel(request.request_id, lambda _: None))

    def embed(self, request: EmbeddingRequest) -> Future[Embeddings]:
        self.taken += ["text"] * len(request.inputs)
        return self.vectors


@pytest.mark.parametrize(
    ("path", "body", "prompts"),
    [
        ("/v1/completions", {"prompt": PROMPT}, 1),
        ("/v1/completions", {"prompt": [PROMPT] * 3, "stream": True}, 3),
        ("/v1/completions", {"prompt": PROMPT, "n": 3}, 3),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": PROMPT}]}, 1),
        ("/v1/embeddings", {"input": [PROMPT] * 3}, 3),
    ],
)
async def test_who_leaves_before_the_first_token_pays_for_prompts(
    database: Database, path: str, body: dict[str, Any], prompts: int
) -> None:
    model = Silent()
    bridge = BridgeServer(model)
    async with served([entry()], database) as api:
        _, writer = await asyncio.open_connection("127.0.0.1", api.port)
        data = json.dumps({"model": "fake", **body})
        head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer secret-ann\r\n"
        writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n{data}".encode())
        await asyncio.to_thread(wait_for, lambda: len(model.taken) == prompts)
        writer.close()
        usage = UsageStore(database)
        await asyncio.to_thread(wait_for, lambda: usage.tokens(date(2000, 1, 1)) != {})
        (days,) = usage.tokens(date(2000, 1, 1)).values()
        assert list(days.values()) == [100 * prompts]
    bridge.close()
    model.close()


def test_no_prompt_costs_more_than_the_context() -> None:
    model, record = Silent(), Record()
    long = GenerationRequest("long", prompt="x" * 10**6)
    record.begin(model, [long, GenerationRequest("short", prompt=(1, 2, 3), n=2)], "abc")
    assert spending_of(record).prompt_tokens == model.runner.n_ctx + 2 * 3
    record.forget_unfinished()
    assert spending_of(record).total_tokens == 0
    model.close()


def test_sound_and_speech_cost_what_they_are() -> None:
    model, record = Silent(), Record()
    heard = GenerationRequest("heard", prompt=PROMPT, hearing=Hearing(b"RIFF"))
    record.begin(model, [heard], ["heard"])
    assert spending_of(record).prompt_tokens == 0, "nobody knows how long it is"
    record.heard_s = 3600.0
    assert spending_of(record).prompt_tokens == 180_000, "no context holds that many"
    record.begin(model, [GenerationRequest("said", prompt="x" * 40, saying=Saying())], ["said"])
    assert spending_of(record).prompt_tokens == 180_000 + 40, "a character each"
    model.close()


class Ears(ScriptedModel):
    """Hears one segment of a minute, and goes on."""

    def submit(self, request: GenerationRequest) -> Stream:
        self.asked.append(request)
        channel = Channel(request.request_id, self.abort)
        for event in (Facts(60.0), Segment("One", 0.0, 1.0)):
            channel.push(Delta(Lines.of(event), 0))
        return Stream(channel)


@pytest.mark.parametrize("is_attached", [False, True])
async def test_who_leaves_a_transcription_pays_for_its_sound(
    database: Database, is_attached: bool
) -> None:
    model = Ears("ears", hears=True, languages=("en",))
    bridge = BridgeServer(model)
    form = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\nRIFF\r\n'
    form += b'--b\r\nContent-Disposition: form-data; name="stream"\r\n\r\ntrue\r\n--b--\r\n'
    path, kind, data = "/v1/audio/transcriptions", "multipart/form-data; boundary=b", form
    if is_attached:
        request = GenerationRequest("r", prompt="", hearing=Hearing(b"RIFF"))
        path, kind = "/engine/submit?model=ears", "application/json"
        data = wire.encode_request(request)
    async with served([entry()], database) as api:
        reader, writer = await asyncio.open_connection("127.0.0.1", api.port)
        head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer secret-ann\r\n"
        head += f"Content-Type: {kind}\r\nx-llmkit-wire: {told()}\r\n"
        writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        try:
            await asyncio.wait_for(reader.readuntil(b"data: "), 30)
        finally:
            writer.close()
        usage = UsageStore(database)
        await asyncio.to_thread(wait_for, lambda: usage.tokens(date(2000, 1, 1)) != {})
        (days,) = usage.tokens(date(2000, 1, 1)).values()
        assert list(days.values()) == [3000]
    bridge.close()


async def test_what_the_engine_refused_costs_nothing() -> None:
    model, record = Silent(), Record()
    channels = [Channel(name, lambda _: None) for name in ("one", "other")]
    requests = [GenerationRequest(each.request_id, prompt=PROMPT) for each in channels]
    record.begin(model, requests, ["one", "other"])
    channels[0].fail(QueueFullError("the queue is full"))
    with recording(record), pytest.raises(QueueFullError):
        async for _ in merge([Stream(channel) for channel in channels]):
            pass
    assert spending_of(record).prompt_tokens == 100, "the other one may have run"
    record = Record()
    model.vectors.set_exception(QueueFullError("the queue is full"))
    with recording(record), pytest.raises(QueueFullError):
        await embed(model, EmbeddingRequest("e", (PROMPT,)))
    assert record.model == "fake" and spending_of(record).total_tokens == 0
    model.close()
