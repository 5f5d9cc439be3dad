"""The policy of routing: prefixes, costs, the truth about caches, bounds."""

from __future__ import annotations

import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkit.cluster.homes import MANY_TURNS, Homes
from llmkit.cluster.prefixes import MAX_BLOCKS, PrefixChain, chain_of, chained
from llmkit.cluster.quarantine import QUARANTINE_S, Quarantine
from llmkit.cluster.routing import Figures, Router, Ticket
from llmkit.protocol import GenerationRequest, Message, Tool
from llmkit.protocol.speech import Hearing, Saying

TEXTS = st.lists(st.binary(max_size=3000), max_size=8)


@settings(deadline=None)
@given(TEXTS, TEXTS)
def test_marks_in_common_are_text_in_common(one: list[bytes], other: list[bytes]) -> None:
    a, b = chained(one), chained([*one, *other])
    assert list(a.ends) == sorted(set(a.ends)) and len(a.marks) == len(a.ends) <= MAX_BLOCKS
    assert a.size == sum(map(len, one)) and (not a.ends or a.ends[-1] <= a.size)
    left, right = b"".join(one), b"".join(other)
    c = chained([right, left]) if right else a
    for i, (x, y) in enumerate(zip(a.marks, c.marks, strict=False)):
        if x == y and a.ends[i] == c.ends[i]:
            assert (right + left)[: a.ends[i]] == left[: a.ends[i]]
    if a.size >= 128:  # what goes on begins with the same blocks, up to the one that was open
        assert b.marks[: len(a.marks)] == a.marks


def test_a_conversation_continues_its_chain() -> None:
    turn = [Message("system", "Be brief. " * 30), Message("user", "What is a prime? " * 20)]
    first = chain_of(GenerationRequest("a", messages=tuple(turn)))
    turn += [Message("assistant", "A number. " * 30), Message("user", "And " * 99)]
    second = chain_of(GenerationRequest("b", messages=tuple(turn)))
    assert second.marks[: len(first.marks)] == first.marks
    assert len(second.marks) > len(first.marks)


def test_all_turns_of_a_conversation_have_one_opening() -> None:
    turns = [Message("system", "Be brief. " * 30), Message("user", "Hi")]
    chains = [chain_of(GenerationRequest("0", messages=tuple(turns)))]
    for i in range(1, 4):
        turns += [Message("assistant", "Yes. " * 40), Message("user", f"And {i}? " * 40)]
        chains.append(chain_of(GenerationRequest(f"{i}", messages=tuple(turns))))
    assert len({chain.opening for chain in chains}) == 1 and chains[0].opening
    # What a turn asked with is the past of the next one.
    assert [c.past for c in chains] == [0, *(c.size for c in chains[:-1])]
    other = (Message("system", "Be brief. " * 30), Message("user", "Ho"))
    assert chain_of(GenerationRequest("x", messages=other)).opening != chains[0].opening
    assert chain_of(GenerationRequest("x", prompt="Hi " * 500)).opening == 0


def conversation(key: int, turns: int, system: int = 0) -> PrefixChain:
    """The chain of its turn of that number, on a system prompt."""
    pieces = [b"%d system " % system * 200]
    for turn in range(turns):
        pieces += [b"%d answers " % (turn - 1) * 40] if turn else []
        pieces += [b"%d asks %d " % (key, turn) * 40]
    return chained(pieces, 2, len(pieces) - 2 if turns > 1 else 0)


@pytest.mark.parametrize(("systems", "share"), [(1, 0.6), (200, 0.85)])
def test_gateways_that_never_talk_find_each_others_conversations(
    systems: int, share: float
) -> None:
    """Each turn comes to any of four, which finds the replica of the turn before; less often where
    all replicas know the system prompt, and little is lost."""
    gateways = [Router(random.Random(i)) for i in range(4)]
    for router in gateways:
        for i in range(30):
            router.add(f"r{i}")
            router.report(f"r{i}", Figures(0.0005, 0.02, 16, 48, 4))
    caches: dict[str, set[int]] = {f"r{i}": set() for i in range(30)}
    hits = []
    rng = random.Random(3)
    for key in range(400):
        for turn in range(1, 5):
            router = rng.choice(gateways)
            chain = conversation(key, turn, key % systems)
            ticket = router.route(chain)
            assert ticket is not None
            known = max((e for m, e in zip(chain.marks, chain.ends, strict=True)
                         if m in caches[ticket.replica]), default=0)  # fmt: skip
            caches[ticket.replica].update(chain.marks)
            if turn > 1 and key > 200:
                hits.append(known >= chain.past)
            router.ended(
                ticket,
                prompt_tokens=chain.size // 4,
                cached_tokens=known // 4,
                answer_tokens=50,
            )
    assert sum(hits) > share * len(hits)


