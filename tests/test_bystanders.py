"""Nobody can hurt a neighbour: a stream beside a hostile caller keeps its tokens, its share of steps, its gaps and its text.

On the fake model, exactly; then on the real one.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from fakes import FakeClient, FakeRunner, ask, wait_for

from llmkit.bridge.client import BridgeClient
from llmkit.bridge.server import BridgeServer
from llmkit.engine.admission import Admission
from llmkit.engine.backlog import Backlog
from llmkit.engine.detokenize import Detokenizer
from llmkit.engine.request import Request
from llmkit.errors import ContextLengthError, InvalidRequestError, QueueFullError
from llmkit.lanes import Lanes
from llmkit.local import LocalEngine
from llmkit.stream import Channel, Stream
from llmkit.types import EmbeddingRequest, GenerationRequest, Grammar, Message, SamplingParams


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


def steps_of(runner: FakeRunner, slot: int) -> tuple[int, int]:
    """Steps in which a slot had a token, and all steps from its first to its last."""
    places = [i for i, batch in enumerate(runner.batches) if any(c.slot == slot for c in batch.chunks)]
    return len(places), places[-1] - places[0] + 1


DEEDS: dict[str, Callable[[FakeClient], object]] = {
    "cancels long prompts": lambda client: client.submit(ask("b" * 4000, caller="eve")).close(),
    "asks for many choices": lambda client: _try(lambda: [s.close() for s in client.submit_choices(_choices(64))]),
    "fills the queue": lambda client: _try(lambda: client.submit(ask("f" * 50, max_tokens=50, caller="eve"))),
    "asks for what is refused": lambda client: _try(lambda: client.submit(ask("x" * 9999, caller="eve"))),
    "never reads": lambda client: client.submit(ask("n", max_tokens=200, caller="eve")).channel,
}


def _choices(n: int) -> GenerationRequest:
    return GenerationRequest(f"many{time.monotonic_ns()}", SamplingParams(temperature=0, max_tokens=5), prompt="many", caller="eve", n=n)


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
        assert mine.result(60).text.encode() == runner.reference(b"bystander", 150)
    with_token, steps = steps_of(runner, 0)
    assert with_token == steps, "it had a token in every step"
    assert runner.num_interrupted == 0
    for request in list(client.engine._scheduler.running):
        client.abort(request.request_id)
    client.close()


def test_whoever_comes_new_gets_a_slot_of_one_who_has_many() -> None:
    """Four slots full of one caller's endless streams, and a hundred more of them waiting: a newcomer does not wait for their end."""
    client = FakeClient(runner=FakeRunner(n_slots=4, n_ctx=100_000, step_s=0.002, host_tokens=10_000), max_waiting=100)
    greedy = [client.submit(ask(f"g{i}", max_tokens=50_000, caller="eve")) for i in range(4)]
    wait_for(lambda: client.stats().num_running == 4)
    greedy += [client.submit(ask(f"w{i}", max_tokens=50_000, caller="eve")) for i in range(100)]
    with pytest.raises(QueueFullError):
        client.submit(ask("one more", caller="eve"))
    mine = client.submit(ask("mine", max_tokens=20, caller="ann"))
    assert mine.result(20).text.encode() == client.runner.reference(b"mine", 20)
    refused = [s for s in greedy if s.finished]
    assert len(refused) == 1 and isinstance(refused[0].failure, QueueFullError), "its newest made way in the queue"
    assert client.stats().preemptions_total >= 1
    again = [client.submit(ask(f"two {i}", max_tokens=5, caller="bob")) for i in range(3)]
    assert all(s.result(20).usage.completion_tokens == 5 for s in again)
    client.close()


def test_a_callers_only_slot_is_its_own() -> None:
    client = FakeClient(runner=FakeRunner(n_slots=2, n_ctx=100_000, step_s=0.001))
    first, second = (client.submit(ask(name, max_tokens=400, caller=name)) for name in ("ann", "bob"))
    wait_for(lambda: client.stats().num_running == 2)
    third = client.submit(ask("eve", max_tokens=5, caller="eve"))
    assert first.result(30).text.encode() == client.runner.reference(b"ann", 400) and second.result(30)
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


def test_old_service_fades_and_an_idle_engine_forgets_it() -> None:
    now = [0.0]
    backlog = Backlog(clock=lambda: now[0])
    ids = iter(range(10_000))

    def add(caller: str) -> Request:
        request = Request([1], SamplingParams(), 1, Detokenizer(lambda _: b""), Channel(f"r{next(ids)}", lambda _: None), caller=caller)
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
    assert backlog.first(lambda _: True) is mine, "a quarter of an hour later nobody pays for that any more"


