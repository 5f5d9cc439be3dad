"""Twice the weight, twice the service: in the scheduler step by step, through the bridge, for
vectors, and with a real model."""

from __future__ import annotations

import threading
import time
from collections import Counter
from typing import Any

import numpy as np
import pytest
import tiny_models
from fake_runner import FakeRunner
from fakes import FakeClient, ask, wait_for
from hypothesis import given, settings
from hypothesis import strategies as st
from scheduler_bench import Bench

from llmkit.bridge.client import BridgeClient
from llmkit.bridge.server import BridgeServer
from llmkit.errors import InvalidRequestError, QueueFullError
from llmkit.protocol import EmbeddingRequest, GenerationRequest, SamplingParams
from llmkit.runtime.jobs import Job, JobQueue
from llmkit.settings.options import EngineOptions


def served(n_slots: int, weights: dict[str, float], steps: int = 1200, **options: Any) -> Counter:  # type: ignore[type-arg]
    """The tokens that each caller got, all of them always wanting more."""
    bench = Bench(
        FakeRunner(n_slots, n_ctx=400, max_batch_tokens=600, host_tokens=100_000), **options
    )
    tokens: Counter[str] = Counter()
    counted: dict[int, int] = {}
    waiting: Counter[str] = Counter()
    serial = 0
    for _ in range(steps):
        for caller, weight in weights.items():
            while waiting[caller] < 2 * n_slots + 2:
                serial += 1
                # Long enough to be parked when it makes way: computing it again would be charged.
                bench.add(b"x" * 70, 12, caller=caller, weight=weight, cache_salt=str(serial))
                waiting[caller] += 1
        for request in bench.step():
            tokens[request.caller] += request.num_output_tokens - counted.get(request.serial, 0)
            counted[request.serial] = request.num_output_tokens
            waiting[request.caller] -= request.finish_reason is not None
    return tokens


@pytest.mark.parametrize("n_slots", [1, 2, 3, 4, 8])
def test_twice_the_weight_is_twice_the_service(n_slots: int) -> None:
    tokens = served(n_slots, {"heavy": 2.0, "light": 1.0})
    assert 1.8 <= tokens["heavy"] / tokens["light"] <= 2.2


def test_unequal_weights_are_not_lost_with_a_slot_for_each() -> None:
    tokens = served(2, {"a": 2.0, "b": 3.0})
    assert tokens["b"] / tokens["a"] == pytest.approx(1.5, rel=0.1)


@pytest.mark.parametrize("n_slots", [2, 6])
def test_three_callers_share_by_weight(n_slots: int) -> None:
    tokens = served(n_slots, {"a": 4.0, "b": 2.0, "c": 1.0}, 3000)
    assert tokens["a"] / tokens["c"] == pytest.approx(4, rel=0.2)
    assert tokens["b"] / tokens["c"] == pytest.approx(2, rel=0.2)


@settings(max_examples=25, deadline=None)
@given(
    n_slots=st.integers(1, 6),
    weights=st.lists(st.sampled_from([0.5, 1.0, 2.0, 3.0]), min_size=2, max_size=4),
    most=st.sampled_from([None, 1, 2]),
)
def test_any_weights_give_their_shares(
    n_slots: int, weights: list[float], most: int | None
) -> None:
    callers = {f"c{i}": weight for i, weight in enumerate(weights)}
    tokens = served(n_slots, callers, 1200, max_running=most)
    shares = [tokens[c] / weight for c, weight in callers.items()]
    assert max(shares) <= 1.25 * min(shares)


def test_a_light_caller_without_a_slot_waits_its_turn_and_no_longer() -> None:
    bench = Bench(FakeRunner(n_slots=2, n_ctx=2000, host_tokens=4000))
    for i in range(2):
        bench.add(b"heavy %d" % i, 500, caller="heavy", weight=4.0)
    for _ in range(20):
        bench.step()
    light = bench.add(b"light", 20, caller="light", weight=1.0)
    bench.step()
    bench.step()
    assert light.num_output_tokens >= 1, "who comes new is level with the least served"
    bench.drain()


def test_slots_are_shared_as_before_where_all_weigh_the_same() -> None:
    tokens = served(3, {"a": 1.0, "b": 1.0, "c": 1.0})
    assert max(tokens.values()) <= 1.05 * min(tokens.values())


