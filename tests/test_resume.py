"""An answer that another engine began: the rest of it is exactly what was missing, wherever it was
cut. On a fake model that writes emoji, and on the real one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from fake_runner import END
from fakes import FakeClient, ask
from hypothesis import given, settings
from hypothesis import strategies as st
from resuming import Talker, begun, check_cut, check_cuts, read, rest, whole

from llmkit.engine.budget import StepClock
from llmkit.errors import InvalidRequestError
from llmkit.protocol import (
    FinishReason,
    GenerationRequest,
    Grammar,
    Resume,
    SamplingParams,
)
from llmkit.runtime.echo import EchoEngine
from llmkit.runtime.local import LocalEngine


@pytest.fixture
def talker() -> Iterator[FakeClient]:
    client = FakeClient(runner=Talker(n_ctx=200))
    yield client
    client.close()


CASES: dict[str, dict[str, Any]] = {
    "emoji": {"max_tokens": 60},
    "cut within an emoji": {"max_tokens": 9},
    "stop strings": {"max_tokens": 90, "stop": ("STOP: no", "ok 🎉 n", "🎉 né n")},
    "a stop string that is never whole": {"max_tokens": 50, "stop": ("né x", "👩‍👩‍👧‍👧")},
    "the whole context": {"max_tokens": None},
    "the prompt is scored": {"max_tokens": 12, "prompt_logprobs": 1},
    "a loop": {"max_tokens": None, "max_repetitions": 2},
    "unguessed": {"max_tokens": 60, "speculate": False},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("prompt", ["a", "a prompt of some length"])
def test_every_cut(talker: FakeClient, case: str, prompt: str) -> None:
    check_cuts(talker, ask(prompt, **CASES[case]))


def test_the_cases_meet_their_ends(talker: FakeClient) -> None:
    ends = {case: whole(talker, ask("a", **params))[1] for case, params in CASES.items()}
    assert ends["stop strings"].stop == "ok 🎉 n"
    assert ends["a loop"].finish_reason is FinishReason.REPETITION
    assert ends["cut within an emoji"].text.endswith("\ufffd")
    assert ends["the whole context"].usage.total_tokens == 200


def test_every_cut_between_guesses(talker: FakeClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a step gives several tokens, in one delta."""
    monkeypatch.setattr(StepClock, "draft_cost", lambda self, n: 0.01)
    answer = whole(talker, ask("a", max_tokens=150, stop="STOP: no"))
    assert max(d.num_tokens for d in answer[0]) > 3
    check_cuts(talker, ask("a", max_tokens=150, stop="STOP: no"), answer=answer)


def test_ids_come_with_held_back_text_and_only_if_asked(talker: FakeClient) -> None:
    deltas, done = whole(talker, ask("a", max_tokens=30, stop=("👩‍👩‍👧 STOP: no",)))
    assert tuple(t for d in deltas for t in d.tokens) == done.tokens
    assert all(len(d.tokens) == d.num_tokens for d in deltas)
    assert any(d.tokens and not d.text for d in deltas)
    plain, _ = read(talker.submit(ask("a", max_tokens=30)))
    assert not any(d.tokens for d in plain)


@pytest.mark.parametrize("lost", ["the end", "nothing"])
def test_the_end_of_generation(lost: str) -> None:
    """The last text was sent, what it ended with was not; and one that also knows that."""
    client = FakeClient(runner=Talker(end_after=27, n_ctx=200))
    request = ask("a", max_tokens=90, stop=("STOP: no",))
    _, done = whole(client, request)
    assert done.finish_reason is FinishReason.STOP and done.text.endswith("STOP")
    tokens = done.tokens if lost == "the end" else (*done.tokens, END)
    for sent in range(len(done.text) + 1):
        _, ended = rest(client, request, Resume(tokens, sent))
        assert (ended.text, ended.finish_reason) == (done.text[sent:], FinishReason.STOP)
        assert ended.tokens == done.tokens
    client.close()


