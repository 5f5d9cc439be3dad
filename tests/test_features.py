"""What the engine does beyond plain generation, on the real embedded model: guesses,
log-probabilities, preemption, determinism, rarer samplers."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import wait_for

import llmkit
from llmkit.backend.llama import LlamaRunner
from llmkit.backend.model import LlamaModel
from llmkit.engine.batch import Batch, StepOutput
from llmkit.errors import InvalidRequestError
from llmkit.models.registry import resolve
from llmkit.protocol import Completion, GenerationRequest, SamplingParams
from llmkit.runtime.local import LocalEngine

pytestmark = pytest.mark.model


PASSAGE = (
    "In the spring of 1847 the surveyor walked the whole length of the valley with a brass "
    "compass, two mules and a notebook bound in green cloth. "
    "He counted 41 farms, 7 mills and one chapel without a roof. "
    "The miller told him that the river changed its bed every nineteen years. "
)


COPY = f"Text:\n{PASSAGE}\n\nThe same text again:\n{PASSAGE[:60]}"


@pytest.fixture(scope="module")
def llm() -> Iterator[llmkit.LLM]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("JUPYTER_RUNTIME_DIR", raising=False)
        handle = llmkit.load("smollm2", n_ctx=1024, n_slots=4, share=False)
    yield handle
    handle.unload()


def run(engine: LocalEngine, prompt: str, **options: Any) -> Completion:
    request = {k: options.pop(k) for k in ("priority", "cache_salt", "caller") if k in options}
    params = SamplingParams(**{"temperature": 0, "max_tokens": 16, **options})
    return engine.submit(
        GenerationRequest(
            f"f{threading.get_ident()}-{next(COUNTER)}", params, prompt=prompt, **request
        )
    ).result(120)


COUNTER = iter(range(10**9))


def test_guesses_change_nothing_but_the_speed(llm: llmkit.LLM) -> None:
    before = llm.stats
    plain = llm.generate(COPY, max_tokens=60, temperature=0, speculate=False)
    assert llm.stats.draft_tokens_total == before.draft_tokens_total
    guessed = llm.generate(COPY, max_tokens=60, temperature=0)
    assert llm.stats.accepted_tokens_total > before.accepted_tokens_total, (
        "a copy is easily guessed"
    )
    # A guess changes the batch's shape, and that the roundings: where the copy ends, two tokens may
    # be about as likely.
    assert guessed.text[:120] == plain.text[:120] and plain.text.strip()[:60] in PASSAGE * 2


def test_guesses_keep_the_distribution(llm: llmkit.LLM) -> None:
    """Sampled with the same seeds, with and without guesses: the draws are the same ones, up to
    what batch shapes do to the logits."""
    same = 0
    for seed in range(8):
        texts = [
            llm.generate(COPY, max_tokens=24, temperature=0.7, seed=seed, speculate=s).text
            for s in (False, True)
        ]
        same += texts[0] == texts[1]
    assert same >= 6


def test_guesses_end_where_they_should(llm: llmkit.LLM) -> None:
    whole = llm.generate(COPY, max_tokens=60, temperature=0).text
    stop = whole[20:26]
    assert (
        llm.generate(COPY, max_tokens=60, temperature=0, stop=[stop]).text
        == whole[: whole.index(stop)]
    )
    for n in (1, 2, 3, 7):
        assert llm.generate(COPY, max_tokens=n, temperature=0).usage.completion_tokens == n


def test_logprobs_are_those_of_the_logits(llm: llmkit.LLM) -> None:
    completion = llm.generate(
        "The capital of France is", max_tokens=6, temperature=0, logprobs=5, prompt_logprobs=3
    )
    model = LlamaModel(resolve("smollm2").path)
    runner = LlamaRunner(model, n_ctx=256, n_slots=1)
    prompt = model.vocab.tokenize("The capital of France is")
    tokens = [*prompt, *completion.tokens]
    logits = runner.logits(tokens).astype(np.float64)
    expected = (
        logits
        - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1, keepdims=True))
        - logits.max(1, keepdims=True)
    )
    entries = [*completion.prompt_logprobs, *completion.logprobs]
    runner.close()
    model.close()
    assert [e.token for e in entries] == tokens and entries[0].logprob is None
    for i, entry in enumerate(entries[1:]):
        assert entry.logprob == pytest.approx(expected[i, entry.token], abs=0.3)
        ids = [t for t, _, _ in entry.top]
        assert len(ids) == (3 if i < len(prompt) - 1 else 5) and [
            p for _, _, p in entry.top
        ] == sorted((p for _, _, p in entry.top), reverse=True)
        assert entry.top[0][2] == pytest.approx(expected[i].max(), abs=0.3)
    assert b"".join(e.piece for e in completion.logprobs).decode() == completion.text


def test_a_prompt_can_be_scored_alone(llm: llmkit.LLM) -> None:
    scored = llm.generate(PASSAGE * 3, max_tokens=0, prompt_logprobs=0)
    assert (
        scored.text == ""
        and scored.usage.completion_tokens == 0
        and len(scored.prompt_logprobs) == scored.usage.prompt_tokens > 200
    )
    again = llm.generate(PASSAGE * 3, max_tokens=0, prompt_logprobs=0)
    first, second = (np.array([e.logprob for e in s.prompt_logprobs[1:]]) for s in (scored, again))
    assert (
        again.usage.cached_tokens == 0
        and np.abs(first - second).max() < 1
        and first.mean() == pytest.approx(second.mean(), abs=0.02)
    )


def held_from(engine: LocalEngine, position: int) -> threading.Event:
    """No step computes a token there or later before the event is set."""
    goes_on, execute = threading.Event(), engine._runner.execute

    def wait(batch: Batch) -> StepOutput:
        if any(chunk.start >= position for chunk in batch.chunks):
            assert goes_on.wait(60)
        return execute(batch)

    engine._runner.execute = wait  # type: ignore[method-assign]
    return goes_on


def test_an_urgent_request_preempts_and_the_other_ends_the_same() -> None:
    engine = LocalEngine("smollm2", n_ctx=512, n_slots=1)
    for temperature in (0.0, 0.9):
        options: dict[str, Any] = {
            "max_tokens": 60,
            "temperature": temperature,
            "seed": 5,
            "ignore_eos": True,
            "speculate": False,
        }
        run(engine, PASSAGE, max_tokens=1)
        alone = run(engine, PASSAGE, **options)
        goes_on = held_from(engine, alone.usage.prompt_tokens + 8)
        slow = engine.submit(
            GenerationRequest(
                f"slow{temperature}", SamplingParams(**options), prompt=PASSAGE, priority=1
            )
        )
        wait_for(lambda slow=slow: slow.text)
        before = engine.stats().preemptions_total
        quick = GenerationRequest(f"quick{temperature}", SamplingParams(max_tokens=4), "Quick:")
        urgent = engine.submit(quick)
        goes_on.set()
        assert urgent.result(300).usage.completion_tokens == 4
        assert slow.result(300).text == alone.text
        assert engine.stats().preemptions_total == before + 1
    engine.close()


def test_one_small_buffer_for_many(tmp_path: Path) -> None:
    engine = LocalEngine("smollm2", n_ctx=512, n_slots=4, kv_unified=True, kv_tokens=512)
    params = SamplingParams(temperature=0, max_tokens=180, ignore_eos=True)
    streams = [
        engine.submit(GenerationRequest(f"u{i}", params, prompt=f"Chapter {i}: once upon a time"))
        for i in range(6)
    ]
    assert [s.result(120).usage.completion_tokens for s in streams] == [180] * 6
    assert engine.stats().preemptions_total > 0 and engine.stats().kv_capacity_tokens == 512
    engine.close()


def test_deterministic_means_it() -> None:
    """Alone, beside others, after others, cached or not: the same tokens."""
    engine = LocalEngine("smollm2", n_ctx=512, n_slots=4, deterministic=True)
    prompts = [
        "The capital of France is",
        "Once upon a time there was a",
        PASSAGE,
        PASSAGE + "After that",
    ]
    alone = [run(engine, p, max_tokens=40) for p in prompts]
    for _ in range(2):
        params = SamplingParams(temperature=0, max_tokens=40)
        streams = [
            engine.submit(GenerationRequest(f"d{next(COUNTER)}", params, prompt=p))
            for p in prompts * 2
        ]
        assert [s.result(120).tokens for s in streams] == [c.tokens for c in alone] * 2
    assert run(engine, PASSAGE, max_tokens=40).usage.cached_tokens >= 64
    engine.close()


@pytest.mark.parametrize(
    "options",
    [
        {"kv_type": "q8_0"},
        {"kv_type": "q4_0"},
        {"flash_attention": False},
        {"kv_unified": True},
        {"rope_scaling": 2.0},
    ],
)
def test_layouts_and_types(options: dict[str, Any]) -> None:
    engine = LocalEngine("smollm2", n_ctx=512, n_slots=2, **options)
    assert "Paris" in run(engine, "The capital of France is").text
    first, again = run(engine, PASSAGE), run(engine, PASSAGE)
    assert (
        again.usage.cached_tokens == again.usage.prompt_tokens - 1
        and again.text[:10] == first.text[:10]
    )
    engine.close()


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"kv_type": "q5"}, "kv_type"),
        ({"kv_tokens": 1000}, "kv_tokens"),
        ({"kv_type": "q8_0", "flash_attention": False}, "flash_attention"),
        ({"target_itl_ms": 0}, "target_itl_ms"),
        ({"deterministic": 1}, "deterministic"),
        ({"host_cache_mb": float("nan")}, "host_cache_mb"),
    ],
)
def test_options_are_checked(options: dict[str, Any], name: str) -> None:
    with pytest.raises(InvalidRequestError, match=name):
        llmkit.load("smollm2", **options)
    with pytest.raises(TypeError, match=r"kv_typ.*kv_type"):
        llmkit.load("smollm2", kv_typ="f16")


@pytest.mark.parametrize(
    "options",
    [
        {"dry_multiplier": 5.0, "temperature": 0},
        {"dry_multiplier": 2.0, "dry_sequence_breakers": ["x"], "dry_allowed_length": 1},
        {"xtc_probability": 1.0, "xtc_threshold": 0.01},
        {"mirostat": 1, "mirostat_tau": 3.0},
        {"mirostat": 2, "mirostat_eta": 0.2},
    ],
)
def test_rarer_samplers_do_something_and_repeat(llm: llmkit.LLM, options: dict[str, Any]) -> None:
    usual = {
        "max_tokens": 40,
        "seed": 5,
        "ignore_eos": True,
        "temperature": options.get("temperature", 0.8),
    }
    plain = llm.generate("one two three one two three one two", **usual)
    found = llm.generate("one two three one two three one two", **{**usual, **options})
    assert found.tokens != plain.tokens and found.usage.completion_tokens == 40
    assert (
        llm.generate("one two three one two three one two", **{**usual, **options}).tokens
        == found.tokens
    )


def test_dry_ends_a_loop(llm: llmkit.LLM) -> None:
    loop = "the cat sat on the mat. " * 12
    plain = llm.generate(loop, max_tokens=24, temperature=0)
    broken = llm.generate(
        loop, max_tokens=24, temperature=0, dry_multiplier=20.0, dry_sequence_breakers=[]
    )
    assert (
        plain.text.lower().count("cat sat on the mat")
        >= 2
        > broken.text.lower().count("cat sat on the mat")
    )


@pytest.mark.parametrize(
    "options",
    [
        {"mirostat": 3},
        {"mirostat": 1.0},
        {"xtc_probability": 2},
        {"dry_base": 0.5},
        {"dry_sequence_breakers": [""]},
    ],
)
def test_rarer_samplers_are_checked(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError, match=next(iter(options))):
        SamplingParams(**options)
