"""The scheduler and its slots, driven step by step on the fake: prefixes, fairness, preemption,
latency."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from fake_runner import FakeRunner, piece
from scheduler_bench import Bench

from llmkit.engine.backlog import Backlog
from llmkit.engine.batch import Fork, Park, Restore, StepOutput
from llmkit.engine.budget import StepClock
from llmkit.engine.detokenize import Detokenizer
from llmkit.engine.draft import PromptLookup
from llmkit.engine.request import Request
from llmkit.protocol import SamplingParams
from llmkit.protocol.stream import Channel

_ids = itertools.count()


def ops(bench: Bench, kind: type) -> list[Any]:
    return [op for batch in bench.runner.batches for op in batch.ops if isinstance(op, kind)]


def computed(bench: Bench) -> int:
    """Tokens computed, without guesses that did not come true."""
    wrong = bench.scheduler.num_drafted - bench.scheduler.num_accepted
    return sum(batch.num_tokens for batch in bench.runner.batches) - wrong


def test_one_cold_prefix_is_computed_once() -> None:
    bench = Bench(FakeRunner(n_slots=8, n_ctx=400))
    prefix = (
        b"once and only once, said the prefix, and it went on for a while so that it was worth it. "
        * 2
    )
    requests = [bench.add(prefix + bytes([65 + i]), 4) for i in range(8)]
    bench.drain()
    assert computed(bench) == len(prefix) + 8 * (1 + 3), (
        "the prefix, then each its own letter and what was generated but for the last"
    )
    assert (
        len(ops(bench, Fork)) == 7
        and [r.num_cached_tokens for r in requests] == [0] + [len(prefix)] * 7
    )


def test_adapters_of_one_caller_do_not_take_the_step_apart() -> None:
    """Each set of adapters is a decode of its own, which all others wait for."""
    bench = Bench(FakeRunner(n_slots=8, n_ctx=400))
    bench.add(b"hello", 60, caller="bob")
    many = [
        bench.add(b"x%d" % i, 8, caller="ann", adapters=(("french", 0.5 + i / 100),))
        for i in range(6)
    ]
    same = bench.add(b"y", 8, caller="ann", adapters=many[0].adapters)
    most = 0
    while bench.scheduler.has_work:
        bench.step()
        sets = {r.adapters for r in bench.scheduler.running if r.caller == "ann"}
        most = max(most, len(sets))
    assert most == 2
    assert all(len(r.tokens) == r.num_prompt_tokens + 8 for r in [*many, same])


def test_a_prefix_of_a_running_stream_is_shared_while_it_runs() -> None:
    bench = Bench(FakeRunner(n_ctx=400))
    first = bench.add(b"a system prompt that others will want as well: hello", 100)
    for _ in range(5):
        bench.step()
    second = bench.add(b"a system prompt that others will want as well: goodbye", 3)
    bench.drain()
    assert (
        second.num_cached_tokens == len(b"a system prompt that others will want as well: ")
        and first.num_output_tokens == 100
    )


def test_salts_keep_tenants_apart() -> None:
    bench = Bench(FakeRunner(n_ctx=400))
    prompt = b"a secret that nobody else shall learn by measuring how long it takes"
    for salt, cached in (("a", 0), ("b", 0), ("a", len(prompt) - 1)):
        request = bench.add(prompt, 2, cache_salt=salt)
        bench.drain()
        assert request.num_cached_tokens == cached


def test_a_more_urgent_request_preempts_and_nothing_is_computed_twice() -> None:
    bench = Bench(FakeRunner(n_slots=1, n_ctx=400, host_tokens=1000))
    slow = bench.add(
        b"this one is in no hurry at all, and long enough to be parked, so that it can come back",
        60,
        priority=5,
    )
    for _ in range(10):
        bench.step()
    urgent = bench.add(b"now!", 5)
    bench.drain()
    assert bench.ended == [urgent, slow] and bench.scheduler.num_preemptions == 1
    assert len(ops(bench, Park)) >= 1 and len(ops(bench, Restore)) == 1
    assert bench.text(slow) == bench.runner.reference(
        bytes(slow.tokens[: slow.num_prompt_tokens]), 60
    )
    assert computed(bench) == slow.num_prompt_tokens + 59 + 4 + 4


def test_callers_share_whatever_the_number_of_their_requests() -> None:
    bench = Bench(FakeRunner(n_slots=2))
    for i in range(40):
        bench.add(b"greedy %d" % i, 10, caller="greedy")
    modest = [bench.add(b"modest %d" % i, 10, caller="modest") for i in range(3)]
    bench.drain()
    assert max(bench.ended.index(r) for r in modest) <= 8


def test_a_short_prompt_passes_a_long_one_and_the_long_one_keeps_half() -> None:
    bench = Bench(FakeRunner(n_slots=4, n_ctx=2000, max_batch_tokens=64))
    long = bench.add(bytes(97 + i % 26 for i in range(1000)), 2)
    bench.step()
    short = bench.add(b"Z" * 40, 2)
    bench.step()
    assert short.num_output_tokens == 1, "it goes first"
    before = long.num_computed_tokens
    for i in range(8):  # others keep coming
        bench.add(bytes([48 + i]) * 60, 1)
        bench.step()
    assert long.num_computed_tokens - before >= 4 * 60


def test_prompts_are_computed_in_whole_tiles() -> None:
    runner = FakeRunner(n_slots=4, n_ctx=2000, max_batch_tokens=512)
    runner.tile = 64
    bench = Bench(runner, target_s=0.1)
    for _ in range(50):
        bench.clock.observe(num_streams=1, num_decode=1, num_prefill=0, seconds=0.01)
        bench.clock.observe(num_streams=0, num_decode=0, num_prefill=100, seconds=0.06)
    bench.add(b"stream", 50)
    bench.step()
    first, second = (
        bench.add(bytes(97 + i % 26 for i in range(300)), 2),
        bench.add(bytes(65 + i % 26 for i in range(290)), 2),
    )
    sizes = []
    while not (first.num_output_tokens and second.num_output_tokens):
        bench.step()
        sizes.append(
            [
                len(c.tokens)
                for c in bench.runner.batches[-1].chunks
                if not c.sample or len(c.tokens) > 1
            ]
        )
    assert sizes == [[42, 65], [129], [129], [129], [96]], (
        "what is left of a step is no place for a piece of the next prompt"
    )


def test_prompts_leave_running_streams_their_latency() -> None:
    bench = Bench(FakeRunner(n_slots=4, n_ctx=2000, max_batch_tokens=512), target_s=0.1)
    for _ in range(50):
        bench.clock.observe(num_streams=1, num_decode=1, num_prefill=0, seconds=0.01)
        bench.clock.observe(num_streams=0, num_decode=0, num_prefill=100, seconds=0.2)
    bench.add(b"stream", 50)
    bench.step()
    bench.add(bytes(97 + i % 26 for i in range(1000)), 2)
    bench.step()
    assert sorted(len(c.tokens) for c in bench.runner.batches[-1].chunks) == [1, 45], (
        "(0.1 - 0.01) s / 2 ms"
    )


def test_the_clock_survives_outliers_and_targets_below_a_step() -> None:
    clock = StepClock(0.05)
    for _ in range(20):
        clock.observe(num_streams=2, num_decode=2, num_prefill=0, seconds=0.02)
        clock.observe(num_streams=2, num_decode=2, num_prefill=30, seconds=0.05)
    usual = clock.prefill_budget(2)
    assert 25 <= usual <= 35
    clock.observe(num_streams=2, num_decode=2, num_prefill=0, seconds=60)
    assert clock.prefill_budget(2) >= 16
    assert (
        StepClock(None).prefill_budget(9) > 1_000_000 and StepClock(0.001).prefill_budget(1) == 16
    )


def test_lookup_guesses_pay_and_stop_when_they_do_not() -> None:
    bench = Bench(FakeRunner(n_ctx=2000, letters=1))  # says "a" for ever
    request = bench.add(b"aaaaaaaa", 200)
    bench.drain()
    assert bench.text(request) == b"a" * 200 and len(bench.runner.batches) < 60
    lookup = PromptLookup()
    wrong = [1, 2, 3, 4, 5] * 20
    tried = 0
    for _ in range(200):
        guess = lookup.propose(wrong, 8, 0.3)
        tried += len(guess)
        lookup.payoff.learn(len(guess), 0)
        wrong.append(1 + (wrong[-1] + 2) % 5)
        wrong += [2, 3, 4]
    assert tried < 150, "it notices"


def test_service_counts_from_now_on_for_those_who_come_back() -> None:
    backlog = Backlog()

    def request(caller: str) -> Request:
        return Request(
            [1],
            SamplingParams(),
            1,
            Detokenizer(piece),
            Channel(f"r{next(_ids)}", lambda _: None),
            caller=caller,
        )

    busy = request("busy")
    backlog.add(busy)
    backlog.charge(busy, num_prompt=1000)
    idle = request("idle")
    backlog.add(idle)
    backlog.charge(idle, num_prompt=10)
    assert backlog.first(lambda _: True) is busy, "the newcomer began at 1000, and has had 10 since"
    backlog.remove(busy)
    backlog.leave(busy)
    assert backlog.first(lambda _: True) is idle and len(backlog) == 1


def test_a_refund_brings_nobody_below_those_who_came_since() -> None:
    backlog = Backlog(clock=lambda: 0.0)

    def add(caller: str) -> Request:
        channel = Channel(f"r{next(_ids)}", lambda _: None)
        request = Request(
            [1], SamplingParams(), 1, Detokenizer(piece), channel, caller=caller, weight=2.0
        )
        backlog.add(request)
        return request

    many = [add("ann") for _ in range(9)]
    for request in many:
        backlog.charge(request, num_prompt=8000)
    alone = backlog.service("ann")
    backlog.refund(many[0], 7000, ended=True)
    assert backlog.service("ann") == alone - 3500, "nobody else is there"
    add("bob")
    came_with = backlog.service("bob")
    assert came_with == backlog.service("ann")
    for request in many[1:]:
        backlog.refund(request, 7000, ended=True)
        backlog.leave(request)
    assert backlog.service("ann") == came_with, "not served before him for what was not computed"
    backlog.charge(many[0], num_prompt=1000)
    backlog.refund(many[0], 600, ended=True)
    assert backlog.service("ann") == came_with + 200
    backlog.refund(many[0], 0, ended=True)
    assert backlog.service("ann") == came_with + 200
    backlog.refund(many[0], 800, ended=False)
    assert backlog.service("ann") == came_with - 200, "it is charged again when its turn comes"


@pytest.mark.parametrize("truncate", [True, False])
def test_a_prefix_that_lost_its_slot_comes_back_from_ram(truncate: bool) -> None:
    runner = FakeRunner(n_slots=1, n_ctx=400, host_tokens=1000)
    runner.can_truncate = runner.can_fork = truncate  # type: ignore[misc]
    bench = Bench(runner)
    talk = (
        b"a long conversation that somebody will come back to, "
        b"after others have had the slot for theirs; "
    )
    first = bench.add(talk, 5)
    bench.drain()
    bench.add(b"somebody else, with something else to say", 5)
    bench.drain()
    again = bench.add(talk + bench.text(first) + b" and on", 5)
    bench.drain()
    assert again.num_cached_tokens >= len(talk) + 4 and len(ops(bench, Restore)) == 1


def test_a_prompt_computed_again_for_a_late_grammar_is_charged_again() -> None:
    """Where a model's state cannot be cut back by one token, all of it is computed once more."""
    bench = Bench(FakeRunner(n_slots=2))
    slow, other = bench.add(b"x" * 40, caller="slow"), bench.add(b"y" * 40, caller="other")
    batch = bench.scheduler.schedule()
    bench.runner.execute(batch)
    bench.runner.slots[0].clear()
    bench.scheduler.update(
        batch, StepOutput([(), (97,)], [0, len(bench.runner.slots[1])], late=(0,))
    )
    service = bench.scheduler.waiting.service
    assert (
        slow.num_computed_tokens == 0
        and service("slow") - service("other") > 30
        and other.num_output_tokens == 1
    )