def test_homes_of_a_common_beginning_are_shared_out_and_agreed() -> None:
    few, many = Homes(), Homes()
    chains = [conversation(key, 1) for key in range(1500)]
    for homes in (few, many):
        for chain in chains:  # so common that 100 replicas share it
            assert homes.of(chain, 100) is not None
    points = {homes.of(c, 100)[0] for homes in (few, many) for c in chains}  # type: ignore[index]
    assert len(points) == 128
    # Who counts less of it has half of these homes, and agrees on half of the conversations.
    halves = [few.of(c, 60)[0] for c in chains]  # type: ignore[index]
    assert set(halves) < points and len(set(halves)) == 64
    rare = conversation(1, 1, system=7)
    assert few.of(rare, 100) == many.of(rare, 100) and few.of(rare, 100)[1]  # type: ignore[index]


def test_what_everybody_asks_first_is_no_conversation() -> None:
    homes = Homes()
    same = conversation(1, 1)
    found = [homes.of(same, 100) for _ in range(4 * MANY_TURNS)]
    assert found[0] is not None and found[-1] is None
    assert homes.of(chained([b"a prompt " * 200]), 100) is None


@pytest.mark.parametrize(
    "other",
    [
        {"cache_salt": "s"},
        {"caller": "bob"},
        {"lora": (("a", 1.0),)},
        {"tools": (Tool("look"),)},
        {"template_options": {"enable_thinking": False}},
        {"saying": Saying(voice="other")},
        {"hearing": Hearing(b"RIFF")},
        {"hearing": Hearing(b"RIFF", translate=True)},
        {"hearing": Hearing(b"RIFX")},
    ],
)
def test_what_keeps_caches_apart_keeps_chains_apart(other: dict[str, object]) -> None:
    said = (Message("user", "Hello. " * 200),)
    plain = chain_of(GenerationRequest("a", messages=said))
    changed = chain_of(GenerationRequest("a", messages=said, **other))  # type: ignore[arg-type]
    assert not set(plain.marks) & set(changed.marks)


def test_what_is_heard_and_filled_in_tells_prompts_apart() -> None:
    made = [
        GenerationRequest("a", prompt="x", **more)
        for more in (
            {},
            {"suffix": ""},
            {"suffix": "y"},
            {"hearing": Hearing(b"RIFF")},
            {"hearing": Hearing(b"RIFX")},
            {"hearing": Hearing(b"RIFF", words=True)},
            {"saying": Saying()},
            {"saying": Saying(format="mp3")},
        )
    ]
    assert len({chain_of(each).whole for each in made}) == len(made)


def test_what_was_refused_is_not_held() -> None:
    router = fleet(1)
    turn = router.route(chained([text(1, 600)]))
    assert turn is not None
    told(router, turn)
    before = router.num_held
    longer = router.route(chained([text(1, 600), text(2, 5000)]))
    assert longer is not None and router.num_held > before
    router.refused(longer)
    router.refused(longer)
    assert router.num_held == before
    again = router.route(chained([text(1, 600)]))
    assert again is not None and again.depth == 1, "what it would have continued is still there"


def fleet(count: int, seed: int = 1, **figures: float) -> Router:
    router = Router(random.Random(seed))
    for i in range(count):
        router.add(f"r{i}")
        router.report(f"r{i}", Figures(0.001, 0.02, 4, 8, **figures))  # type: ignore[arg-type]
    return router


def told(router: Router, ticket: Ticket, cached: int = 0) -> None:
    tokens = ticket.chain.size // 4
    router.ended(ticket, prompt_tokens=tokens, cached_tokens=cached, answer_tokens=20)


def text(number: int, size: int = 4000) -> bytes:
    return random.Random(number).randbytes(size)


@pytest.mark.parametrize("count", [3, 100])
def test_a_prompt_goes_where_its_beginning_is(count: int) -> None:
    router = fleet(count)
    first = router.route(chained([text(1)]))
    assert first is not None
    told(router, first)
    for i in range(5):
        again = router.route(chained([text(1), text(10 + i, 200)]))
        assert again is not None and again.replica == first.replica and again.depth >= 3
        told(router, again, cached=1000)


def test_load_outweighs_a_prefix() -> None:
    router = fleet(3)
    first = router.route(chained([text(1, 600)]))
    assert first is not None
    told(router, first)
    router.report(first.replica, Figures(0.001, 0.02, 4, 8, has=40))
    again = router.route(chained([text(1, 600)]))
    assert again is not None and again.replica != first.replica