@pytest.mark.parametrize("weight", [0, -1, 0.001, 101, float("nan"), float("inf"), "2", True, None])
def test_weights_have_bounds(weight: Any) -> None:
    with pytest.raises(InvalidRequestError, match="weight"):
        GenerationRequest("r", prompt="a", weight=weight)
    with pytest.raises(InvalidRequestError, match="weight"):
        EmbeddingRequest("r", ("a",), weight=weight)


@pytest.mark.parametrize("gateway", [True, False])
def test_only_a_gateway_gives_more_than_the_usual_weight(
    fake: FakeClient, monkeypatch: pytest.MonkeyPatch, gateway: bool
) -> None:
    seen: list[float] = []
    submit = fake.submit

    def watch(request: GenerationRequest) -> Any:
        seen.append(request.weight)
        return submit(request)

    monkeypatch.setattr(fake, "submit", watch)
    server = BridgeServer(fake)
    remote = BridgeClient(server.connection, weighs=gateway)
    for weight in (50.0, 1.0, 0.25):
        request = GenerationRequest(
            f"w{weight}", SamplingParams(max_tokens=1), prompt="x", weight=weight
        )
        assert remote.submit(request).result(30)
    assert seen == ([50.0, 1.0, 0.25] if gateway else [1.0, 1.0, 0.25])
    remote.close()
    server.close()


def test_vectors_are_shared_by_weight() -> None:
    queue = JobQueue()
    weights = {"heavy": 2.0, "light": 1.0, "feather": 0.25}
    for caller, weight in weights.items():
        sequences = [np.zeros(4, np.int32)] * 400
        vectors = np.empty((400, 2), np.float32)
        queue.add(Job(caller, caller, sequences, True, None, vectors, weight))  # type: ignore[arg-type]
    taken: Counter[str] = Counter()
    for _ in range(20):
        taken.update(job.caller for job, _ in queue.take(64, 13))
    assert taken["heavy"] / taken["light"] == pytest.approx(2, rel=0.05)
    assert taken["light"] / taken["feather"] == pytest.approx(4, rel=0.1)
    assert sum(taken.values()) == 20 * 13, "no batch is smaller for it"


def test_one_at_a_time_and_at_most_so_many() -> None:
    for most in (1, 2):
        bench = Bench(FakeRunner(n_slots=4), max_running=most)
        requests = [bench.add(b"r%d" % i, 5) for i in range(6)]
        bench.drain()
        assert max(len(b.chunks) for b in bench.runner.batches) == most
        assert all(len(bench.text(r)) == 5 for r in requests)


def test_an_urgent_request_takes_the_only_place() -> None:
    bench = Bench(FakeRunner(n_slots=4, host_tokens=1000), max_running=1)
    slow = bench.add(b"in no hurry", 40, priority=5)
    for _ in range(5):
        bench.step()
    urgent = bench.add(b"now", 3)
    bench.drain()
    assert bench.ended == [urgent, slow]


class TestCompany:
    """An idle engine waits for company before it begins, and only then."""

    def client(self, wait_s: float) -> FakeClient:
        runner = FakeRunner(n_slots=4, n_ctx=50_000, step_s=0.001)
        return FakeClient(runner=runner, batch_wait_s=wait_s)

    def test_the_first_waits_and_they_are_computed_together(self) -> None:
        for _ in range(20):
            client, began = self.client(0.5), time.monotonic()
            streams = []
            for i in range(3):
                streams.append(client.submit(ask(f"number {i}", max_tokens=3)))
                time.sleep(0.03)
            took = time.monotonic() - began
            assert all(s.result(30) for s in streams)
            client.close()
            if took < 0.4:  # else the first one may have waited long enough
                break
        assert len(client.runner.batches[0].chunks) == 3, "one step for all three prompts"

    def test_a_full_batch_waits_no_longer(self) -> None:
        client = self.client(30.0)
        streams = [client.submit(ask(f"n{i}", max_tokens=2)) for i in range(4)]
        assert all(s.result(30) for s in streams)
        client.close()

    def test_who_comes_while_others_run_does_not_wait(self) -> None:
        client = self.client(2.0)
        long = client.submit(ask("long", max_tokens=20_000))
        wait_for(lambda: long.text)
        batches = client.runner.batches
        before = len(batches)
        assert client.submit(ask("short", max_tokens=1)).result(30)
        (at,) = [i for i in range(before, len(batches)) if len(batches[i].chunks) == 2]
        assert at - before < 1000, "in one of the next steps: 2 s are 2,000 of them"
        long.close()
        client.close()

    def test_an_abort_and_an_end_are_not_kept_waiting(self) -> None:
        client = self.client(30.0)
        stream = client.submit(ask("gone", max_tokens=5))
        stream.close()
        completion = stream.wait(30)
        assert completion is not None and not completion.text
        client.submit(ask("left behind", max_tokens=5))
        start = time.monotonic()
        client.close()
        assert time.monotonic() - start < 20
        assert not client.runner.batches, "nothing was computed"

    def test_a_full_queue_is_still_full(self) -> None:
        client = FakeClient(runner=FakeRunner(n_slots=1), max_waiting=1, batch_wait_s=60.0)
        client.submit(ask("first"))
        with pytest.raises(QueueFullError):
            client.submit(ask("second"))
        client.close()


