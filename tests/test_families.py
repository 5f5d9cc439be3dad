"""Every kind of memory: sliding window (the real Gemma 3), recurrent and hybrid (tiny random
models), and LoRA adapters."""

from __future__ import annotations

import itertools
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models

from llmkit.backend.llama import LlamaRunner
from llmkit.backend.model import LlamaModel
from llmkit.engine.batch import Batch, Chunk, Open, Truncate
from llmkit.errors import InvalidRequestError, ModelLoadError
from llmkit.models.registry import resolve
from llmkit.protocol import Completion, GenerationRequest, SamplingParams
from llmkit.runtime.local import LocalEngine

pytestmark = pytest.mark.model
_ids = itertools.count()
TALK = "hello there, this is a talk of some length, so that it can be parked and found again. "


def submit(engine: LocalEngine, prompt: str | tuple[int, ...], **options: Any) -> Any:
    lora = options.pop("lora", None)
    params = SamplingParams(**{"temperature": 0, "max_tokens": 12, "ignore_eos": True, **options})
    return engine.submit(GenerationRequest(f"x{next(_ids)}", params, prompt=prompt, lora=lora))


def run(engine: LocalEngine, prompt: str | tuple[int, ...], **options: Any) -> Completion:
    completion: Completion = submit(engine, prompt, **options).result(300)
    return completion


@pytest.mark.parametrize("family", ["llama", "mamba", "jamba"])
def test_a_cached_beginning_is_the_computed_one(tmp_path: Path, family: str) -> None:
    path = tiny_models.write(tmp_path / f"{family}.gguf", family)
    engine = LocalEngine(path, n_ctx=512, n_slots=2)
    first = run(engine, TALK)
    run(engine, "something else, which takes the other slot")
    going_on = (*engine.tokenize(TALK), *first.tokens, 50, 51)
    warm = run(engine, going_on)
    assert warm.usage.cached_tokens >= len(going_on) - 4, "all of it but the end is continued"
    for i in range(3):
        run(
            engine, f"{i} others come and take the slots, and the talk is parked meanwhile, we hope"
        )
    parked = run(engine, going_on)
    cut = run(engine, tuple(going_on[:60]))
    engine.close()
    engine = LocalEngine(path, n_ctx=512, n_slots=2)
    cold = run(engine, going_on)
    assert cold.usage.cached_tokens == 0 and cold.tokens == warm.tokens == parked.tokens
    assert run(engine, tuple(going_on[:60])).tokens == cut.tokens, (
        "where nothing can be cut off, it is computed again"
    )
    engine.close()


@pytest.mark.parametrize("family", ["mamba", "jamba"])
def test_a_state_that_cannot_be_cut_is_never_guessed_with(tmp_path: Path, family: str) -> None:
    engine = LocalEngine(tiny_models.write(tmp_path / "m.gguf", family), n_ctx=512, n_slots=3)
    streams = [submit(engine, "aaaa bbbb " * (5 + i), max_tokens=60) for i in range(5)]
    together = [s.result(300).tokens for s in streams]
    assert engine.stats().draft_tokens_total == 0
    assert [len(t) for t in together] == [60] * 5
    engine.close()


def test_an_abort_in_a_recurrent_prompt(tmp_path: Path) -> None:
    engine = LocalEngine(tiny_models.write(tmp_path / "m.gguf", "mamba"), n_ctx=512, n_slots=1)
    alone = run(engine, TALK * 3).tokens
    stream = submit(engine, TALK * 4, max_tokens=100)
    time.sleep(0.01)
    stream.close()
    assert run(engine, TALK * 3).tokens == alone
    engine.close()


def test_a_sliding_window_is_cut_rightly() -> None:
    """The real Gemma 3, beyond its window of 512: after cutting back, the logits are those of a
    fresh computation."""
    model = LlamaModel(resolve("gemma3-270m").path)
    assert model.has_sliding_window
    runner = LlamaRunner(model, n_ctx=1024, n_slots=2)
    tokens = model.vocab.tokenize(
        "The chronicle of the town begins with a mill, a bridge and a quarrel about both. " * 45
    )[:700]
    runner.execute(
        Batch(
            (),
            (
                Open(0, 1, SamplingParams(temperature=0, logprobs=0), ()),
                Open(1, 2, SamplingParams(temperature=0, logprobs=0), ()),
            ),
        )
    )

    def prefill(slot: int, upto: int, start: int = 0) -> Any:
        output = None
        for at in range(start, upto, 100):
            output = runner.execute(
                Batch((Chunk(slot, at, tokens[at : at + 100], at + 100 >= upto),))
            )
        return output

    prefill(0, 700)
    runner.execute(Batch((), (Truncate(0, 600),)))
    cut, fresh = prefill(0, 700, 600), prefill(1, 700)
    assert cut.tokens == fresh.tokens
    assert np.isclose(cut.scores[0][0].logprob, fresh.scores[0][0].logprob, atol=1e-3)
    runner.close()
    model.close()


