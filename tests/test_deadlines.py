"""A request has its time: what cannot be done in it ends with an error in its dialect, and costs
nothing more."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from concurrent.futures import Future
from typing import Any

import pytest
from fake_runner import FakeRunner
from fakes import FakeClient
from gateway_client import CHAT, serve
from governed import Governed, dialects, governed, message_of, until

from llmkit.bridge.server import BridgeServer
from llmkit.gateway.access.deadlines import Deadline, seconds_of
from llmkit.protocol import EmbeddingRequest, Embeddings, Inquiry


def slow(n_slots: int = 4) -> FakeRunner:
    return FakeRunner(n_slots=n_slots, n_ctx=5000, step_s=0.02)


async def at_rest(gate: Governed) -> None:
    """Nothing is computed any more."""
    await until(lambda: not gate.model.engine._scheduler.has_work)


@pytest.mark.parametrize("path", dialects(1))
async def test_a_timeout_in_the_body_ends_an_answer_that_was_not_streamed(path: str) -> None:
    async with governed(slow()) as gate:
        body = {**dialects(1000)[path], "timeout": 0.3}
        start = time.monotonic()
        reply = await gate.post(path, body)
        assert 0.25 < time.monotonic() - start < 15, "all of it would take 20 s"
        assert reply.code == 408
        assert "0.3 s (its timeout)" in message_of(reply)
        assert reply.headers["x-should-retry"] == "false", "again would take as long"
        await at_rest(gate)
        assert (gate.records[-1].status, gate.records[-1].error) == (408, "timeout")
        assert (await gate.post(path, {**dialects(3)[path], "timeout": 20})).code == 200
        assert (await gate.post(path, {**dialects(3)[path], "timeout": None})).code == 200


@pytest.mark.parametrize("path", dialects(1))
async def test_the_servers_own_limit_is_a_504(path: str) -> None:
    async with governed(slow(), most_s=0.3) as gate:
        reply = await gate.post(path, {**dialects(1000)[path], "timeout": 60})
        assert reply.code == 504 and "request_timeout_s" in message_of(reply)
        await at_rest(gate)
        gate.deadlines.most_s = None
        assert (await gate.post(path, dialects(20)[path])).code == 200


@pytest.mark.parametrize("header", ["x-llmkit-timeout", "X-Request-Timeout"])
async def test_a_timeout_in_a_header(header: str) -> None:
    async with governed(slow()) as gate:
        path, body = "/v1/chat/completions", dialects(1000)["/v1/chat/completions"]
        reply = await gate.post(path, body, **{header: "0.25"})
        assert reply.code == 408 and "0.25 s" in message_of(reply)
        both = await gate.post(path, {**body, "timeout": 0.2}, **{header: "50"})
        assert both.code == 408 and "0.2 s" in message_of(both), "the shorter counts"
        await at_rest(gate)


async def test_what_sdks_say_of_their_own_clock_ends_nothing() -> None:
    async with governed(slow()) as gate:
        body = dialects(20)["/v1/chat/completions"]
        told = {"x_stainless_read_timeout": "0.05", "x_stainless_timeout": "NOT_GIVEN"}
        assert (await gate.post("/v1/chat/completions", body, **told)).code == 200


async def events(gate: Governed, path: str, **more: Any) -> str:
    reply = await gate.post(path, {**dialects(1000, stream=True)[path], "timeout": 0.4, **more})
    assert reply.code == 200
    await at_rest(gate)
    return reply.body.decode()


@pytest.fixture
def unhurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time of a stream is over when it looks for the twentieth time, however late that is."""
    looks = itertools.count(1)
    monkeypatch.setattr(Deadline, "at", property(lambda deadline: deadline._began + 60))
    monkeypatch.setattr(Deadline, "is_over", property(lambda _: next(looks) >= 20))


@pytest.mark.usefixtures("unhurried")
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
async def test_an_openai_stream_ends_with_an_error_and_no_done(path: str) -> None:
    async with governed(slow()) as gate:
        blocks = (await events(gate, path)).strip().split("\n\n")
        last = json.loads(blocks[-1].removeprefix("data: "))
        assert last["error"]["code"] == "timeout" and "[DONE]" not in "".join(blocks)
        choices = [json.loads(b[6:])["choices"][0] for b in blocks[:-1]]
        text = "".join(c.get("text", "") or c.get("delta", {}).get("content", "") for c in choices)
        prompt = b"[user]hi" if "chat" in path else b"hi"
        assert len(text) > 5 and text.encode() == gate.model.runner.reference(prompt, len(text))


@pytest.mark.usefixtures("unhurried")
async def test_an_anthropic_stream_ends_with_an_error_event() -> None:
    async with governed(slow()) as gate:
        text = await events(gate, "/v1/messages")
        assert text.count("content_block_delta") > 5 and "message_stop" not in text
        last = text.strip().split("\n\n")[-1]
        assert last.startswith("event: error\n")
        assert json.loads(last.split("data: ")[1])["error"]["type"] == "timeout_error"


@pytest.mark.usefixtures("unhurried")
@pytest.mark.parametrize("path", ["/api/chat", "/api/generate"])
async def test_an_ollama_stream_ends_with_an_error_line(path: str) -> None:
    async with governed(slow()) as gate:
        lines = [json.loads(line) for line in (await events(gate, path)).splitlines()]
        assert set(lines[-1]) == {"error"} and "0.4 s" in lines[-1]["error"]
        assert len(lines) > 5 and not any(line.get("done") for line in lines[:-1])


