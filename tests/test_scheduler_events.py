"""The scheduler and its slots on the fake: whatever comes in whatever order, nothing leaks, and
everybody gets what is theirs."""

from __future__ import annotations

from typing import Any

from fake_runner import FakeRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from scheduler_bench import Bench

from llmkit.engine.request import Request
from llmkit.protocol import FinishReason

ARRIVAL = st.tuples(
    st.sampled_from(
        [
            b"",
            b"a shared beginning that is long enough to be worth a wait, ",
            b"another one, also quite long and also shared by some of them ",
        ]
    ),
    st.binary(min_size=1, max_size=30).map(lambda b: bytes(97 + c % 26 for c in b)),
    st.integers(0, 40),  # max_tokens
    st.integers(0, 2),  # priority
    st.sampled_from(["ann", "bob", "eve"]),
    st.sampled_from(["", "", "salt"]),
    st.sampled_from([(), (), (), (("french", 1.0),), (("french", 0.5),)]),  # adapters
    st.sampled_from([None, None, None, 1]),  # prompt_logprobs
    st.sampled_from([False, False, False, True]),  # keep_on_disk: it computes its prompt only
    st.sampled_from([1.0, 1.0, 0.01, 0.5, 3.0, 100.0]),  # weight
)


EVENT = st.one_of(
    ARRIVAL.map(lambda a: ("add", a)),
    st.integers(0, 30).map(lambda i: ("abort", i)),
    st.integers(1, 12).map(lambda n: ("steps", n)),
    st.sampled_from([("interrupt", 0), ("no room", 0), ("lose", 0), ("error", 0)]),
    st.tuples(st.integers(0, 4), st.booleans()).map(lambda f: ("fault", f)),
)


@settings(max_examples=300, deadline=None)
@given(
    events=st.lists(EVENT, max_size=60),
    n_slots=st.integers(1, 5),
    capacity=st.sampled_from([None, None, 220, 400]),
    host_tokens=st.sampled_from([0, 150, 5000]),
    letters=st.sampled_from([2, 26]),
    truncate=st.booleans(),
    deterministic=st.booleans(),
    n_ctx=st.sampled_from([100, 200]),
    shifts=st.booleans(),
    most=st.sampled_from([None, None, 1, 2]),
)
def test_any_order_of_events_ends_well(
    events: list[Any],
    n_slots: int,
    capacity: int | None,
    host_tokens: int,
    letters: int,
    truncate: bool,
    deterministic: bool,
    n_ctx: int,
    shifts: bool,
    most: int | None,
) -> None:
    runner = FakeRunner(
        n_slots=n_slots, n_ctx=n_ctx, capacity=capacity, host_tokens=host_tokens, letters=letters
    )
    runner.can_truncate = runner.can_fork = truncate  # type: ignore[misc]
    bench = Bench(
        runner,
        deterministic=deterministic,
        shifts=shifts and truncate and not deterministic,
        max_running=most,
    )
    requests: list[tuple[Request, bytes]] = []
    aborted: set[str] = set()
    for kind, value in events:
        if kind == "add":
            prefix, rest, max_tokens, priority, caller, salt, adapters, scores, disk, weight = value
            who: dict[str, Any] = {
                "priority": priority,
                "caller": caller,
                "weight": weight,
                "cache_salt": salt,
                "adapters": adapters,
            }
            request = bench.add(
                prefix + rest, 0 if disk else max_tokens, scores, keep_on_disk=disk, **who
            )
            requests.append((request, prefix + rest))
        elif kind == "abort" and requests:
            request = requests[value % len(requests)][0]
            if request.finish_reason is None:
                aborted.add(request.request_id)
            bench.abort(request)
            runner.no_room_next &= (
                len(bench.scheduler.running) > 1
            )  # alone, a request without room fails, and rightly
        elif kind == "steps":
            for _ in range(value):
                bench.step()
        elif kind == "interrupt":
            runner.interrupt()
            bench.step()
            runner.clear_interrupt()
        elif kind == "no room":
            runner.no_room_next = bool(len(bench.scheduler.running) > 1)
        elif kind == "lose":
            runner.lose_parked = not runner.lose_parked
        elif kind == "error":
            runner.fail_next = "the decode failed"
        elif kind == "fault":
            runner.fault_next = value
    runner.lose_parked = False
    runner.fault_next = runner.fail_next = None
    bench.drain()
    assert sorted(r.request_id for r in bench.ended) == sorted(r.request_id for r, _ in requests), (
        "each ends exactly once"
    )
    for request, prompt in requests:
        result = request.channel.result
        assert result is not None
        expected = runner.reference(prompt, request.max_tokens, request.adapters, bench.shifts)
        if request.request_id in aborted:
            assert request.finish_reason is FinishReason.ABORT and expected.startswith(
                bench.text(request)
            )
            continue
        if request.serial in runner.hurt:
            assert request.finish_reason is FinishReason.ERROR and expected.startswith(
                bench.text(request)
            )
            continue
        assert request.finish_reason is FinishReason.LENGTH and bench.text(request) == expected
        if request.sampling.prompt_logprobs is not None:
            told = [(p.token, p.logprob) for p in result.prompt_logprobs]
            assert told == [
                (prompt[0], None),
                *((t, -float(i)) for i, t in enumerate(prompt) if i),
            ], "each token of the prompt, scored once, in its place"
        if request.keep_on_disk:
            assert any(runner.parked[key] == list(prompt) for key in runner.saved_keys), (
                "what was to be kept is kept"
            )
    assert bench.cache.num_free == n_slots and not [
        p for p in bench.cache.parked.values() if p.pinned
    ]
    bench.scheduler.schedule()
    assert len(bench.scheduler.waiting._active) == 0
