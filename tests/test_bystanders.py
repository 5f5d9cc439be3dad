"""Nobody can hurt a neighbour: a stream beside a hostile caller keeps its tokens, its share of
steps, its gaps and its text. On the fake model, exactly."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from fake_runner import FakeRunner
from fakes import FakeClient, ask, wait_for

from llmkit.bridge.client import BridgeClient
from llmkit.bridge.server import BridgeServer
from llmkit.engine.admission import Admission
from llmkit.engine.backlog import Backlog
from llmkit.engine.batch import Batch
from llmkit.engine.detokenize import Detokenizer
from llmkit.engine.request import Request
from llmkit.errors import ContextLengthError, InvalidRequestError, QueueFullError
from llmkit.protocol import GenerationRequest, Message, SamplingParams
from llmkit.protocol.stream import Channel, Stream
from llmkit.system.lanes import Lanes


@contextmanager
def repeating(deed: Callable[[], object], pause: float = 0.01) -> Iterator[threading.Event]:
    """Do something over and over on another thread."""
    over = threading.Event()

    def run() -> None:
        while not over.is_set():
            deed()
            over.wait(pause)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield over
    finally:
        over.set()
        thread.join(30)


def steps_from(first: Batch, last: Batch, runner: FakeRunner) -> int:
    """How many there are between two, and with them."""
    one, other = (
        next(i for i, batch in enumerate(runner.batches) if batch is step) for step in (first, last)
    )
    return other - one + 1


DEEDS: dict[str, Callable[[FakeClient], object]] = {
    "cancels long prompts": lambda client: client.submit(ask("b" * 4000, caller="eve")).close(),
    "asks for many choices": lambda client: _try(
        lambda: [s.close() for s in client.submit_choices(_choices(64))]
    ),
    "fills the queue": lambda client: _try(
        lambda: client.submit(ask("f" * 50, max_tokens=50, caller="eve"))
    ),
    "asks for what is refused": lambda client: _try(
        lambda: client.submit(ask("x" * 9999, caller="eve"))
    ),
    "never reads": lambda client: client.submit(ask("n", max_tokens=200, caller="eve")).channel,
}


def _choices(n: int) -> GenerationRequest:
    return GenerationRequest(
        f"many{time.monotonic_ns()}",
        SamplingParams(temperature=0, max_tokens=5),
        prompt="many",
        caller="eve",
        n=n,
    )


def _try(deed: Callable[[], object]) -> None:
    try:
        deed()
    except (QueueFullError, ContextLengthError):
        pass


@pytest.mark.parametrize("deed", DEEDS)
def test_a_stream_beside_a_hostile_neighbour(deed: str) -> None:
    runner = FakeRunner(n_slots=4, n_ctx=5000, max_batch_tokens=2000, step_s=0.004)
    client = FakeClient(runner=runner, max_waiting=64)
    mine = client.submit(ask("bystander", max_tokens=150, caller="ann"))
    wait_for(lambda: mine.text)
    with repeating(lambda: DEEDS[deed](client), 0.003):
        assert mine.result(300).text.encode() == runner.reference(b"bystander", 150)
    steps = runner.of_first(0)  # others may have its slot after it
    assert len(steps) == steps_from(steps[0], steps[-1], runner), "it had a token in every step"
    assert not any(step is batch for step in steps for batch in runner.interrupted)
    for request in list(client.engine._scheduler.running):
        client.abort(request.request_id)
    client.close()


def test_whoever_comes_new_gets_a_slot_of_one_who_has_many() -> None:
    """Four slots full of one caller's endless streams, and a hundred more of them waiting: a
    newcomer does not wait for their end."""
    client = FakeClient(
        runner=FakeRunner(n_slots=4, n_ctx=100_000, step_s=0.002, host_tokens=10_000),
        max_waiting=100,
    )
    greedy = [client.submit(ask(f"g{i}", max_tokens=50_000, caller="eve")) for i in range(4)]
    wait_for(lambda: client.stats().num_running == 4)
    greedy += [client.submit(ask(f"w{i}", max_tokens=50_000, caller="eve")) for i in range(100)]
    with pytest.raises(QueueFullError):
        client.submit(ask("one more", caller="eve"))
    mine = client.submit(ask("mine", max_tokens=20, caller="ann"))
    assert mine.result(30).text.encode() == client.runner.reference(b"mine", 20)
    refused = [s for s in greedy if s.finished]
    assert len(refused) == 1 and isinstance(refused[0].failure, QueueFullError), (
        "its newest made way in the queue"
    )
    assert client.stats().preemptions_total >= 1
    again = [client.submit(ask(f"two {i}", max_tokens=5, caller="bob")) for i in range(3)]
    assert all(s.result(30).usage.completion_tokens == 5 for s in again)
    client.close()


def test_a_callers_only_slot_is_its_own() -> None:
    client = FakeClient(runner=FakeRunner(n_slots=2, n_ctx=100_000, step_s=0.001))
    first, second = (
        client.submit(ask(name, max_tokens=400, caller=name)) for name in ("ann", "bob")
    )
    wait_for(lambda: first.text and second.text)
    third = client.submit(ask("eve", max_tokens=5, caller="eve"))
    assert first.result(30).text.encode() == client.runner.reference(b"ann", 400) and second.result(
        30
    )
    assert third.result(30) and client.stats().preemptions_total == 0
    client.close()


def test_the_queue_is_shared_and_its_bound_is_exact() -> None:
    door = Admission(8)
    assert door.enter("eve", 8) == [] and len(door) == 8
    with pytest.raises(QueueFullError):
        door.enter("eve")
    assert door.enter("ann", 3) == ["eve"] * 3 and len(door) == 8
    with pytest.raises(QueueFullError):
        door.enter("ann", 3)  # it would have more than the other
    assert len(door) == 8 and door.owes("eve")
    for _ in range(3):
        door.leave("eve")
    assert not door.owes("eve") and len(door) == 8, "these places were given away already"
    for name, count in (("eve", 5), ("ann", 3)):
        for _ in range(count):
            door.leave(name)
    assert len(door) == 0


def test_a_request_that_ends_in_the_middle_of_a_count_is_counted() -> None:
    """The garbage collector ends abandoned requests on any thread, at any moment."""
    door = Admission(4)
    door.enter("eve", 3)

    class Interrupted(str):
        def __hash__(self) -> int:
            if leaving:
                door.leave(leaving.pop())
            return super().__hash__()

    leaving = ["eve", "eve"]
    thread = threading.Thread(target=door.enter, args=(Interrupted("eve"),), daemon=True)
    thread.start()
    thread.join(30)
    assert not thread.is_alive() and len(door) == 2
    for _ in range(2):
        door.leave("eve")
    assert len(door) == 0 and door.enter("ann", 4) == []


def test_old_service_fades_and_an_idle_engine_forgets_it() -> None:
    now = [0.0]
    backlog = Backlog(clock=lambda: now[0])
    ids = iter(range(10_000))

    def add(caller: str) -> Request:
        request = Request(
            [1],
            SamplingParams(),
            1,
            Detokenizer(lambda _: b""),
            Channel(f"r{next(ids)}", lambda _: None),
            caller=caller,
        )
        backlog.add(request)
        return request

    def end(request: Request) -> None:
        backlog.remove(request)
        backlog.leave(request)

    morning = add("ann")
    backlog.charge(morning, num_prompt=500_000)
    end(morning)
    many = [add("bob") for _ in range(200)]
    mine = add("ann")
    backlog.charge(many[0], num_prompt=10)
    assert backlog.first(lambda _: True) is mine, "nobody was at work: all are level"
    backlog.charge(mine, num_prompt=100_000)
    end(mine)
    mine = add("ann")
    assert backlog.first(lambda _: True) is many[0], "it has had its share, and more, a moment ago"
    now[0] += 900
    backlog.first(lambda _: True)
    backlog.charge(many[0], num_prompt=100)
    assert backlog.first(lambda _: True) is mine, (
        "a quarter of an hour later nobody pays for that any more"
    )


def test_lanes_keep_a_callers_order_and_everybodys_turn() -> None:
    lanes = Lanes(1, "test-lanes")
    held, order = threading.Event(), []
    lanes.submit("eve", held.wait)
    for i in range(5):
        lanes.submit("eve", lambda i=i: order.append(f"eve{i}"))  # type: ignore[misc]
    last = [lanes.submit("ann", lambda i=i: order.append(f"ann{i}")) for i in range(2)][-1]  # type: ignore[misc]
    gone = lanes.submit("bob", lambda: order.append("bob"))
    assert gone.cancel()
    held.set()
    last.result(30)
    wait_for(lambda: len(order) == 7)
    assert [o for o in order if o[0] == "e"] == [f"eve{i}" for i in range(5)] and order.index(
        "ann1"
    ) <= 4
    failing = lanes.submit("ann", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        failing.result(30)
    waits = lanes.submit("ann", lambda: None)
    waits.result(30)
    lanes.close()
    with pytest.raises(RuntimeError):
        lanes.submit("ann", lambda: None)


class Slow(FakeClient):
    """Takes long to read some requests, as a tokenizer does: until ``goes_on`` is set."""

    num_read = 0

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.goes_on = threading.Event()

    def submit(self, request: GenerationRequest) -> Stream:
        self.num_read += 1
        if request.caller == "eve":
            assert self.goes_on.wait(60)
        return super().submit(request)


def test_a_request_that_takes_long_to_read_holds_up_its_caller_only() -> None:
    client = Slow(runner=FakeRunner(n_ctx=50_000, step_s=0.002))
    server = BridgeServer(client)
    remote = BridgeClient(server.connection)
    mine = remote.submit(ask("ann", max_tokens=40_000, caller="ann"))
    wait_for(lambda: mine.text)
    hostile = [remote.submit(ask("eve", max_tokens=1, caller="eve")) for _ in range(20)]
    wait_for(lambda: client.num_read == 2)  # hers, and one of the other's
    seen = len(mine.text)
    wait_for(lambda: len(mine.text) > seen + 300)
    assert remote.submit(ask("more", max_tokens=1, caller="ann")).result(30)
    for stream in hostile:
        stream.close()
    wait_for(lambda: sum(len(peer.preparing) for peer in [*server._peers.values()]) == 1)
    client.goes_on.set()
    assert all(s.wait(30) is not None for s in hostile)
    assert client.num_read == 3, "an abort that has come skips its work"
    mine.close()
    remote.close()
    server.close()
    client.close()


def test_a_prompt_travels_once_whatever_n_is(fake: FakeClient) -> None:
    server = BridgeServer(fake)
    remote = BridgeClient(server.connection)
    request = GenerationRequest(
        "r", SamplingParams(temperature=0, max_tokens=4, seed=3), prompt="many", n=5
    )
    streams = remote.submit_choices(request)
    assert [s.request_id for s in streams] == [f"r-{i}" for i in range(5)]
    assert [s.result(30).text.encode() for s in streams] == [fake.runner.reference(b"many", 4)] * 5
    assert [c.sampling.seed for c in request.choices()] == [3, 4, 5, 6, 7]
    refused = remote.submit_choices(GenerationRequest("bad", SamplingParams(), prompt="", n=128))
    for stream in refused:
        with pytest.raises(InvalidRequestError):
            stream.result(30)
    remote.close()
    server.close()


def test_too_many_messages_do_not_travel(fake: FakeClient) -> None:
    server = BridgeServer(fake)
    remote = BridgeClient(server.connection)
    empty = tuple(Message("user", "") for _ in range(30_000))
    with pytest.raises(ContextLengthError):
        remote.submit(GenerationRequest("r", messages=empty, n=128))
    remote.close()
    server.close()