def test_options_of_batching() -> None:
    assert EngineOptions().batching and EngineOptions(batching=False, batch_requests=1)
    for bad in (
        {"batch_requests": 0},
        {"batch_requests": 2.5},
        {"batch_wait_ms": -1},
        {"batch_wait_ms": 1e9},
        {"batching": 1},
        {"batching": False, "batch_requests": 2},
    ):
        with pytest.raises(InvalidRequestError, match="batch"):
            EngineOptions(**bad)  # type: ignore[arg-type]


@pytest.mark.model
@pytest.mark.parametrize(
    ("options", "most"), [({"batching": False}, 1), ({"batch_requests": 2}, 2), ({}, 4)]
)
def test_a_real_engine_computes_so_many_at_once(
    tmp_path: Any, options: dict[str, Any], most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmkit.runtime.local import LocalEngine

    path = tiny_models.write(tmp_path / "tiny.gguf", "llama")
    engine = LocalEngine(path, n_ctx=256, n_slots=4, deterministic=True, **options)
    assert engine.stats().num_slots == most
    texts = [f"text number {i}" for i in range(6)]
    all_came, runner = threading.Event(), engine._engine._runner
    execute = runner.execute
    monkeypatch.setattr(runner, "execute", lambda batch: (all_came.wait(30), execute(batch))[1])
    together = [engine.submit(ask(text, max_tokens=10)) for text in texts]
    all_came.set()
    answers = [stream.result(300).tokens for stream in together]
    assert max(len(step.chunks) for step in engine._engine.steps()) == most
    assert answers == [engine.submit(ask(text, max_tokens=10)).result(300).tokens for text in texts]
    engine.close()


@pytest.mark.model
def test_a_real_engine_shares_by_weight(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmkit.runtime.local import LocalEngine

    engine = LocalEngine(
        tiny_models.write(tmp_path / "tiny.gguf", "llama"), n_ctx=256, n_slots=2, host_cache_mb=8
    )
    tokens: Counter[str] = Counter()
    running: list[tuple[str, Any]] = []
    serial = 0
    runner, is_over = engine._engine._runner, threading.Event()
    execute = runner.execute

    def computed(batch: Any) -> Any:
        """All of them always want more, also where this machine stalls."""
        while not is_over.is_set():
            left = Counter(caller for caller, stream in [*running] if not stream.finished)
            if min(left["heavy"], left["light"]) > 3:
                break
            time.sleep(0.001)
        return execute(batch)

    monkeypatch.setattr(runner, "execute", computed)
    end = time.monotonic() + 60
    while tokens.total() < 4000 and time.monotonic() < end:
        for caller, weight in (("heavy", 2.0), ("light", 1.0)):
            while sum(c == caller for c, _ in running) < 8:
                serial += 1
                params = SamplingParams(max_tokens=32, temperature=0, ignore_eos=True)
                request = GenerationRequest(
                    f"w{serial}",
                    params,
                    prompt="one two three",
                    caller=caller,
                    weight=weight,
                    cache_salt=str(serial),
                )
                running.append((caller, engine.submit(request)))
        for entry in [e for e in running if e[1].finished]:
            running.remove(entry)
            tokens[entry[0]] += entry[1].result(30).usage.completion_tokens
        time.sleep(0.001)
    is_over.set()
    for _, stream in running:
        stream.close()
    engine.close()
    assert 1.6 <= tokens["heavy"] / tokens["light"] <= 2.4
