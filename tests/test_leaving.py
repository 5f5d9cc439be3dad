"""A client that leaves costs nothing more, at whatever stage its request is."""

from __future__ import annotations

import asyncio
import json
import random
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import tiny_models
from fake_runner import FakeRunner
from fakes import FakeClient, ask, wait_for
from governed import Governed, dialects, governed, until

import llmkit.runtime.local as local
from llmkit.bridge.client import BridgeClient
from llmkit.bridge.server import BridgeServer
from llmkit.engine.integrity import check
from llmkit.protocol import EmbeddingRequest, Embeddings, FinishReason, Inquiry, Tokenize
from llmkit.runtime.local import LocalEngine

CHAT = "/v1/chat/completions"


async def gone(gate: Governed) -> None:
    """Nothing is left of any request: not in the gateway, nor in the engine."""
    await until(lambda: gate.gateway.num_running == 0 and not gate.overload._callers)
    await until(lambda: not gate.model.engine._scheduler.has_work)
    await until(lambda: gate.gateway.held.of("somebody") == 0)
    assert not gate.overload._flying and not any(gate.overload._coming.values())


async def test_while_its_body_is_read() -> None:
    async with governed() as gate:
        async with gate.connection(CHAT, b"x" * 300_000, announced=5_000_000):
            await until(lambda: gate.gateway.held.of("somebody") == 300_000)
        await gone(gate)
        assert not gate.records, "it never began"