def test_a_shifted_context_says_that_it_cannot_be_resumed() -> None:
    client = FakeClient(runner=Talker(n_ctx=40), context_shift=True)
    request = ask("a prompt", max_tokens=90)
    deltas, done = whole(client, request)
    assert done.usage.completion_tokens == 90
    shown = [d for d in deltas if len(d.tokens) == d.num_tokens]
    assert 20 < len(shown) < len(deltas) and deltas[: len(shown)] == shown
    # Those that come before the shift can be resumed, and then shift as the first did.
    for k in range(0, len(shown), 5):
        _, again = rest(client, request, begun(shown[:k]))
        assert again.text == done.text[sum(len(d.text) for d in shown[:k]) :]
        assert again.tokens == done.tokens
    with pytest.raises(InvalidRequestError, match="was shifted"):
        rest(client, request, Resume(done.tokens[:60], 0))
    client.close()


@settings(max_examples=60, deadline=None)
@given(
    chunk=st.integers(8, 64),
    length=st.integers(1, 60),
    max_tokens=st.integers(1, 80),
    stop=st.lists(st.sampled_from(["né", " ok", "🎉", "P: ", "👧 S"]), max_size=2),
    loops=st.sampled_from([None, 2]),
    cut_at=st.integers(0, 1000),
    sent_at=st.integers(0, 1000),
)
def test_random_cuts(
    chunk: int,
    length: int,
    max_tokens: int,
    stop: list[str],
    loops: int | None,
    cut_at: int,
    sent_at: int,
) -> None:
    """Also where less was sent than could have been, and beside other requests."""
    client = FakeClient(runner=Talker(n_ctx=150, n_slots=2, max_batch_tokens=chunk))
    try:
        request = ask("x" * length, max_tokens=max_tokens, stop=stop, max_repetitions=loops)
        beside = [client.submit(ask("y" * 20, max_tokens=50)) for _ in range(2)]
        deltas, done = whole(client, request)
        cut = begun(deltas[: len(deltas) * cut_at // 1000])
        for sent in {cut.sent_chars, cut.sent_chars * sent_at // 1000}:
            check_cut(client, request, Resume(cut.tokens, sent), done)
        for stream in beside:
            stream.result(30)
    finally:
        client.close()


@pytest.mark.parametrize(
    ("resume", "words"),
    [
        (Resume((97,) * 9), "9 tokens are more than the answer may have"),
        (Resume((97, 256)), "256 is out of range"),
        (Resume((2**31 - 1,)), "out of range"),
        (Resume((97, 98), 3), "at most 2 can have been sent"),
        (Resume((0xF0, 0x9F), 2), "at most 1 can have been sent"),
        (Resume(tuple(b"xSTO"), 9), "at most 4 can have been sent"),
        (Resume(tuple(b"xSTOP"), 2), "at most 1 can have been sent"),
        (Resume(tuple(b"xSTOPy"), 1), "ended after 5 of these 6"),
        (Resume((97, END, 97)), "ended after 2 of these 3"),
    ],
)
def test_what_no_engine_can_have_sent_is_refused(
    talker: FakeClient, resume: Resume, words: str
) -> None:
    request = ask("a", max_tokens=8, stop="STOP")
    with pytest.raises(InvalidRequestError, match=words):
        rest(talker, request, resume)
    assert talker.submit(ask("a")).result(30).usage.completion_tokens == 8


@pytest.mark.parametrize(
    "make",
    [
        lambda: Resume((1, -1)),
        lambda: Resume((1, 2**63)),
        lambda: Resume((1, True)),
        lambda: Resume("ab"),  # type: ignore[arg-type]
        lambda: Resume((1,), -1),
        lambda: Resume((1,), 2**31),
        lambda: Resume((), 1),
        lambda: replace(ask("a"), n=2, resume=Resume((1,))),
    ],
)
def test_nonsense_is_refused_where_it_is_made(make: Any) -> None:
    with pytest.raises(InvalidRequestError, match=r"resume|sent_chars"):
        make()


# An echo.


def test_an_echo_goes_on() -> None:
    engine = EchoEngine(step_s=0.0)
    for params in ({}, {"stop": "🎉 a"}, {"max_tokens": 3}):
        request = GenerationRequest("r", SamplingParams(**params), prompt="né 👩‍👩‍👧 🎉 ab")
        check_cuts(engine, request)
    with pytest.raises(InvalidRequestError, match="would not answer that"):
        rest(engine, request, Resume((1, 2)))
    engine.close()


# The real model, each of whose chunks is computed alone.


@pytest.fixture(scope="module")
def exact() -> Iterator[LocalEngine]:
    local = LocalEngine("smollm2", n_ctx=256, n_slots=2, deterministic=True)
    yield local
    local.close()


def wish(prompt: str, **sampling: Any) -> GenerationRequest:
    params = SamplingParams(**{"temperature": 0, "max_tokens": 10, **sampling})
    return GenerationRequest("whole", params, prompt=prompt)


SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer"}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
)
EMOJI = Grammar("regex", "((👩‍👩‍👧|🎉|é|ß ){1,3} ok ){9}")
REAL: dict[str, dict[str, Any]] = {
    "greedy": {"logprobs": 2},
    "the prompt is scored": {"prompt_logprobs": 1, "max_tokens": 4},
    "emoji in a grammar": {"grammar": EMOJI, "max_tokens": 16},
    "a schema to its end": {"grammar": Grammar("json_schema", SCHEMA), "max_tokens": 40},
    "a stop string in a grammar": {"grammar": EMOJI, "max_tokens": 20, "stop": ("ok ok", " ok 🎉")},
    "penalties": {
        "repetition_penalty": 1.3,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.4,
        "dry_multiplier": 0.8,
        "dry_allowed_length": 1,
        "logit_bias": ((260, 2.0),),
    },
    "few tokens back": {"repetition_penalty": 1.8, "penalty_last_n": 4, "dry_penalty_last_n": 2},
    "seeded": {"temperature": 1.2, "seed": 7, "top_k": 0, "min_p": 0.0},
    "seeded with few candidates": {"temperature": 0.9, "seed": 8, "top_k": 3, "top_p": 0.5},
    "seeded with penalties": {"temperature": 1.0, "seed": 9, "repetition_penalty": 1.4},
    "seeded in a grammar": {"temperature": 1.5, "seed": 4, "grammar": EMOJI, "logprobs": 1},
    "no end": {"ignore_eos": True, "temperature": 2.0, "seed": 3, "top_k": 0},
}


@pytest.mark.parametrize("case", REAL)
def test_every_cut_of_the_real_model(exact: LocalEngine, case: str) -> None:
    check_cuts(exact, wish("Once upon a time, 🎉", **REAL[case]))


def test_the_end_of_the_real_context(exact: LocalEngine) -> None:
    """Across the boundaries of chunks, and to the last cell."""
    request = wish(" ".join(map(str, range(1, 78))), max_tokens=None, ignore_eos=True)
    done = check_cuts(exact, request, step=13)
    assert done.usage.total_tokens == 256 and done.finish_reason is FinishReason.LENGTH


def test_beside_others(exact: LocalEngine) -> None:
    """Cached prefixes and neighbours change nothing either."""
    prompt = "The quick brown fox jumps over the lazy dog. " * 9
    request = wish(prompt, temperature=1.0, seed=5)
    deltas, done = whole(exact, request)
    other = exact.submit(replace(request, request_id="beside"))
    check_cut(exact, request, begun(deltas[:6]), done)
    assert other.result(30).tokens == done.tokens


def test_the_draws_of_another_seed_differ(exact: LocalEngine) -> None:
    """So the equality above is no accident."""
    request = wish("Once upon a time", temperature=1.5, seed=1, top_k=0)
    _, done = whole(exact, request)
    other = replace(request, sampling=replace(request.sampling, seed=2))
    assert rest(exact, other, Resume(done.tokens[:3]))[1].tokens != done.tokens


def test_tokens_that_break_the_grammar_are_refused(exact: LocalEngine) -> None:
    request = wish("a", grammar=Grammar("regex", "[0-9]+"))
    tokens = tuple(exact.tokenize("word"))
    with pytest.raises(InvalidRequestError, match="do not match the grammar"):
        rest(exact, request, Resume(tokens))
    assert rest(exact, request, Resume(tuple(exact.tokenize("12"))))[1].tokens


def test_tokens_that_the_real_model_does_not_have(exact: LocalEngine) -> None:
    for token in (exact.description.n_vocab, 2**31 - 1):
        with pytest.raises(InvalidRequestError, match="out of range"):
            rest(exact, wish("a"), Resume((token,)))
    with pytest.raises(InvalidRequestError, match="more than the answer may have"):
        rest(exact, wish("a", max_tokens=None), Resume((5,) * 300))
