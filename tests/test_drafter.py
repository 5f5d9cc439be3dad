"""A draft model's guesses: on fakes for the bookkeeping, on the real model for the truth. And the
context shift, the other thing that moves tokens about."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny_models
from fake_runner import END, FakeRunner, piece
from scheduler_bench import Bench

import llmkit
from llmkit.engine.budget import StepClock
from llmkit.engine.detokenize import Detokenizer
from llmkit.engine.draft import Payoff, PromptLookup
from llmkit.engine.drafter import ModelDrafter
from llmkit.engine.request import Request
from llmkit.engine.scheduler import Scheduler
from llmkit.engine.slots import PrefixCache
from llmkit.errors import InvalidRequestError
from llmkit.models.registry import resolve
from llmkit.protocol import SamplingParams
from llmkit.protocol.stream import Channel


@pytest.fixture(autouse=True)
def no_lookup(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the draft model guesses, and costs what the tests say, not what it is measured to."""
    monkeypatch.setattr("llmkit.engine.drafter.SMOOTHING", 0.0)
    monkeypatch.setattr(PromptLookup, "_find", lambda self, tokens: None)


class Pair(Bench):
    """A bench whose scheduler also has a draft model, or shifts its context."""

    def __init__(self, runner: FakeRunner, draft: FakeRunner | None = None, **options: Any) -> None:
        super().__init__(runner)
        self.drafter = ModelDrafter(draft) if draft is not None else None
        if self.drafter is not None:
            self.drafter.step_s = 1e-6
        self.clock = StepClock(None)
        self.clock._draft_s = 1e-6  # guesses cost nothing here
        self.cache = PrefixCache(runner.n_slots, can_truncate=True, can_fork=True)
        limits: dict[str, Any] = {
            "n_ctx": runner.n_ctx,
            "max_batch_tokens": runner.max_batch_tokens,
        }
        self.scheduler = Scheduler(
            self.cache,
            is_end=lambda t: t == END,
            clock=self.clock,
            drafter=self.drafter,
            **limits,
            **options,
        )


def random_text(seed: int, size: int) -> bytes:
    return bytes(97 + (seed * 7919 + i * i * 31) % 26 for i in range(size))


def test_a_good_draft_saves_steps_and_changes_nothing() -> None:
    bench = Pair(
        FakeRunner(n_ctx=500), FakeRunner(n_ctx=500)
    )  # the same model: it always guesses right
    requests = [bench.add(random_text(i, 20 + i), 120) for i in range(6)]
    bench.drain()
    for i, request in enumerate(requests):
        assert bench.text(request) == bench.runner.reference(random_text(i, 20 + i), 120)
    scheduler = bench.scheduler
    assert scheduler.num_drafted > 300 and scheduler.num_accepted == scheduler.num_drafted
    assert len(bench.runner.batches) < 150, "six requests of 120 tokens on four slots"


def test_a_bad_draft_is_soon_left_alone() -> None:
    bench = Pair(FakeRunner(n_ctx=500), FakeRunner(n_ctx=500, letters=3))
    request = bench.add(b"hello there", 300)
    bench.drain()
    assert bench.text(request) == bench.runner.reference(b"hello there", 300)
    assert (
        bench.scheduler.num_drafted < 100
        and bench.scheduler.num_accepted < bench.scheduler.num_drafted / 2
    )


def test_a_broken_draft_is_done_without() -> None:
    draft = FakeRunner(n_ctx=500)
    bench = Pair(FakeRunner(n_ctx=500), draft)
    request = bench.add(b"hello", 60)
    for _ in range(5):
        bench.step()
    draft.fail_next = "out of luck"
    bench.drain()
    assert bench.text(request) == bench.runner.reference(b"hello", 60)


def test_what_does_not_pay_is_not_guessed() -> None:
    payoff = Payoff()
    assert payoff.size(10, 8, 0.01) == 8
    for _ in range(20):
        payoff.learn(4, 0)
    assert payoff.size(11, 8, 0.1) == 0 and payoff.size(12, 8, 0.1) == 0, "and it waits"
    assert payoff.size(11 + 40, 8, 0.1) == 3, "then looks again"


