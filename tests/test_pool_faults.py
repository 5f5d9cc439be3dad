"""Faults of replicas that are nobody's, somebody's or everybody's: who is blamed, who goes on."""

from __future__ import annotations

import itertools
import random
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fake_runner import FakeRunner
from fakes import FakeClient, wait_for
from mortal import Mortal, request, undisturbed
from pausing import FOREVER, end_stuck, hold, let_go, stuck

from llmkit.bridge import wire
from llmkit.bridge.client import BridgeClient
from llmkit.cluster.blame import Suspect, blame
from llmkit.cluster.breaker import MAX_FAILURES, MAX_S, Breaker
from llmkit.cluster.pool import ReplicaPool
from llmkit.engine.batch import Batch, StepOutput
from llmkit.errors import EngineDiedError, EngineError, EngineGoneError, QueueFullError
from llmkit.protocol import (
    EmbeddingRequest,
    FinishReason,
    GenerationRequest,
    Inquiry,
    ListRequests,
    ListSlots,
    ListSteps,
    RunningRequest,
    SlotContent,
    Step,
    StepChunk,
    Tokenize,
)
from llmkit.protocol.speech import Hearing
from llmkit.protocol.stream import Channel, Stream

Make = Callable[..., tuple[ReplicaPool, list[Mortal]]]


@pytest.fixture
def replicas() -> Iterator[Make]:
    made: list[Any] = []

    def make(count: int = 2, **options: Any) -> Any:
        members = [Mortal(f"r{i}", **options) for i in range(count)]
        pool = ReplicaPool("fake", {m.label: m for m in members}, rng=random.Random(1))
        made.extend([pool, *members])
        return pool, members

    yield make
    for each in made:
        each.close()
        if isinstance(each, Mortal):
            FakeClient.close(each)


class Poisoned(Mortal):
    """Dies of a prompt that says so, a few tokens into its answer."""

    def submit(self, request: GenerationRequest) -> Stream:
        stream = super().submit(request)
        if request.prompt == "poison":
            self.runner.execute = lambda batch: self._compute(batch, stream.channel)  # type: ignore[method-assign]
            threading.Thread(target=self._die, args=(stream.channel,)).start()
        return stream

    def _compute(self, batch: Batch, channel: Channel) -> StepOutput:
        """It computes no more than it can die of."""
        if len(channel.text_parts) > 3:
            self.runner.step_s = FOREVER
        return FakeRunner.execute(self.runner, batch)

    def _die(self, channel: Channel) -> None:
        wait_for(lambda: len(channel.text_parts) > 3)
        self.end()


def test_blame_is_for_who_was_alone() -> None:
    poison, one, other = (Suspect(name) for name in ("poison", "one", "other"))
    assert blame([poison, one, other]) == []
    assert blame([poison, one]) == [] and poison.goes_apart and not other.goes_apart
    assert blame([poison, other]) == [poison] and poison.is_guilty and not other.is_guilty
    same = [Suspect("same"), Suspect("same")]
    assert blame(same) == [] and blame(same) == same, "one prompt of two callers"


@pytest.mark.parametrize("count", [2, 5])
def test_bystanders_survive_a_prompt_that_kills(count: int) -> None:
    """With few replicas too, where each that died is started again."""
    members = [Poisoned(f"r{i}") for i in range(count)]
    there = {m.label: m for m in members}
    pool = ReplicaPool("fake", there, rng=random.Random(1))
    prompts = [f"{i} tales" for i in range(6)]
    whole = [undisturbed(request(prompt=p, max_tokens=90)).text for p in prompts]
    streams = [pool.submit(request(p, 90, p)) for p in prompts]
    wait_for(lambda: all(s.text for s in streams))
    killer = pool.submit(request("killer", 90, "poison"))

    def started_again() -> bool:
        for label in [label for label, m in there.items() if m.phase.is_gone]:
            del there[label]
            members.append(Poisoned(f"r{len(members)}"))
            there[members[-1].label] = members[-1]
            pool.update(dict(there))
        return killer.finished and all(s.finished for s in streams)

    wait_for(started_again)
    with pytest.raises(EngineDiedError, match="engines ended"):
        killer.result(30)
    assert [s.result(30).text for s in streams] == whole
    assert sum(m.phase.is_gone for m in members) in (2, 3)
    with pytest.raises(EngineDiedError, match="refused"):
        pool.submit(request("again", 4, "poison"))
    assert pool.submit(request("fine", 4, prompts[0])).result(30)
    pool.close()
    for member in members:
        FakeClient.close(member)