async def test_while_its_body_waits_for_a_lane(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []

    def counted(body: bytes, _: object) -> None:
        read.append(len(body))

    monkeypatch.setattr("llmkit.gateway.reading.check_counts", counted)
    async with governed() as gate:
        held = threading.Event()
        for number in range(2):
            gate.gateway._lanes.submit(f"other {number}", held.wait)
        async with gate.connection(CHAT, dialects(5, text="x" * 200_000)[CHAT]):
            await until(lambda: gate.gateway.num_running == 1)
        await gone(gate)
        held.set()
        await asyncio.to_thread(gate.gateway._lanes.submit("somebody", lambda: None).result, 30)
        assert not read and gate.records[0].status == 499


class Gated(FakeClient):
    """Does nothing until the gate is opened."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.gate = threading.Event()
        self.begun: list[str] = []
        self.aborted: list[str] = []

    def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)
        super().abort(request_id)

    def _pass(self, what: str) -> None:
        self.begun.append(what)
        assert self.gate.wait(30)

    def submit(self, request: Any) -> Any:
        self._pass("submit")
        return super().submit(request)

    def inquire(self, inquiry: Inquiry[Any]) -> Future[Any]:
        self._pass("inquire")
        return super().inquire(inquiry)

    def embed(self, request: EmbeddingRequest) -> Future[Embeddings]:
        self._pass("embed")
        return super().embed(request)


async def test_while_its_prompt_is_tokenized() -> None:
    model = Gated(runner=FakeRunner(n_ctx=5000, step_s=0.01))
    async with governed(model=model) as gate:
        async with gate.connection(CHAT, dialects(4000)[CHAT]):
            await until(lambda: model.begun)
        await until(lambda: gate.gateway.num_running == 0 and model.aborted)
        model.gate.set()
        await gone(gate)
        assert sum(len(b.chunks) for b in model.runner.batches) <= 2, "a step at most"


LATER: dict[str, tuple[dict[str, Any], str]] = {
    CHAT: (dialects(50)[CHAT], "submit"),
    "/v1/messages": (dialects(50)["/v1/messages"], "submit"),
    "/v1/messages/count_tokens": ({"messages": [{"role": "user", "content": "x"}]}, "inquire"),
    "/tokenize": ({"content": "a"}, "inquire"),
    "/v1/embeddings": ({"model": "fake", "input": "a"}, "embed"),
    "/v1/rerank": ({"model": "fake", "query": "a", "documents": ["b"]}, "embed"),
    "/api/embed": ({"model": "fake", "input": "a"}, "embed"),
}


@pytest.mark.parametrize("path", LATER)
async def test_while_it_waits_behind_others_to_be_tokenized(path: str) -> None:
    """A caller's requests are prepared one after the other: the second has not begun."""
    model = Gated()
    async with governed(model=model) as gate:
        body, what = LATER[path]
        async with gate.connection(path, body):
            await until(lambda: model.begun == [what])
            async with gate.connection(path, body):
                await until(lambda: gate.gateway.num_running == gate.num_preparing == 2)
            await until(lambda: gate.gateway.num_running == gate.num_preparing == 1)
            model.gate.set()
        await gone(gate)
        await asyncio.sleep(0.1)
        assert model.begun == [what], "the second never did"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", dialects(1))
async def test_while_it_waits_in_the_queue(path: str, stream: bool) -> None:
    async with governed(FakeRunner(n_slots=1, n_ctx=5000, step_s=0.01)) as gate:
        running = asyncio.create_task(gate.post(CHAT, dialects(1500, text="other")[CHAT], "ann"))
        await until(lambda: gate.model.stats().num_running == 1)
        async with gate.connection(path, dialects(4000, stream=stream)[path]):
            await until(lambda: gate.model.stats().num_waiting == 1)
        await until(lambda: gate.model.stats().num_waiting == 0)
        gate.model.runner.step_s = 0.0
        assert (await running).code == 200
        await gone(gate)


async def test_while_its_prompt_is_computed() -> None:
    runner = FakeRunner(n_ctx=100_000, max_batch_tokens=64, step_s=0.01)
    async with governed(runner) as gate:
        async with gate.connection(CHAT, dialects(5, text="x" * 50_000)[CHAT]):
            await until(lambda: len(runner.batches) > 3)
        await gone(gate)
        assert len(runner.batches) < 700, "of the 780 that the prompt takes"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", dialects(1))
async def test_while_it_is_answered(path: str, stream: bool) -> None:
    runner = FakeRunner(n_ctx=100_000, step_s=0.005)
    async with governed(runner) as gate:
        async with gate.connection(path, dialects(50_000, stream=stream)[path]) as reader:
            await until(lambda: gate.model.stats().generation_tokens_total > 10)
            if stream:
                await reader.readuntil(b"\r\n\r\n")
        await gone(gate)
        assert gate.model.stats().generation_tokens_total < 10_000
        assert gate.records[0].status in (200, 499)


@pytest.mark.parametrize("path", [p for p, (_, what) in LATER.items() if what != "submit"])
async def test_while_a_single_answer_is_computed(path: str) -> None:
    """The engine is told, so that it can stop."""

    class Endless(FakeClient):
        futures: list[Future[Any]]
        aborted: list[str]

        def embed(self, request: EmbeddingRequest) -> Future[Embeddings]:
            self.futures.append(Future())
            return self.futures[-1]

        def inquire(self, inquiry: Inquiry[Any]) -> Future[Any]:
            self.futures.append(Future())
            return self.futures[-1]

        def abort(self, request_id: str) -> None:
            self.aborted.append(request_id)

    model = Endless()
    model.futures, model.aborted = [], []
    async with governed(model=model) as gate:
        async with gate.connection(path, LATER[path][0]):
            await until(lambda: model.futures)
        await until(lambda: gate.gateway.num_running == 0)
        await until(lambda: len(model.aborted) == 1)
        for future in model.futures:
            future.set_exception(RuntimeError("over"))
        (record,) = gate.records
        assert record.status == 499 and len(model.futures) == 1


async def test_many_who_leave_at_any_time_leave_nothing() -> None:
    async with governed(FakeRunner(n_slots=3, n_ctx=5000, step_s=0.002), max_queue=20) as gate:
        rng = random.Random(4)

        async def one(number: int) -> None:
            path = rng.choice([*dialects(1), "/v1/embeddings"])
            text = f"{number} " * rng.choice([1, 50, 40_000])
            body = (
                {"model": "fake", "input": text}
                if path == "/v1/embeddings"
                else dialects(200, stream=rng.random() < 0.5, text=text)[path]
            )
            async with gate.connection(path, body, f"c{number % 4}"):
                await asyncio.sleep(rng.uniform(0, 0.2))

        for _ in range(6):
            await asyncio.gather(*(one(n) for n in range(20)))
        mine = await gate.post(CHAT, dialects(30, text="still here")[CHAT])
        expected = gate.model.runner.reference(b"[user]still here", 30).decode()
        assert json.loads(mine.body)["choices"][0]["message"]["content"] == expected
        await gone(gate)
        check(gate.model.engine._scheduler)


def test_an_aborted_inquiry_is_answered_at_the_bridge(fake: FakeClient) -> None:
    """Who aborts but goes on waiting must not wait forever."""
    model = Gated()
    server = BridgeServer(model)
    remote = BridgeClient(server.connection)
    first = remote.inquire(Inquiry("q1", Tokenize("a"), "ann"))
    second = remote.inquire(Inquiry("q2", Tokenize("b"), "ann"))
    third = remote.embed(EmbeddingRequest("e1", ("b",), caller="ann"))
    wait_for(lambda: model.begun)
    remote.abort("q2")
    with pytest.raises(Exception, match="aborted"):
        second.result(30)
    model.gate.set()
    assert first.result(30).tokens == (97,) and third.result(30).size == 2
    assert model.begun.count("inquire") == 1
    remote.close()
    server.close()
    model.close()


# With a real model


@pytest.fixture
def engine(tmp_path: Path) -> Any:
    made = LocalEngine(tiny_models.write(tmp_path / "tiny.gguf", "llama"), n_ctx=512, n_slots=2)
    yield made
    made.close()


@pytest.mark.model
@pytest.mark.parametrize("stage", ["tokens", "grammar"])
def test_an_abort_while_it_is_prepared_keeps_it_from_the_engine(
    engine: LocalEngine, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    """Tokenizing and compiling a grammar cannot be broken off, but what follows is left out."""
    reached, going = threading.Event(), threading.Event()
    made: list[str] = []

    def held(name: str, work: Any) -> Any:
        def run(*args: Any, **more: Any) -> Any:
            made.append(name)
            if name == stage:
                reached.set()
                assert going.wait(30)
            return work(*args, **more)

        return run

    monkeypatch.setattr(local, "request_prompt", held("tokens", local.request_prompt))
    monkeypatch.setattr(engine._grammars, "compile", held("grammar", engine._grammars.compile))
    abort, aborted = engine.abort, threading.Event()

    def noted(request_id: str) -> None:
        abort(request_id)
        aborted.set()

    monkeypatch.setattr(engine, "abort", noted)
    server = BridgeServer(engine)
    remote = BridgeClient(server.connection)
    from llmkit.protocol import Grammar

    stream = remote.submit(ask("word", max_tokens=400, grammar=Grammar("regex", "[ab]+")))
    assert reached.wait(30)
    stream.close()
    assert aborted.wait(30)
    going.set()
    completion = stream.wait(30)
    assert completion is not None and completion.finish_reason is FinishReason.ABORT
    assert made == (["tokens"] if stage == "tokens" else ["tokens", "grammar"])
    assert engine.stats().requests_total == engine.stats().steps_total == 0
    assert remote.submit(ask("next", max_tokens=3)).result(30).usage.completion_tokens == 3
    remote.close()
    server.close()


@pytest.mark.model
async def test_clients_of_a_real_model_leave_at_every_stage(engine: LocalEngine) -> None:
    model: Any = engine
    async with governed(model=model) as gate:
        rng = random.Random(8)
        schema = {"type": "object", "properties": {"a": {"type": "string"}}}
        for number in range(60):
            path = rng.choice(list(dialects(1)))
            body = dialects(300, stream=rng.random() < 0.5, text=f"word{number} " * 40)[path]
            if path == CHAT and rng.random() < 0.5:
                body["json_schema"] = schema
            async with gate.connection(path, {**body, "model": "default"}, f"c{number % 3}"):
                await asyncio.sleep(rng.choice([0.0, 0.005, 0.03, 0.1]))
        await until(lambda: gate.gateway.num_running == 0)
        await until(lambda: engine.stats().num_running == engine.stats().num_waiting == 0)
        await asyncio.sleep(1)
        at_rest = engine.stats().steps_total
        await asyncio.sleep(0.3)
        assert engine.stats().steps_total == at_rest, "nothing is computed for nobody"
        check(engine._engine._scheduler)
        reply = await gate.post(CHAT, {**dialects(5)[CHAT], "model": "default"})
        assert json.loads(reply.body)["usage"]["completion_tokens"] > 0


@pytest.mark.model
async def test_vectors_of_a_real_model_stop_with_their_client() -> None:
    from llmkit.runtime.opening import open_model
    from llmkit.settings.options import EngineOptions

    embedder: Any = open_model("minilm", EngineOptions())
    async with governed(model=embedder) as gate:
        texts = [f"a sentence about number {i}, and nothing else " * 8 for i in range(1500)]
        async with gate.connection("/v1/embeddings", {"model": "default", "input": texts}):
            await until(lambda: embedder.stats().prompt_tokens_total > 0, 20)
        await until(lambda: embedder.stats().num_running == embedder.stats().num_waiting == 0)
        assert embedder.stats().prompt_tokens_total < 1500 * 60, "most of it was never computed"
        reply = await gate.post("/v1/embeddings", {"model": "default", "input": "still here"})
        assert reply.code == 200
