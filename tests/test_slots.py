import random

import pytest

from llmkit.engine.batch import Fork, Truncate
from llmkit.engine.slots import MIN_FORK_TOKENS, PrefixCache, Slot, common_prefix


def fill(cache: PrefixCache, tokens: list[int]) -> Slot:
    slot, _, _ = cache.acquire(tokens)
    slot.tokens[:] = tokens
    cache.release(slot)
    return slot


def test_common_prefix_by_brute_force() -> None:
    rng = random.Random(1)
    for _ in range(300):
        a = [rng.randrange(3) for _ in range(rng.randrange(12))]
        b = a[: rng.randrange(len(a) + 1)] + [rng.randrange(3) for _ in range(rng.randrange(5))]
        limit = rng.randrange(14)
        n = 0
        while n < min(len(a), len(b), limit) and a[n] == b[n]:
            n += 1
        assert common_prefix(a, b, limit) == n


def test_a_continued_conversation_stays_in_its_slot() -> None:
    cache = PrefixCache(4, can_truncate=True, can_fork=True)
    first = fill(cache, list(range(50)))
    slot, cached, ops = cache.acquire([*range(50), 7, 8])
    assert (slot.index, cached, ops) == (first.index, 50, [])


def test_the_last_token_is_always_computed() -> None:
    cache = PrefixCache(2, can_truncate=True, can_fork=True)
    fill(cache, list(range(50)))
    slot, cached, ops = cache.acquire(list(range(50)))
    assert cached == 49 and ops == [Truncate(slot.index, 49)]


def test_a_shared_beginning_is_copied_and_kept() -> None:
    cache = PrefixCache(3, can_truncate=True, can_fork=True)
    prefix = list(range(100, 100 + MIN_FORK_TOKENS))
    source = fill(cache, prefix + [900] * 200)
    slot, cached, ops = cache.acquire([*prefix, 1, 2])
    assert slot is not source and cached == len(prefix)
    assert ops == [Fork(source.index, slot.index, len(prefix))]
    assert len(source.tokens) == 200 + len(prefix)


def test_a_running_sequence_lends_its_prefix() -> None:
    cache = PrefixCache(2, can_truncate=True, can_fork=True)
    tokens = list(range(100))
    running, _, _ = cache.acquire(tokens)
    running.tokens[:] = tokens
    slot, cached, ops = cache.acquire([*tokens[:80], 1])
    assert slot is not running and cached == 80 and ops == [Fork(running.index, slot.index, 80)]


def test_the_least_recently_used_slot_is_given_up() -> None:
    cache = PrefixCache(2, can_truncate=True, can_fork=True)
    old, young = fill(cache, [1] * 40), fill(cache, [2] * 40)
    slot, cached, ops = cache.acquire([3] * 10)
    assert slot is old is not young and cached == 0 and ops == [Truncate(old.index, 0)]


def test_conversations_that_share_only_a_few_tokens_keep_a_slot_each() -> None:
    cache = PrefixCache(8, can_truncate=True, can_fork=True)
    first, second = [1, 2, 3, *[10] * 200], [1, 2, 3, *[20] * 200]
    one, two = fill(cache, first), fill(cache, second)
    assert one is not two
    slot, cached, _ = cache.acquire([*first, 11])
    assert slot is one and cached == 203
    cache.release(slot)
    slot, cached, _ = cache.acquire([*second, 21])
    assert slot is two and cached == 203


def test_state_that_cannot_be_cut_is_only_used_whole() -> None:
    cache = PrefixCache(2, can_truncate=False, can_fork=False)
    first = fill(cache, list(range(50)))
    slot, cached, ops = cache.acquire([*range(50), 1])
    assert (slot, cached, ops) == (first, 50, [])
    cache.release(slot)
    slot, cached, ops = cache.acquire([*range(40), 9])
    assert cached == 0 and all(op == Truncate(slot.index, 0) for op in ops)


@pytest.mark.parametrize("can_fork", [True, False])
def test_random_use_keeps_the_books(can_fork: bool) -> None:
    rng = random.Random(2)
    cache = PrefixCache(4, can_truncate=True, can_fork=can_fork)
    busy: list[Slot] = []
    stems = [[rng.randrange(9) for _ in range(90)] for _ in range(3)]
    for _ in range(500):
        if busy and (rng.random() < 0.5 or cache.num_free == 0):
            cache.release(busy.pop(rng.randrange(len(busy))))
            continue
        tokens = rng.choice(stems)[: rng.randrange(1, 90)] + [
            rng.randrange(9) for _ in range(rng.randrange(1, 20))
        ]
        slot, cached, _ = cache.acquire(tokens)
        assert slot not in busy and slot.busy
        assert slot.tokens == tokens[:cached] and cached < len(tokens)
        slot.tokens[:] = tokens
        busy.append(slot)