def test_a_full_replica_is_passed_by(replicas: Make) -> None:
    pool, members = replicas(3)
    refusal = QueueFullError("1024 requests wait")

    def full() -> None:
        raise refusal

    members[0].on_submit = members[1].on_submit = full
    for i in range(4):
        stream = pool.submit(request(f"{i}", prompt=f"{i} tales"))
        assert stream.result(30).usage.completion_tokens == 40
    for member in members:
        member.on_submit = full
    with pytest.raises(QueueFullError):
        pool.submit(request("no room", prompt="none"))
    assert all(m.num_requests == 0 for m in pool.members)


def test_a_replica_that_is_full_when_asked_later(replicas: Make) -> None:
    """Over a bridge the refusal comes by the stream."""
    pool, members = replicas(2)
    members[0].refuses = members[1].refuses = QueueFullError("1024 requests wait")
    with pytest.raises(QueueFullError):
        pool.submit(request("a")).result(30)
    asked = [len(m.asked) for m in members]
    assert asked == [1, 1], "each was tried once"
    members[1].refuses = None
    assert pool.submit(request("b")).result(30).usage.completion_tokens == 40


def test_what_was_admitted_once_waits_for_room(replicas: Make) -> None:
    pool, members = replicas(2)
    hold(members, 5)
    stream = pool.submit(request(max_tokens=80))
    one = stuck(members)
    other = next(m for m in members if m is not one)
    let_go([other])
    other.refuses = QueueFullError("1024 requests wait")
    wait_for(lambda: len(stream.text) > 3)
    one.end()
    wait_for(lambda: len(other.asked) >= 2)
    assert not stream.finished
    other.refuses = None
    assert stream.result(30).text == undisturbed(request(max_tokens=80)).text


def test_one_that_fails_at_once_does_not_get_all(replicas: Make) -> None:
    pool, members = replicas(2)
    members[0].refuses = EngineError("the device is lost")
    results = []
    for i in range(30):
        stream = pool.submit(request(f"{i}", 4, f"{i} tales"))
        results.append(stream.wait(30))
        assert results[-1] is not None
    failed = [r for r in results if r is not None and r.finish_reason is FinishReason.ERROR]
    assert 0 < len(failed) <= 5 and len(members[0].asked) == len(failed)
    members[0].refuses = None
    numbers = itertools.count()

    def is_used_again() -> bool:
        many = [pool.submit(request(f"x{i}", 9, f"{i} more")) for i in itertools.islice(numbers, 8)]
        assert all(stream.result(30) for stream in many)
        return len(members[0].asked) > len(failed)

    wait_for(is_used_again)


def test_vectors_say_that_a_replica_works_and_questions_say_nothing(replicas: Make) -> None:
    pool, [only] = replicas(1)
    [member] = pool.members
    breaker = member.breaker

    def fails() -> None:
        raise EngineError("the device is lost")

    def embed() -> Any:
        return pool.embed(EmbeddingRequest("e", ("ab",))).result(30)

    for _ in range(2 * MAX_FAILURES):  # now and then, in its whole life
        only.on_ask = fails
        with pytest.raises(EngineError, match="device"):
            embed()
        with pytest.raises(EngineError, match="device"):
            pool.inquire(Inquiry("q", Tokenize("a")))
        only.on_ask = lambda: None
        assert embed() and not breaker.is_tripped
    for _ in range(MAX_FAILURES):
        breaker.failed(0.0)
    assert pool.inquire(Inquiry("q", Tokenize("a"))).result(30) and breaker.is_tripped
    assert embed() and not breaker.is_tripped


def test_a_breaker_waits_longer_each_time() -> None:
    breaker, now = Breaker(), 0.0
    waits = []
    for _ in range(3):
        breaker.failed(now)
    for _ in range(8):
        breaker.failed(now)  # those from before change nothing
        start = now
        while not breaker.allows(now):
            now += 0.5
        waits.append(now - start)
        breaker.taken(now)
        assert not breaker.allows(now), "one at a time"
        breaker.undecided()
        assert breaker.allows(now)
        breaker.taken(now)
        breaker.failed(now)
    assert waits[:4] == [1, 2, 4, 8] and max(waits) == MAX_S
    breaker.succeeded()
    assert breaker.allows(now)


def test_the_last_one_is_used_whatever_it_does(replicas: Make) -> None:
    pool, [only] = replicas(1)
    only.refuses = EngineError("the device is lost")
    for i in range(6):
        with pytest.raises(EngineError, match="device"):
            pool.submit(request(f"{i}", 4)).result(30)
    only.refuses = None
    assert pool.submit(request("x", 4)).result(30)