async def test_a_response_fails_and_keeps_its_text() -> None:
    async with governed(slow()) as gate:
        blocks = (await events(gate, "/v1/responses", timeout=3)).strip().split("\n\n")
        last = json.loads(blocks[-1].split("data: ")[1])
        assert last["type"] == "response.failed"
        response = last["response"]
        assert response["status"] == "failed" and "3 s" in response["error"]["message"]
        text = response["output"][0]["content"][0]["text"]
        assert text.encode() == gate.model.runner.reference(b"[user]hi", len(text)) and text
        kept = await gate.api.fetch("GET", f"/v1/responses/{response['id']}")
        assert json.loads(kept.body)["output"] == response["output"]


async def test_who_waited_in_vain_is_told_when_to_come_back() -> None:
    async with governed(slow(n_slots=1)) as gate:
        body = dialects(4000)["/v1/chat/completions"]
        running = asyncio.create_task(gate.post("/v1/chat/completions", body, "eve"))
        await until(lambda: gate.model.stats().num_running == 1)
        waits = {**dialects(5, text="me")["/v1/chat/completions"], "timeout": 0.3}
        reply = await gate.post("/v1/chat/completions", waits, "ann")
        assert reply.code == 408 and "had not begun" in message_of(reply)
        assert int(reply.headers["Retry-After"]) >= 1 and "x-should-retry" not in reply.headers
        await until(lambda: gate.model.stats().num_waiting == 0)
        running.cancel()


class Stuck(FakeClient):
    """Never answers what has a single answer."""

    def __init__(self) -> None:
        super().__init__()
        self.futures: list[Future[Any]] = []
        self.aborted: list[str] = []

    def embed(self, request: EmbeddingRequest) -> Future[Embeddings]:
        self.futures.append(Future())
        return self.futures[-1]

    def inquire(self, inquiry: Inquiry[Any]) -> Future[Any]:
        self.futures.append(Future())
        return self.futures[-1]

    def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)
        super().abort(request_id)


SINGLE = {
    "/v1/embeddings": {"model": "fake", "input": "a"},
    "/api/embed": {"model": "fake", "input": "a"},
    "/v1/rerank": {"model": "fake", "query": "a", "documents": ["b"]},
    "/v1/messages/count_tokens": {"messages": [{"role": "user", "content": "hi"}]},
    "/tokenize": {"content": "a"},
}


@pytest.mark.parametrize("path", SINGLE)
async def test_vectors_and_counts_have_their_time_too(path: str) -> None:
    model = Stuck()
    object.__setattr__(model.description, "embedding_size", 2 if "messages" not in path else 0)
    async with governed(model=model) as gate:
        reply = await gate.post(path, {**SINGLE[path], "timeout": 0.2})
        assert reply.code == 408 and "0.2 s" in message_of(reply)
        # None where the time was over before the model was asked.
        await until(lambda: all(f.cancelled() for f in model.futures) or model.aborted)
        for future in model.futures:
            future.cancel()


BAD: list[Any] = [0, -1, "30", "soon", True, [], {"read": 5}, float("1e999"), -0.0]


@pytest.mark.parametrize("value", BAD, ids=repr)
async def test_what_is_no_time_is_a_400_that_names_it(value: Any) -> None:
    async with governed() as gate:
        for path, body in {**dialects(2), "/v1/embeddings": {"input": "a"}}.items():
            raw = json.dumps({**body, "timeout": value}).replace("Infinity", "1e999")
            reply = await gate.post(path, raw)
            assert reply.code == 400
            assert "timeout" in message_of(reply) or "too large" in message_of(reply)


@pytest.mark.parametrize(
    "value", ["", "0", "-5", "5s", "1e3", "nan", "inf", "１２", "5,5", "9" * 40, "0x10", " ", "1 2"]
)
async def test_headers_are_read_strictly(value: str) -> None:
    async with governed() as gate:
        for name in ("x_request_timeout", "x_llmkit_timeout"):
            header = value.encode().decode("latin-1")
            reply = await gate.post("/v1/chat/completions", CHAT, **{name: header})
            assert reply.code == 400 and name.replace("_", "-") in message_of(reply)


@pytest.mark.parametrize("value", ["30", "2.5", ".5", "7.", " 30 ", "999999999"])
async def test_headers_that_are_times(value: str) -> None:
    async with governed() as gate:
        assert (await gate.post("/v1/chat/completions", CHAT, x_request_timeout=value)).code == 200


async def test_a_server_without_deadlines_knows_no_timeout() -> None:
    model = FakeClient()
    bridge = BridgeServer(model)
    async for api in serve(None):
        reply = await api.fetch("POST", "/v1/chat/completions", {**CHAT, "timeout": 5})
        assert reply.code == 400 and "timeout" in json.loads(reply.body)["error"]["message"]
    bridge.close()
    model.close()


async def test_a_reader_that_stops_reading_does_not_outlive_its_time() -> None:
    async with governed(FakeRunner(n_ctx=100_000), most_s=0.3) as gate:
        body = dialects(90_000, stream=True)["/v1/chat/completions"]
        async with gate.connection("/v1/chat/completions", body):
            await until(lambda: gate.records)
            await at_rest(gate)
        (record,) = gate.records
        assert (record.status, record.error) == (504, "timeout")


def test_times_are_capped_not_overflown() -> None:
    assert seconds_of(10**399, "timeout") == 1e9 and seconds_of(0.5, "timeout") == 0.5
