"""Replicas as one engine: what is lost at any moment goes on elsewhere, whole."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fakes import FakeClient, wait_for
from mortal import Mortal, request, undisturbed
from pausing import end_stuck, hold, let_go, stuck

from llmkit.cluster.pool import ReplicaPool
from llmkit.errors import (
    ContextLengthError,
    EngineDiedError,
    EngineGoneError,
    InvalidRequestError,
)
from llmkit.protocol import (
    EmbeddingRequest,
    FinishReason,
    Inquiry,
    ListSlots,
    Tokenize,
)


@pytest.fixture
def replicas() -> Iterator[Callable[..., tuple[ReplicaPool, list[Mortal]]]]:
    made: list[Any] = []

    def make(count: int = 2, patience_s: float = 5.0, **options: Any) -> Any:
        members = [Mortal(f"r{i}", **options) for i in range(count)]
        pool = ReplicaPool(
            "fake",
            {m.label: m for m in members},
            rng=random.Random(1),
            patience_s=patience_s,
        )
        made.extend([pool, *members])
        return pool, members

    yield make
    for each in made:
        each.close()
        if isinstance(each, Mortal):
            FakeClient.close(each)


@pytest.mark.parametrize("after", [0, 1, 7, 39])
def test_a_stream_whose_replica_dies_goes_on_elsewhere(replicas: Any, after: int) -> None:
    pool, members = replicas()
    wanted = request(max_tokens=60)
    hold(members, after)
    stream = pool.submit(wanted)
    pieces, text = iter(stream), ""
    while len(text) < after:
        text += next(pieces)
    end_stuck(members)
    text += "".join(pieces)
    whole, done = undisturbed(wanted), stream.result(30)
    assert text == whole.text == done.text
    assert done.tokens == whole.tokens and done.usage.completion_tokens == 60
    assert done.request_id == "x" and done.finish_reason is FinishReason.LENGTH
    assert done.metrics.completion_tokens == 60 and done.metrics.ttft_s > 0


def test_stop_strings_and_held_back_text_survive(replicas: Any) -> None:
    whole = undisturbed(request(max_tokens=60)).text
    stop = whole[20:24]
    pool, members = replicas()
    wanted = request(max_tokens=60, sampling={"stop": (stop,)})
    hold(members, 8)
    stream = pool.submit(wanted)
    pieces = iter(stream)
    text = next(pieces)
    end_stuck(members)
    text += "".join(pieces)
    assert text == whole[: whole.index(stop)] == stream.result(30).text
    assert stream.result(30).stop == stop


def test_all_choices_go_on(replicas: Any) -> None:
    pool, members = replicas()
    wanted = request(max_tokens=50, n=3)
    hold(members, 8)
    streams = pool.submit_choices(wanted)
    assert [s.request_id for s in streams] == ["x-0", "x-1", "x-2"]
    wait_for(lambda: len(streams[0].text) > 3)
    [one] = [m for m in members if m.asked]
    assert one.asked == ["x-0", "x-1", "x-2"], "one replica computes their prompt once"
    end_stuck(members)
    whole = undisturbed(request(max_tokens=50)).text
    assert [s.result(30).text for s in streams] == [whole] * 3


def test_a_prompt_that_kills_engines_kills_two(replicas: Any) -> None:
    pool, members = replicas(4)
    hold(members, 3)
    stream = pool.submit(request())
    for _ in range(2):
        stuck(members).end()
    with pytest.raises(EngineDiedError, match="2 engines ended"):
        stream.result(30)
    alive = [m for m in members if not m.phase.is_gone]
    assert len(alive) == 2 and not any(m.asked for m in alive)
    with pytest.raises(EngineDiedError, match="refused"):
        pool.submit(request("again"))
    let_go(alive)
    assert pool.submit(request("other", prompt="Another")).result(30).usage.completion_tokens == 40


def test_deaths_of_the_same_prompt_elsewhere_count(replicas: Any) -> None:
    pool, members = replicas(4)
    hold(members, 4)
    first = pool.submit(request("a"))
    for _ in range(2):
        stuck(members).end()
    with pytest.raises(EngineDiedError):
        first.result(30)
    second = pool.submit(request("b", prompt="Another"))
    wait_for(lambda: len(second.text) > 2)
    end_stuck(members)
    assert second.result(30).text == undisturbed(request(prompt="Another")).text


def test_a_draining_replica_gets_nothing_new_and_finishes(replicas: Any) -> None:
    pool, members = replicas()
    hold(members, 3)
    running = pool.submit(request("running"))
    one = stuck(members)
    other = next(m for m in members if m is not one)
    let_go([other])
    one.drain()
    more = [pool.submit(request(f"new {i}")) for i in range(6)]
    for stream in more:
        assert stream.result(30).usage.completion_tokens == 40
    assert one.asked[:1] == ["running"] and len(other.asked) >= 6
    let_go([one])
    assert running.result(30).text == undisturbed(request()).text
    assert len([a for a in one.asked if a.startswith("new")]) <= 1, "refused at most once"
    other.drain()
    assert pool.state.phase == "draining"


def test_drained_past_the_grace_is_no_death(replicas: Any) -> None:
    pool, members = replicas(4)
    hold(members, 5)
    stream = pool.submit(request(max_tokens=200))
    for i in range(3):
        wait_for(lambda n=i: len(stream.text) > 3 + 3 * n)
        stuck(members).end(blameless=True)
    let_go(m for m in members if not m.state.is_gone)
    assert stream.result(30).text == undisturbed(request(max_tokens=200)).text
    assert pool.submit(request()).result(30).usage.completion_tokens == 40


def test_without_replicas_a_request_waits_for_one(replicas: Any) -> None:
    pool, [only] = replicas(1, patience_s=60.0)
    hold([only], 8)
    stream = pool.submit(request(max_tokens=60))
    wait_for(lambda: len(stream.text) > 5)
    only.end()
    assert pool.state.phase == "loading" and not stream.finished
    with pytest.raises(EngineGoneError):
        pool.submit(request("new"))
    late = Mortal("late")
    pool.update({"late": late})
    assert stream.result(30).text == undisturbed(request(max_tokens=60)).text
    assert pool.state.phase == "ready"
    FakeClient.close(late)


def test_patience_ends(replicas: Any) -> None:
    pool, [only] = replicas(1, patience_s=0.3)
    hold([only], 4)
    stream = pool.submit(request())
    wait_for(lambda: len(stream.text) > 2)
    only.end()
    with pytest.raises(EngineGoneError, match="none came within"):
        stream.result(30)
    assert pool.state.is_gone and "has ended" in (pool.state.reason or "")


def test_abort_at_any_stage(replicas: Any) -> None:
    pool, members = replicas(2)
    pool.submit(request("at once", max_tokens=200)).close()
    hold(members, 8)
    running = pool.submit(request("running", max_tokens=200))
    wait_for(lambda: len(running.text) > 2)
    running.close()
    assert running.result(30).finish_reason is FinishReason.ABORT
    hold(members, 8)
    moved = pool.submit(request("moved", max_tokens=200))
    wait_for(lambda: len(moved.text) > 2)
    stuck(members).end()
    wait_for(lambda: len(moved.text) > 10)
    moved.close()
    assert moved.result(30).finish_reason is FinishReason.ABORT
    left = next(m for m in members if not m.phase.is_gone)
    hold([left], 4)
    parked = pool.submit(request("parked", max_tokens=200))
    wait_for(lambda: len(parked.text) > 2)
    left.end()
    parked.close()
    assert parked.result(30).finish_reason is FinishReason.ABORT
    wait_for(lambda: all(m.stats().num_running == 0 for m in members))


def test_a_dropped_stream_frees_its_slot(replicas: Any) -> None:
    pool, members = replicas()
    hold(members, 3)
    stream = pool.submit(request(max_tokens=200))
    wait_for(lambda: any(m.stats().num_running for m in members))
    del stream
    wait_for(lambda: all(m.stats().num_running == 0 for m in members))


def test_a_refusal_reaches_the_caller_at_once(replicas: Any) -> None:
    pool, members = replicas()
    with pytest.raises(ContextLengthError):
        pool.submit(request(prompt="x" * 1000))
    with pytest.raises(InvalidRequestError):
        pool.submit(request(prompt=""))
    assert sum(len(m.asked) for m in members) == 2


def test_one_that_cannot_be_resumed_says_so(replicas: Any) -> None:
    pool, members = replicas()
    for member in members:
        member.hides_tokens = True
    hold(members, 4)
    stream = pool.submit(request())
    wait_for(lambda: len(stream.text) > 2)
    end_stuck(members)
    with pytest.raises(EngineGoneError, match="no other can go on"):
        stream.result(30)


def test_questions_and_texts_are_asked_again(replicas: Any) -> None:
    pool, members = replicas(3)
    for member in members[:2]:
        member.silent = True
    futures = [pool.embed(EmbeddingRequest(f"e{i}", ("ab", "c"))) for i in range(1)]
    futures += [pool.inquire(Inquiry("q", Tokenize("hi")))]
    for member in members[:1]:
        if hasattr(member, "kept"):
            member.end()
    for member in members[1:2]:
        member.silent = False
        if hasattr(member, "kept"):
            member.silent = True
            member.end(blameless=True)
    assert futures[0].result(30).num_tokens == (2, 1)
    assert futures[1].result(30).tokens == (104, 105)
    assert pool.inquire(Inquiry("s", ListSlots())).result(30) == ()
    with pytest.raises(InvalidRequestError):
        pool.embed(EmbeddingRequest("bad", ("",)))


def test_counters_never_fall(replicas: Any) -> None:
    pool, members = replicas()
    for i in range(4):
        pool.submit(request(f"{i}", prompt=f"{i} times")).result(30)
    before = pool.stats()
    assert before.requests_total == 4 and before.num_slots == 16
    assert pool.description.n_slots == 16
    pool.update({members[0].label: members[0]})
    after = pool.stats()
    assert after.requests_total == 4 and after.generation_tokens_total == 160
    assert after.num_slots == 8 and members[1].phase.is_gone


def test_a_member_that_vanishes_counts_as_dead_unless_it_said_so(replicas: Any) -> None:
    pool, members = replicas(4)
    hold(members, 3)
    stream = pool.submit(request(max_tokens=150))
    names = {m.label: m for m in members}
    for _ in range(2):
        one = stuck(members)
        del names[one.label]
        one.close = one.end  # type: ignore[method-assign]  # its connection is closed
        pool.update(names)
    with pytest.raises(EngineDiedError):
        stream.result(30)


@pytest.mark.parametrize("seed", range(4))
def test_races(replicas: Any, seed: int) -> None:
    """Streams from many threads while replicas die, drain, leave and join: each is whole, or fails
    because two of its replicas died."""
    rng = random.Random(seed)
    pool, members = replicas(4, step_s=0.001)
    names = {m.label: m for m in members}
    results: list[tuple[str, Any]] = []
    expected = {i: undisturbed(request(prompt=f"{i} tales", max_tokens=80)).text for i in range(5)}

    def ask(number: int) -> None:
        for turn in range(4):
            wanted = request(f"{number}.{turn}", 80, f"{turn + number % 2} tales")
            try:
                stream = pool.submit(wanted)
                if (number + turn) % 5 == 4:
                    time.sleep(0.005)
                    stream.close()
                    stream.wait(30)
                    continue
                text = "".join(stream)
            except EngineDiedError as error:
                results.append((expected[turn + number % 2], error))
            else:
                results.append((expected[turn + number % 2], text))

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    count = 4
    while any(t.is_alive() for t in threads) and count < 14:
        time.sleep(rng.uniform(0.01, 0.05))
        fresh = Mortal(f"r{count}", step_s=0.001)
        count += 1
        members.append(fresh)
        names[fresh.label] = fresh
        pool.update(dict(names))
        victim = names[rng.choice(list(names)[:-1])]
        match rng.randrange(3):
            case 0:
                victim.end()
            case 1:
                victim.drain()
                time.sleep(0.01)
                victim.end(blameless=True)
            case 2:
                victim.drain()
        del names[victim.label]
        pool.update(dict(names))
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    for whole, got in results:
        assert isinstance(got, EngineDiedError) or got == whole
    assert sum(isinstance(got, str) for _, got in results) >= len(results) // 2
    wait_for(lambda: not pool._relays and not pool._parked)
    wait_for(lambda: all(m.num_requests == 0 for m in pool.members))
    assert not pool._roster._suspected
    for member in members:
        FakeClient.close(member)