def test_a_refused_prompt_is_not_taken_for_held(replicas: Make) -> None:
    pool, _ = replicas(2)
    router = pool._roster._router
    with pytest.raises(Exception, match="context"):
        pool.submit(request(prompt="long " * 10_000))
    assert router.num_held == 0
    with pytest.raises(Exception, match="context"):
        pool.submit(request(prompt="x" * 1000))
    assert router.num_held == 0


def test_sound_is_not_taken_over_in_the_middle(replicas: Make) -> None:
    pool, members = replicas(2)
    for member in members:
        member.hides_tokens = True
    hold(members, 4)
    stream = pool.submit(request(hearing=Hearing(b"RIFF")))
    wait_for(lambda: len(stream.text) > 2)
    end_stuck(members)
    with pytest.raises(EngineGoneError, match="heard, spoken or drawn in part"):
        stream.result(30)


def test_an_older_engine_is_not_asked_to_go_on(
    replicas: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool, members = replicas(3)
    hold(members, 5)
    stream = pool.submit(request(max_tokens=80))
    one = stuck(members)
    left = [m for m in members if m is not one]
    old = {left[0].label}
    monkeypatch.setattr(
        "llmkit.cluster.members.Member.resumes", property(lambda m: m.name not in old)
    )
    wait_for(lambda: len(stream.text) > 3)
    one.end()
    wait_for(lambda: left[1].asked)
    assert not left[0].asked
    old.add(left[1].label)
    left[1].end(blameless=True)
    with pytest.raises(EngineGoneError, match="older version"):
        stream.result(30)
    assert not left[0].asked


def test_which_version_resumes() -> None:
    from llmkit.cluster.members import Member
    from llmkit.protocol import EngineStats

    client = object.__new__(BridgeClient)
    for version, resumes in ((5, False), (wire.RESUMES, True)):
        client._version = version
        assert Member("m", client, EngineStats()).resumes is resumes


def test_slots_of_all_replicas_are_told_apart(replicas: Make) -> None:
    pool, members = replicas(2)
    for i, member in enumerate(members):
        chunk = StepChunk(3, f"q{i}", 1, 0, False)
        member.answers = {
            ListSlots: (SlotContent(3, 9, 0, f"q{i}"),),
            ListRequests: (
                RunningRequest(f"q{i}", "", 3, 9, 0, 0, 1.0),
                RunningRequest(f"w{i}", "", None, 9, 0, 0, 1.0),
            ),
            ListSteps: (Step(-1.0 - i, 0.1, (chunk,)),),
        }
    slots = pool.inquire(Inquiry("s", ListSlots())).result(30)
    assert [(s.slot, s.request) for s in slots] == [(3, "q0"), (11, "q1")]
    running = pool.inquire(Inquiry("r", ListRequests())).result(30)
    assert [(r.slot, r.request) for r in running] == [
        (3, "q0"), (None, "w0"), (11, "q1"), (None, "w1"),
    ]  # fmt: skip
    steps = pool.inquire(Inquiry("t", ListSteps())).result(30)
    assert [(s.at, s.chunks[0].slot) for s in steps] == [(-2.0, 11), (-1.0, 3)]


def test_a_moved_request_keeps_its_name(replicas: Make) -> None:
    pool, members = replicas(2)
    hold(members, 5)
    stream = pool.submit(request("mine", max_tokens=200))
    one = stuck(members)
    wait_for(lambda: len(stream.text) > 3)
    one.end()
    other = stuck(members)
    [there] = [a for a in other.asked if a.startswith("mine")]
    assert there != "mine"
    other.answers = {ListRequests: (RunningRequest(there, "", 0, 9, 0, 0, 1.0),)}
    [shown] = pool.inquire(Inquiry("r", ListRequests())).result(30)
    assert shown.request == "mine"
    stream.close()


def test_a_question_that_a_full_replica_refuses_is_asked_elsewhere(replicas: Make) -> None:
    pool, members = replicas(2)

    def full() -> None:
        raise QueueFullError("64 questions of this caller")

    members[0].on_ask = full
    for i in range(4):
        assert pool.embed(EmbeddingRequest(f"e{i}", ("ab",))).result(30).num_tokens == (2,)
    members[1].on_ask = full
    with pytest.raises(QueueFullError):
        pool.embed(EmbeddingRequest("e", ("ab",)))


def test_why_the_last_one_ended_is_kept(replicas: Make) -> None:
    pool, [only] = replicas(1)
    only.end()
    pool.update({})
    assert "r0 has ended" in str(pool.state.reason)
    pool.close()
    assert "r0 has ended" in str(pool.state.reason)