# -- the pool between bridge and engine


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
    last.result(5)
    wait_for(lambda: len(order) == 7)
    assert [o for o in order if o[0] == "e"] == [f"eve{i}" for i in range(5)] and order.index("ann1") <= 4
    failing = lanes.submit("ann", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        failing.result(5)
    waits = lanes.submit("ann", lambda: None)
    waits.result(5)
    lanes.close()
    with pytest.raises(RuntimeError):
        lanes.submit("ann", lambda: None)


class Slow(FakeClient):
    """Takes long to read some requests, as a tokenizer does."""

    num_read = 0

    def submit(self, request: GenerationRequest) -> Stream:
        self.num_read += 1
        if request.caller == "eve":
            time.sleep(0.5)
        return super().submit(request)


def test_a_request_that_takes_long_to_read_holds_up_its_caller_only() -> None:
    client = Slow(runner=FakeRunner(n_ctx=50_000, step_s=0.002))
    server = BridgeServer(client)
    remote = BridgeClient(server.connection)
    mine = remote.submit(ask("ann", max_tokens=2000, caller="ann"))
    wait_for(lambda: mine.text)
    hostile = [remote.submit(ask("eve", max_tokens=1, caller="eve")) for _ in range(20)]
    gaps, last = [], time.monotonic()
    for _ in mine:
        gaps.append(time.monotonic() - last)
        last = time.monotonic()
        if len(gaps) > 300:
            break
    assert max(gaps) < 0.45, "less than what reading one of the other's requests takes"
    assert remote.submit(ask("more", max_tokens=1, caller="ann")).result(5)
    for stream in hostile:
        stream.close()
    assert all(s.wait(20) is not None for s in hostile)
    assert client.num_read < 10, "an abort that has come skips its work"
    remote.close()
    server.close()
    client.close()


def test_a_prompt_travels_once_whatever_n_is(fake: FakeClient) -> None:
    server = BridgeServer(fake)
    remote = BridgeClient(server.connection)
    request = GenerationRequest("r", SamplingParams(temperature=0, max_tokens=4, seed=3), prompt="many", n=5)
    streams = remote.submit_choices(request)
    assert [s.request_id for s in streams] == [f"r-{i}" for i in range(5)]
    assert [s.result(5).text.encode() for s in streams] == [fake.runner.reference(b"many", 4)] * 5
    assert [c.sampling.seed for c in request.choices()] == [3, 4, 5, 6, 7]
    refused = remote.submit_choices(GenerationRequest("bad", SamplingParams(), prompt="", n=128))
    for stream in refused:
        with pytest.raises(InvalidRequestError):
            stream.result(5)
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


# -- the real model


@pytest.fixture(scope="module")
def real() -> Iterator[LocalEngine]:
    local = LocalEngine("smollm2", n_ctx=2048, n_slots=4, max_waiting=64)
    yield local
    local.close()


def bystander(engine: LocalEngine, deed: Callable[[], object], pause: float, tokens: int = 60) -> tuple[str, str, float]:
    """The text of a stream alone, the same beside the deed, and how many steps of the engine the stream was in, of those that computed anything."""
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    alone = engine.submit(GenerationRequest(f"alone{time.monotonic_ns()}", params, prompt="Once upon a time", caller="ann")).result(60).text
    stream = engine.submit(GenerationRequest(f"beside{time.monotonic_ns()}", params, prompt="Once upon a time", caller="ann"))
    wait_for(lambda: stream.text)
    before = engine.stats()
    with repeating(deed, pause):
        text = stream.result(120).text
    made, steps = tokens, engine.stats().steps_total - before.steps_total
    return alone, text, made / max(steps, 1)


@pytest.mark.model
def test_cancelled_prompts_cost_the_real_stream_nothing_but_time(real: LocalEngine) -> None:
    words = "the quick brown fox jumps over the lazy dog " * 150

    def typed() -> None:
        prompt = f"{time.monotonic_ns()} {words}"
        real.submit(GenerationRequest(f"c{time.monotonic_ns()}", SamplingParams(max_tokens=5), prompt=prompt, caller="eve")).close()

    alone, text, share = bystander(real, typed, 0.1)
    assert text[:20] == alone[:20] and share > 0.8, "a token in nearly every step"


@pytest.mark.model
@pytest.mark.parametrize(
    "grammar",
    [
        Grammar("gbnf", "root ::= (" + " | ".join(f'"w{i:05}" [a-z]' for i in range(1500)) + ")+"),
        Grammar("regex", "(" + "|".join(f"[a-z]{{1,{i % 7 + 1}}}{i}" for i in range(600)) + "){1,40}"),
        Grammar("gbnf", 'root ::= (a | b)+\na ::= [a-z]* a? "x" | "y"\nb ::= a a | [a-f]+ b? "z"'),
    ],
    ids=["cases", "regex", "ambiguous"],
)
def test_a_heavy_grammar_waits_for_itself_alone(real: LocalEngine, grammar: Grammar) -> None:
    def deed() -> None:
        params = SamplingParams(temperature=1.0, max_tokens=20, grammar=grammar)
        try:
            real.submit(GenerationRequest(f"g{time.monotonic_ns()}", params, prompt="Say:", caller="eve")).wait(0.5)
        except (InvalidRequestError, QueueFullError):
            pass

    alone, text, share = bystander(real, deed, 0.02)
    assert text[:20] == alone[:20] and share > 0.5


@pytest.mark.model
def test_samplers_are_made_off_the_engine_thread(real: LocalEngine) -> None:
    breakers = tuple("abcdefghijklmnop")
    request = GenerationRequest("dry", SamplingParams(max_tokens=1, dry_multiplier=1.0, dry_sequence_breakers=breakers), prompt="Hi", caller="eve", n=60)
    engine_thread = real._engine._thread
    made: list[threading.Thread] = []
    build = real._runner.sampler

    def note(*args: Any) -> Any:
        made.append(threading.current_thread())
        return build(*args)

    real._runner.sampler = note  # type: ignore[method-assign]
    try:
        assert all(s.result(60).usage.completion_tokens == 1 for s in real.submit_choices(request))
    finally:
        real._runner.sampler = build  # type: ignore[method-assign]
    assert len(made) == 60 and engine_thread not in made
    assert len(real._runner._chains._known) == 1, "llama.cpp looks through the vocabulary once"


@pytest.mark.model
def test_a_grammar_that_works_elsewhere_gives_the_same_text(real: LocalEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if every call of it took long: the request sits steps out, and what comes of it is what came before."""
    fields = {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer"}}
    schema = Grammar("json_schema", json.dumps({"type": "object", "properties": fields, "required": list(fields)}))

    def made(temperature: float) -> str:
        params = SamplingParams(temperature=temperature, seed=11, max_tokens=60, grammar=schema, speculate=False)
        return real.submit(GenerationRequest(f"e{time.monotonic_ns()}", params, prompt="A person as JSON: ")).result(60).text

    before = [made(0.0), made(0.9)]
    monkeypatch.setattr("llmkit.backend.grammar.SLOW_S", -1.0)
    monkeypatch.setattr("llmkit.backend.llama.MASK_GRACE_S", 0.0)
    assert [json.loads(made(0.0)).keys(), json.loads(made(0.9)).keys()] == [{"name", "age"}] * 2
    assert before[0] == made(0.0)


@pytest.mark.model
def test_what_others_asked_is_not_told_by_counts(real: LocalEngine) -> None:
    prompt = "My code is 493175. " * 12

    def cached(caller: str, **more: Any) -> int:
        params = SamplingParams(temperature=0, max_tokens=1)
        return real.submit(GenerationRequest(f"p{time.monotonic_ns()}", params, prompt=prompt, caller=caller, **more)).result(30).usage.cached_tokens

    assert cached("victim") == 0 and cached("victim") > 50
    assert cached("eve") == 0, "another caller's prefix is not counted, nor used"
    assert cached("eve", cache_scope="victim") > 50, "who is given another's scope shares it"
    assert cached("a", cache_salt="s") == 0 and cached("b", cache_salt="s") == 0


@pytest.mark.model
def test_embeddings_are_fair_bounded_counted_and_can_be_aborted() -> None:
    import llmkit
    from llmkit.embedding import LocalEmbedder

    with llmkit.load("minilm", share=False) as llm:
        embedder = llm.engine
        assert isinstance(embedder, LocalEmbedder)
        book = embedder.embed(EmbeddingRequest("book", tuple(f"page {i} of a long book, with many words on it" for i in range(4000)), caller="eve"))
        wait_for(lambda: embedder.stats().num_running == 1)
        assert embedder.embed(EmbeddingRequest("one", ("hello",), caller="ann")).result(20).num_tokens == (3,)
        assert not book.done(), "one text does not wait for a book"
        embedder.abort("book")
        with pytest.raises(llmkit.EngineError, match="aborted"):
            book.result(20)
        wait_for(lambda: embedder.stats().num_running == 0)
        assert len(embedder._admission) == 0
    with llmkit.load("minilm", share=False, max_waiting=3, name="small") as llm:
        books = [llm.engine.embed(EmbeddingRequest(f"b{i}", ("some words " * 60,) * 60, caller="eve")) for i in range(3)]
        with pytest.raises(QueueFullError):
            llm.engine.embed(EmbeddingRequest("b4", ("x",), caller="eve"))
        assert llm.engine.embed(EmbeddingRequest("mine", ("hello",), caller="ann")).result(30), "another caller's place is its own"
        assert sum(isinstance(b.exception(60), QueueFullError) for b in books) <= 1