def test_a_full_context_moves_on() -> None:
    bench = Pair(FakeRunner(n_slots=2, n_ctx=64, max_batch_tokens=32), context_shift=True)
    kept, other = bench.add(b"a prompt to keep: ", 300), bench.add(b"another", 20)
    kept.max_tokens = 300
    bench.drain()
    assert (
        kept.num_output_tokens == 300
        and len(bench.text(kept)) == 300
        and kept.finish_reason == "length"
    )
    assert bench.text(other) == bench.runner.reference(b"another", 20)
    assert bytes(kept.tokens[:18]) == b"a prompt to keep: " and len(kept.tokens) < 64
    again = bench.add(bytes(kept.tokens), 5)
    bench.drain()
    assert again.num_cached_tokens == 0, (
        "what was computed beside discarded tokens is nobody else's"
    )
    alone = Request([1], SamplingParams(), 1, Detokenizer(piece), Channel("x", lambda _: None))
    assert alone.num_output_tokens == 0


def test_a_shifted_request_that_is_preempted_is_computed_again() -> None:
    """Its keys move at the next decode only: a copy from before would be wrong."""
    runner = FakeRunner(n_slots=1, n_ctx=64, max_batch_tokens=64, host_tokens=1000)
    bench = Pair(runner, context_shift=True)
    long = bench.add(b"a prompt to keep: ", 300)
    long.max_tokens = 300
    while not long.is_shifted:
        bench.step()
    urgent = bench.add(b"quick", 3, priority=-1)
    bench.step()
    assert urgent.slot is not None and long.slot is None and not runner.parked
    bench.drain()
    assert long.num_output_tokens == 300 and bench.text(urgent) == runner.reference(b"quick", 3)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """The model under a name of its own: one file is one engine in a process."""
    path = tmp_path / "model.gguf"
    try:
        os.link(resolve("smollm2").path, path)
    except OSError:
        shutil.copy(resolve("smollm2").path, path)
    return path


@pytest.mark.model
def test_the_real_model_drafts_for_itself(file: Path) -> None:
    prompts = ["Once upon a time", "The list of primes: 2, 3, 5,", "Water boils at"]
    with llmkit.load(file, n_ctx=512, n_slots=4, share=False, draft="smollm2") as llm:
        plain = llm.generate(prompts, max_tokens=40, temperature=0, speculate=False)
        assert llm.stats.draft_tokens_total == 0
        # Its own size makes guessing useless; here it must pay.
        llm._client._engine._drafter.step_s = 1e-9  # type: ignore[union-attr]
        llm._client._engine._clock._draft_s = 1e-9  # type: ignore[union-attr]
        guessed = llm.generate(prompts, max_tokens=40, temperature=0)
        assert (
            llm.stats.draft_tokens_total > 10
            and llm.stats.accepted_tokens_total > 0.6 * llm.stats.draft_tokens_total
        )
        for a, b in zip(plain, guessed, strict=True):
            assert a.text[:40] == b.text[:40] and b.usage.completion_tokens == 40
        sampled = llm.generate("Once", max_tokens=30, temperature=1.0, seed=3)
        assert sampled.usage.completion_tokens == 30


@pytest.mark.model
def test_models_that_cannot_draft(file: Path, tmp_path: Path) -> None:
    tiny = tiny_models.write(tmp_path / "tiny.gguf", "llama")
    with pytest.raises(InvalidRequestError, match="a different vocabulary"):
        llmkit.load(file, n_ctx=256, share=False, draft=tiny)
    with pytest.raises(InvalidRequestError, match="recurrent"):
        llmkit.load(
            tiny, n_ctx=256, share=False, draft=tiny_models.write(tmp_path / "mamba.gguf", "mamba")
        )
    with pytest.raises(InvalidRequestError, match="cannot use a draft model"):
        llmkit.load(file, draft="smollm2", deterministic=True)
    with llmkit.load(file, n_ctx=256, n_slots=1, share=False) as llm:
        assert llm.generate("a", max_tokens=1).usage.completion_tokens == 1, (
            "a failed load left nothing behind"
        )


@pytest.mark.model
def test_the_real_context_shifts(file: Path, tmp_path: Path) -> None:
    with llmkit.load(file, n_ctx=256, n_slots=2, share=False, context_shift=True) as llm:
        done = llm.generate("Once upon a time", max_tokens=600, temperature=0, ignore_eos=True)
        assert done.usage.completion_tokens == 600 and len(done.tokens) == 600
        assert (
            llm.generate(
                "Once upon a time", max_tokens=None, ignore_eos=True
            ).usage.completion_tokens
            == 252
        ), "only as far as it was asked"
        assert "Paris" in llm.generate("The capital of France is", max_tokens=8, temperature=0).text
    with pytest.raises(InvalidRequestError, match="cannot be shifted"):
        llmkit.load(
            tiny_models.write(tmp_path / "mamba.gguf", "mamba"),
            n_ctx=256,
            share=False,
            context_shift=True,
        )
