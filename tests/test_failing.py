"""Engines whose thread fails, behind real bridges: their requests go on elsewhere, as after a death
of the process."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from functools import partial

import pytest
from fake_runner import FakeRunner
from fakes import FakeClient, wait_for
from mortal import request, undisturbed

from llmkit.bridge.client import BridgeClient
from llmkit.bridge.server import BridgeServer
from llmkit.cluster.pool import ReplicaPool
from llmkit.engine.batch import Batch, StepOutput
from llmkit.errors import EngineDiedError, EngineGoneError
from llmkit.protocol import EmbeddingRequest

POISON = b"poison"


class Fragile(FakeRunner):
    """Fails for good when it has computed a prompt that says so, three tokens into its answer."""

    def execute(self, batch: Batch) -> StepOutput:
        if any(
            bytes(t for t in slot if 0 <= t < 256).startswith(POISON)
            and len(slot) > len(POISON) + 3
            for slot in self.slots
        ):
            self.crash_next = True
        return super().execute(batch)


class Engine:
    """A fake engine, its bridge, and a gateway's connection to it."""

    def __init__(self) -> None:
        self.local = FakeClient("fake", Fragile(step_s=0.002, n_slots=8))
        self.server = BridgeServer(self.local)
        self.client = BridgeClient(self.server.connection)

    def close(self) -> None:
        self.client.close()
        self.server.close()
        self.local.close()


Make = Callable[[int], tuple[ReplicaPool, list[Engine]]]


@pytest.fixture
def fleet() -> Iterator[Make]:
    engines: list[Engine] = []
    pools: list[ReplicaPool] = []

    def make(count: int) -> tuple[ReplicaPool, list[Engine]]:
        engines.extend(Engine() for _ in range(count))
        members = {f"r{i}": engine.client for i, engine in enumerate(engines)}
        pools.append(ReplicaPool("fake", members, rng=random.Random(1)))
        return pools[-1], engines

    yield make
    for pool in pools:
        pool.close()
    for engine in engines:
        engine.close()


def test_what_runs_in_an_engine_that_fails_goes_on_elsewhere(fleet: Make) -> None:
    pool, engines = fleet(2)
    prompts = [f"{i} tales" for i in range(6)]
    whole = [undisturbed(request(prompt=p, max_tokens=90)).text for p in prompts]
    failed: list[Engine] = []
    once = threading.Lock()

    def fail(engine: Engine, batch: Batch) -> None:
        """The first of them, in the middle of an answer."""
        if any(chunk.start > 20 for chunk in batch.chunks) and once.acquire(blocking=False):
            failed.append(engine)
            engine.local.runner.crash_next = True

    for engine in engines:
        engine.local.runner.before = partial(fail, engine)
    streams = [pool.submit(request(p, 90, p)) for p in prompts]
    assert [stream.result(30).text for stream in streams] == whole
    assert pool.num_moves
    (failing,) = failed
    state = failing.client.state
    assert state.is_gone and not state.blameless and "the fake is broken" in str(state.reason)
    assert not failing.server.connection.path.exists()


def test_a_prompt_that_fails_engines_fails_two(fleet: Make) -> None:
    pool, engines = fleet(4)
    prompts = [f"{i} tales" for i in range(4)]
    whole = [undisturbed(request(prompt=p, max_tokens=90)).text for p in prompts]
    streams = [pool.submit(request(p, 90, p)) for p in prompts]
    wait_for(lambda: all(stream.text for stream in streams))
    with pytest.raises(EngineDiedError, match="engines ended"):
        pool.submit(request("killer", 90, POISON.decode())).result(30)
    assert [stream.result(30).text for stream in streams] == whole
    assert sum(engine.client.state.is_gone for engine in engines) in (2, 3)
    with pytest.raises(EngineDiedError, match="refused"):
        pool.submit(request("again", 4, POISON.decode()))


def test_vectors_of_an_engine_that_fails_are_asked_for_elsewhere(fleet: Make) -> None:
    pool, engines = fleet(2)
    one, other = engines

    def fails(_: EmbeddingRequest) -> None:
        raise EngineGoneError("the embedder stopped")

    one.local.embed = fails  # type: ignore[method-assign,assignment]
    for i in range(4):
        assert pool.embed(EmbeddingRequest(f"e{i}", ("ab",))).result(30).num_tokens == (2,)
    assert not other.client.state.is_gone


@pytest.mark.parametrize("fails", [True, False])
def test_a_goodbye_tells_failures_from_unloading(fleet: Make, fails: bool) -> None:
    _, [engine] = fleet(1)
    wait_for(lambda: engine.server.num_peers)
    if fails:
        engine.local.runner.crash_next = True
        with pytest.raises(EngineGoneError, match="broken"):
            engine.local.submit(request("of its own kernel")).result(30)
    else:
        engine.server.close()
    wait_for(lambda: engine.client.state.is_gone)
    assert engine.client.state.blameless is not fails