def test_gemma_end_to_end() -> None:
    engine = LocalEngine("gemma3-270m", n_ctx=1024, n_slots=2)
    text = "The history of the town begins with a mill and a bridge, says the chronicle. " * 40
    cold, warm, again = (run(engine, text, logprobs=5) for _ in range(3))
    assert (
        warm.usage.cached_tokens == warm.usage.prompt_tokens - 1 > 512
        and warm.tokens == again.tokens
    )
    # Other batch shapes, other roundings: the choice may differ where two tokens are about as
    # likely.
    likely = {token: logprob for token, _, logprob in cold.logprobs[0].top}
    assert likely[warm.tokens[0]] > cold.logprobs[0].top[0][2] - 1
    engine.close()


def test_adapters_at_load_and_by_request(tmp_path: Path) -> None:
    base = tiny_models.write(tmp_path / "base.gguf", "llama")
    style = tiny_models.write_lora(tmp_path / "style.gguf")
    plain_engine = LocalEngine(base, n_ctx=512, n_slots=4)
    plain = run(plain_engine, TALK, logprobs=0)
    plain_engine.close()
    engine = LocalEngine(base, n_ctx=512, n_slots=4, lora={style: 1.0})
    styled = run(engine, TALK, logprobs=0)
    assert [e.logprob for e in styled.logprobs] != [e.logprob for e in plain.logprobs]
    without = run(engine, TALK, lora=(), logprobs=0)
    assert without.usage.cached_tokens == 0, "what the adapter computed is of no use without it"
    assert without.tokens == plain.tokens and np.allclose(
        [e.logprob for e in without.logprobs], [e.logprob for e in plain.logprobs], atol=1e-3
    )
    mixed = [
        submit(engine, TALK, lora=lora, logprobs=0)
        for lora in (None, (), (("style", 1.0),), (("style", 0.5),), ())
    ]
    results = [m.result(300) for m in mixed]
    assert (
        results[0].tokens == results[2].tokens == styled.tokens
        and results[1].tokens == results[4].tokens == plain.tokens
    )
    with pytest.raises(InvalidRequestError, match=r"no adapter 'other'.*style"):
        submit(engine, TALK, lora=(("other", 1.0),))
    engine.close()


def test_an_adapter_that_is_none(tmp_path: Path) -> None:
    base = tiny_models.write(tmp_path / "base.gguf", "llama")
    with pytest.raises(ModelLoadError, match="adapter"):
        LocalEngine(base, lora=base)
    with pytest.raises(ModelLoadError, match="adapter"):
        LocalEngine(base, lora=tmp_path / "missing.gguf")


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("smollm2", {"n_ctx": 512, "n_slots": 4}),
        ("smollm2", {"n_ctx": 2048, "n_slots": 8}),
        ("gemma3-270m", {"n_ctx": 1024, "n_slots": 4}),
    ],
)
def test_what_is_estimated_is_what_is_taken(model: str, options: dict[str, int]) -> None:
    """Resident memory after use, in a process of its own; the bound is twice what was measured at
    most (docs/performance.md)."""
    code = f"""
import psutil, llmkit, llmkit.llm, llmkit.runtime.local
import llmkit.backend.llama, llmkit.backend.grammar
llmkit.backend.library.start()
process = psutil.Process()
need, before = llmkit.estimate({model!r}, **{options}), process.memory_info().rss
llm = llmkit.load({model!r}, share=False, **{options})
prompts = [f"{{i}} " + "the cat sat on a mat and " * 20 for i in range({options["n_slots"]})]
llm.generate(prompts, max_tokens=2)
print((process.memory_info().rss - before) / need.total_bytes)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert 0.9 < float(done.stdout) < 1.1, done
