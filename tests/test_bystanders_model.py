"""Nobody can hurt a neighbour, on the real models: a stream beside a hostile caller keeps its
text."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fakes import wait_for
from test_bystanders import repeating

from llmkit.errors import InvalidRequestError, QueueFullError
from llmkit.protocol import EmbeddingRequest, GenerationRequest, Grammar, SamplingParams
from llmkit.runtime.local import LocalEngine


@pytest.fixture(scope="module")
def real() -> Iterator[LocalEngine]:
    local = LocalEngine("smollm2", n_ctx=2048, n_slots=4, max_waiting=64)
    yield local
    local.close()


def bystander(
    engine: LocalEngine, deed: Callable[[], object], pause: float, tokens: int = 60
) -> tuple[str, str, float]:
    """The text of a stream alone, the same beside the deed, and how many steps of the engine the
    stream was in, of those that computed anything."""
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    alone = (
        engine.submit(
            GenerationRequest(
                f"alone{time.monotonic_ns()}", params, prompt="Once upon a time", caller="ann"
            )
        )
        .result(300)
        .text
    )
    stream = engine.submit(
        GenerationRequest(
            f"beside{time.monotonic_ns()}", params, prompt="Once upon a time", caller="ann"
        )
    )
    wait_for(lambda: stream.text)
    before = engine.stats()
    with repeating(lambda: stream.finished or deed(), pause):
        text = stream.result(120).text
    made, steps = tokens, engine.stats().steps_total - before.steps_total
    return alone, text, made / max(steps, 1)


@pytest.mark.model
def test_cancelled_prompts_cost_the_real_stream_nothing_but_time(real: LocalEngine) -> None:
    words = "the quick brown fox jumps over the lazy dog " * 150

    def typed() -> None:
        prompt = f"{time.monotonic_ns()} {words}"
        real.submit(
            GenerationRequest(
                f"c{time.monotonic_ns()}", SamplingParams(max_tokens=5), prompt=prompt, caller="eve"
            )
        ).close()

    alone, text, share = bystander(real, typed, 0.1)
    assert text[:20] == alone[:20] and share > 0.8, "a token in nearly every step"


@pytest.mark.model
@pytest.mark.parametrize(
    "grammar",
    [
        Grammar("gbnf", "root ::= (" + " | ".join(f'"w{i:05}" [a-z]' for i in range(1500)) + ")+"),
        Grammar(
            "regex", "(" + "|".join(f"[a-z]{{1,{i % 7 + 1}}}{i}" for i in range(600)) + "){1,40}"
        ),
        Grammar("gbnf", 'root ::= (a | b)+\na ::= [a-z]* a? "x" | "y"\nb ::= a a | [a-f]+ b? "z"'),
    ],
    ids=["cases", "regex", "ambiguous"],
)
def test_a_heavy_grammar_waits_for_itself_alone(real: LocalEngine, grammar: Grammar) -> None:
    def deed() -> None:
        params = SamplingParams(temperature=1.0, max_tokens=20, grammar=grammar)
        try:
            real.submit(
                GenerationRequest(f"g{time.monotonic_ns()}", params, prompt="Say:", caller="eve")
            ).wait(0.5)
        except (InvalidRequestError, QueueFullError):
            pass

    alone, text, share = bystander(real, deed, 0.02)
    assert text[:20] == alone[:20] and share > 0.5


@pytest.mark.model
def test_samplers_are_made_off_the_engine_thread(real: LocalEngine) -> None:
    breakers = tuple("abcdefghijklmnop")
    request = GenerationRequest(
        "dry",
        SamplingParams(max_tokens=1, dry_multiplier=1.0, dry_sequence_breakers=breakers),
        prompt="Hi",
        caller="eve",
        n=60,
    )
    engine_thread = real._engine._thread
    made: list[threading.Thread] = []
    build = real._runner.sampler

    def note(*args: Any) -> Any:
        made.append(threading.current_thread())
        return build(*args)

    real._runner.sampler = note  # type: ignore[method-assign]
    try:
        assert all(s.result(300).usage.completion_tokens == 1 for s in real.submit_choices(request))
    finally:
        real._runner.sampler = build  # type: ignore[method-assign]
    assert len(made) == 60 and engine_thread not in made
    assert len(real._runner._chains._known) == 1, "llama.cpp looks through the vocabulary once"


@pytest.mark.model
def test_a_grammar_that_works_elsewhere_gives_the_same_text(
    real: LocalEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if every call of it took long: the request sits steps out, and what comes of it is what
    came before."""
    fields = {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer"}}
    schema = Grammar(
        "json_schema",
        json.dumps({"type": "object", "properties": fields, "required": list(fields)}),
    )

    def made(temperature: float) -> str:
        params = SamplingParams(
            temperature=temperature, seed=11, max_tokens=60, grammar=schema, speculate=False
        )
        return (
            real.submit(
                GenerationRequest(f"e{time.monotonic_ns()}", params, prompt="A person as JSON: ")
            )
            .result(300)
            .text
        )

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
        return (
            real.submit(
                GenerationRequest(
                    f"p{time.monotonic_ns()}", params, prompt=prompt, caller=caller, **more
                )
            )
            .result(30)
            .usage.cached_tokens
        )

    assert cached("victim") == 0 and cached("victim") > 50
    assert cached("eve") == 0, "another caller's prefix is not counted, nor used"
    assert cached("eve", cache_scope="victim") > 50, "who is given another's scope shares it"
    assert cached("a", cache_salt="s") == 0 and cached("b", cache_salt="s") == 0


@pytest.mark.model
def test_embeddings_are_fair_bounded_counted_and_can_be_aborted() -> None:
    import llmkit
    from llmkit.runtime.embedder import LocalEmbedder

    with llmkit.load("minilm", share=False) as llm:
        embedder = llm.engine
        assert isinstance(embedder, LocalEmbedder)
        book = embedder.embed(
            EmbeddingRequest(
                "book",
                tuple(f"page {i} of a long book, with many words on it" for i in range(8000)),
                caller="eve",
            )
        )
        wait_for(lambda: embedder.stats().num_running == 1)
        assert embedder.embed(EmbeddingRequest("one", ("hello",), caller="ann")).result(
            20
        ).num_tokens == (3,)
        assert not book.done(), "one text does not wait for a book"
        embedder.abort("book")
        with pytest.raises(llmkit.EngineError, match="aborted"):
            book.result(30)
        wait_for(lambda: embedder.stats().num_running == 0)
        assert len(embedder._admission) == 0
    with llmkit.load("minilm", share=False, max_waiting=3, name="small") as llm:
        books = [
            llm.engine.embed(EmbeddingRequest(f"b{i}", ("some words " * 60,) * 300, caller="eve"))
            for i in range(3)
        ]
        with pytest.raises(QueueFullError):
            llm.engine.embed(EmbeddingRequest("b4", ("x",), caller="eve"))
        assert llm.engine.embed(EmbeddingRequest("mine", ("hello",), caller="ann")).result(30), (
            "another caller's place is its own"
        )
        refused = [b for b in books if b.done() and isinstance(b.exception(), QueueFullError)]
        assert len(refused) <= 1
        for i in range(3):
            llm.engine.abort(f"b{i}")