def test_the_faster_one_gets_more() -> None:
    router = fleet(2)
    router.report("r0", Figures(0.004, 0.08, 4, 8))
    taken = [router.route(chained([text(i)])) for i in range(10)]
    assert sum(t is not None and t.replica == "r1" for t in taken) >= 7


def test_the_truth_corrects_the_index() -> None:
    router = fleet(1)
    for tail in range(3):
        ticket = router.route(chained([text(1), text(tail, 2000)]))
        assert ticket is not None
        told(router, ticket, cached=1000 if tail else 0)
    held = router.num_held
    wrong = router.route(chained([text(1), text(9, 2000)]))
    assert wrong is not None and wrong.depth >= 3
    told(router, wrong, cached=0)  # nothing of it was there
    assert router.num_held < held, "what shared it is not there either"


def test_closed_and_removed_ones_take_nothing() -> None:
    router = fleet(20)
    router.close("r3")
    router.remove("r4")
    for i in range(200):
        ticket = router.route(chained([text(i, 300)]))
        assert ticket is not None and ticket.replica not in ("r3", "r4")
    router.open("r3")
    assert router.num_open == 19
    for i in range(20):
        router.close(f"r{i}")
    assert router.route(chained([b"x"])) is None and router.spread() is None


def test_avoided_ones_are_taken_only_if_there_is_no_other() -> None:
    router = fleet(2)
    ticket = router.route(chained([text(1)]), avoid={"r0"})
    assert ticket is not None and ticket.replica == "r1"
    ticket = router.route(chained([text(1)]), avoid={"r0", "r1"})
    assert ticket is not None


def test_gateways_that_never_talk_choose_the_same_home() -> None:
    one, other = fleet(100, 1), fleet(100, 2)
    same = 0
    for i in range(50):
        a, b = one.route(chained([text(i)])), other.route(chained([text(i)]))
        assert a is not None and b is not None
        same += a.replica == b.replica
    assert same > 15  # of two homes and two random ones; by chance alone it were less than one


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 30)), max_size=120), st.randoms())
def test_the_index_is_bounded_and_consistent(
    steps: list[tuple[int, int]], rng: random.Random
) -> None:
    router = fleet(12)
    tickets: list[Ticket] = []
    for what, number in steps:
        if what < 5:
            ticket = router.route(chained([text(number % 4, 1500), text(number, 1200)]))
            if ticket is not None:
                tickets.append(ticket)
        elif what < 8 and tickets:
            told(router, tickets.pop(rng.randrange(len(tickets))), rng.choice([0, 300, 600]))
        elif what == 8:
            router.remove(f"r{number % 12}")
        else:
            router.add(f"r{number % 12}")
            router.report(f"r{number % 12}", Figures(0.001, 0.02, 2, 3))
        assert router.num_held <= 12 * 8 * 4
    for ticket in tickets:
        router.ended(ticket)
        router.ended(ticket)  # twice is once
    for replica in router._replicas.values():
        assert replica.own == 0 and replica.pending == pytest.approx(0, abs=1e-6)
        counts: dict[int, int] = {}
        for marks in replica.prefixes.values():
            for mark in marks:
                counts[mark] = counts.get(mark, 0) + 1
        assert counts == replica.held
        assert len(replica.prefixes) <= 8
        assert all(replica in router._index[mark] for mark in replica.held)
    assert router.num_held == sum(len(r.held) for r in router._replicas.values())
    assert router.num_held == sum(map(len, router._index.values()))


def test_quarantine_lasts_a_minute() -> None:
    quarantine, prompt = Quarantine(), chained([b"boom"]).whole
    quarantine.add(prompt, 100.0)
    assert quarantine.left(prompt, 101.0) == QUARANTINE_S - 1 and not quarantine.is_empty(101.0)
    assert quarantine.left(chained([b"other"]).whole, 101.0) == 0
    assert quarantine.left(prompt, 100.0 + QUARANTINE_S) == 0
    assert quarantine.is_empty(100.0 + QUARANTINE_S)


def test_a_thousand_replicas() -> None:
    """No timing here; `benchmarks/fleet.py` measures. Only that nothing is proportional to them."""
    router = fleet(1000)
    began = time.perf_counter()
    for i in range(300):
        ticket = router.route(chained([text(i % 40), text(i, 500)]))
        assert ticket is not None
        told(router, ticket)
    assert time.perf_counter() - began < 30
