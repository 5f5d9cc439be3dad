"""The real embedded model: equality with references, sampling, stops, limits, memory."""

from __future__ import annotations

import gc
import itertools
import threading
import time

import numpy as np
import pytest
from fakes import wait_for

from llmkit.backend.library import Log
from llmkit.backend.llama import LlamaRunner
from llmkit.backend.model import LlamaModel
from llmkit.backend.vocab import longest_run, on_a_deep_stack
from llmkit.engine.batch import Batch, Chunk, Fork, Open, Truncate
from llmkit.errors import ContextLengthError, InvalidRequestError, ModelUnloadedError
from llmkit.models.registry import resolve
from llmkit.protocol import Completion, FinishReason, GenerationRequest, Message, SamplingParams
from llmkit.runtime.local import LocalEngine

pytestmark = pytest.mark.model
PROMPTS = [
    "The capital of France is",
    "Once upon a time there was a",
    "def add(a, b):",
    "The three primary colors are",
]
# Batch shape changes the arithmetic: chunks of other sizes moved single logits by up to 1.2 here.
TOLERANCE = 2.0


def generate(engine: LocalEngine, prompt: str | tuple[int, ...], **sampling: object) -> Completion:
    params = SamplingParams(**{"temperature": 0, "max_tokens": 16, **sampling})  # type: ignore[arg-type]
    return engine.submit(
        GenerationRequest(f"t{time.monotonic_ns()}", params, prompt=prompt)
    ).result(300)


@pytest.fixture(scope="module")
def model() -> LlamaModel:
    return LlamaModel(resolve("smollm2").path)


@pytest.fixture
def runner(model: LlamaModel):  # type: ignore[no-untyped-def]
    r = LlamaRunner(model, n_ctx=512, n_slots=4)
    yield r
    r.close()


def greedy(
    runner: LlamaRunner, slots: list[int], starts: list[list[int]], steps: int
) -> list[list[int]]:
    """Greedy decoding in given slots side by side."""
    sequences = [list(s) for s in starts]
    runner.execute(
        Batch(
            (),
            tuple(
                op
                for slot in slots
                for op in (
                    Truncate(slot, 0),
                    Open(slot, slot + 1, SamplingParams(temperature=0), ()),
                )
            ),
        )
    )
    done = [0] * len(slots)
    for _ in range(steps):
        chunks = tuple(
            Chunk(slot, n, seq[n:], True)
            for slot, seq, n in zip(slots, sequences, done, strict=True)
        )
        output = runner.execute(Batch(chunks))
        for i, (token,) in enumerate(output.tokens):
            done[i] = len(sequences[i])
            sequences[i].append(token)
    return [s[len(p) :] for s, p in zip(sequences, starts, strict=True)]


def test_a_copied_prefix_has_the_logits_of_a_computed_one(
    runner: LlamaRunner, model: LlamaModel
) -> None:
    """Forced to the same batch shapes, cached equals cold exactly; also while the source runs
    on."""
    prefix, rest = model.vocab.tokenize("word " * 64)[:64], model.vocab.tokenize(PROMPTS[0])
    everywhere = tuple(Open(s, s + 1, SamplingParams(temperature=0), ()) for s in range(4))
    runner.execute(Batch((Chunk(0, 0, prefix, False),), everywhere))
    cold = runner.execute(Batch((Chunk(0, 64, rest, True),))).tokens
    cold_more = [
        runner.execute(Batch((Chunk(0, 64 + len(rest) + i, [100 + i], True),))).tokens
        for i in range(8)
    ]
    warm = runner.execute(Batch((Chunk(2, 64, rest, True),), (Fork(0, 2, 64),))).tokens
    warm_more = [
        runner.execute(Batch((Chunk(2, 64 + len(rest) + i, [100 + i], True),))).tokens
        for i in range(8)
    ]
    assert cold == warm and cold_more == warm_more
    again = runner.execute(Batch((Chunk(0, 64, rest, True),), (Truncate(0, 64),))).tokens
    assert again == cold, "truncated in place"


def test_teacher_forced_logits_of_chunks_agree(model: LlamaModel) -> None:
    tokens = model.vocab.tokenize(
        (
            "In the spring of 1847 the surveyor walked the whole length of the valley with a "
            "compass and two mules. "
        )
        * 6
    )[:120]
    tables = []
    for chunk in (120, 37):
        r = LlamaRunner(model, n_ctx=256, n_slots=1, max_batch_tokens=chunk)
        tables.append(r.logits(tokens))
        r.close()
    assert tables[0].shape == (120, model.vocab.n_tokens)
    difference = np.abs(tables[0] - tables[1])
    assert difference.max() < TOLERANCE and difference.mean() < 0.2


def is_near_greedy(runner: LlamaRunner, prompt: list[int], output: list[int]) -> bool:
    """Each token is within the tolerance of the best one under teacher forcing: greedy up to the
    arithmetic of batch shapes."""
    logits = runner.logits(prompt + output)[len(prompt) - 1 : -1]
    return bool(np.all(logits.max(axis=1) - logits[np.arange(len(output)), output] < TOLERANCE))


def test_batched_is_greedy_for_each(
    engine: LocalEngine, runner: LlamaRunner, model: LlamaModel
) -> None:
    requests = [
        GenerationRequest(f"b{i}", SamplingParams(temperature=0, max_tokens=24), prompt=p)
        for i, p in enumerate(PROMPTS * 2)
    ]
    for prompt, stream in zip(PROMPTS * 2, [engine.submit(r) for r in requests], strict=True):
        assert is_near_greedy(runner, model.vocab.tokenize(prompt), list(stream.result(300).tokens))


def test_same_shapes_give_the_same_tokens(runner: LlamaRunner, model: LlamaModel) -> None:
    starts = [model.vocab.tokenize(p)[:4] for p in PROMPTS]
    alone = [greedy(runner, [0], [s], 12)[0] for s in starts]
    assert [greedy(runner, [0], [s], 12)[0] for s in starts] == alone
    together = greedy(runner, [0, 1, 2, 3], starts, 12)
    assert greedy(runner, [0, 1, 2, 3], starts, 12) == together


def test_streamed_equals_whole(engine: LocalEngine) -> None:
    request = {"temperature": 0, "max_tokens": 30}
    prompt = "Once upon a time, in a small house by the river, there lived a"
    generate(engine, prompt, **request)  # from here on both find the same cached prefix
    whole = generate(engine, prompt, **request)
    stream = engine.submit(GenerationRequest("s", SamplingParams(**request), prompt=prompt))  # type: ignore[arg-type]
    assert "".join(stream) == whole.text == stream.result().text
    assert len(whole.tokens) == 30 and whole.usage.cached_tokens == whole.usage.prompt_tokens - 1


def test_seeds_repeat_and_differ(engine: LocalEngine) -> None:
    generate(engine, PROMPTS[1])
    first = generate(engine, PROMPTS[1], temperature=1.0, seed=11).text
    assert generate(engine, PROMPTS[1], temperature=1.0, seed=11).text == first
    assert len({generate(engine, PROMPTS[1], temperature=1.0, seed=s).text for s in range(5)}) > 1
    assert len({generate(engine, PROMPTS[1], temperature=1.0).text for _ in range(5)}) > 1, (
        "no seed: a fresh one each time"
    )


def test_sampling_parameters_do_what_they_say(engine: LocalEngine) -> None:
    best = generate(engine, PROMPTS[0], max_tokens=1)
    (token,) = best.tokens
    assert (
        generate(engine, PROMPTS[0], max_tokens=1, temperature=5.0, top_k=1).tokens == best.tokens
    )
    assert (
        generate(
            engine, PROMPTS[0], max_tokens=1, temperature=5.0, top_k=0, top_p=0.0001, min_p=0
        ).tokens
        == best.tokens
    )
    assert (
        generate(
            engine, PROMPTS[0], max_tokens=1, temperature=5.0, top_k=0, top_p=1, min_p=1.0
        ).tokens
        == best.tokens
    )
    assert (
        generate(engine, PROMPTS[0], max_tokens=1, logit_bias=((token, -100.0),)).tokens
        != best.tokens
    )
    assert generate(engine, PROMPTS[0], max_tokens=3, logit_bias=((500, 1000.0),)).tokens == (
        500,
        500,
        500,
    )
    assert (
        generate(
            engine, PROMPTS[0], max_tokens=8, temperature=1.0, typical_p=0.2, seed=1
        ).usage.completion_tokens
        == 8
    )
    looping = generate(engine, "a a a a a a a a a a a a", max_tokens=12)
    for name, value in (
        ("repetition_penalty", 3.0),
        ("presence_penalty", 20.0),
        ("frequency_penalty", 20.0),
    ):
        assert (
            generate(engine, "a a a a a a a a a a a a", max_tokens=12, **{name: value}).tokens
            != looping.tokens
        )


def test_stop_strings_end_tokens_and_lengths(engine: LocalEngine) -> None:
    text = generate(engine, PROMPTS[0], max_tokens=20).text
    stop = text[7:12]  # somewhere across tokens
    stopped = generate(engine, PROMPTS[0], max_tokens=20, stop=(stop,))
    assert stopped.text == text[: text.index(stop)] and stopped.finish_reason is FinishReason.STOP
    chat = engine.submit(
        GenerationRequest(
            "e",
            SamplingParams(temperature=0, max_tokens=200),
            messages=(Message("user", "Say yes."),),
        )
    ).result(300)
    assert chat.finish_reason is FinishReason.STOP and "<|im_end|>" not in chat.text
    on = engine.submit(
        GenerationRequest(
            "i",
            SamplingParams(temperature=0, max_tokens=60, ignore_eos=True),
            messages=(Message("user", "Say yes."),),
        )
    )
    assert on.result(300).usage.completion_tokens == 60
    full = generate(engine, PROMPTS[0], max_tokens=None, ignore_eos=True)
    assert (
        full.finish_reason is FinishReason.LENGTH
        and full.usage.total_tokens == engine.description.n_ctx
    )


def test_unicode_comes_whole(engine: LocalEngine) -> None:
    stream = engine.submit(
        GenerationRequest(
            "u",
            SamplingParams(temperature=0, max_tokens=40),
            prompt="😀😃😄😁😆😅😀😃😄😁😆😅😀😃😄",
        )
    )
    pieces = list(stream)
    assert "".join(pieces) == stream.result().text and any(
        ord(c) > 0xFFFF for c in stream.result().text
    )
    assert all("\ufffd" not in p for p in pieces[:-1])


def test_bad_input_never_reaches_c(engine: LocalEngine) -> None:
    n_vocab = engine.description.n_vocab
    with pytest.raises(ContextLengthError):
        generate(engine, "word " * 2000)
    with pytest.raises(ContextLengthError):
        generate(engine, "x" * 10_000_000)
    with pytest.raises(ContextLengthError):
        generate(engine, (5,) * 1024)
    for bad in ((n_vocab,), (-1,), (), (True,)):
        with pytest.raises(InvalidRequestError):
            generate(engine, bad)
    with pytest.raises(InvalidRequestError, match="logit_bias"):
        generate(engine, "a", logit_bias=((n_vocab, 1.0),))
    with pytest.raises(InvalidRequestError, match="Unicode"):
        generate(engine, "a\ud800b")
    with pytest.raises(InvalidRequestError, match="empty"):
        generate(engine, "")
    assert generate(engine, "nul \0 byte", max_tokens=2).usage.completion_tokens == 2
    assert generate(engine, "<|im_end|>", max_tokens=1).usage.prompt_tokens > 1, (
        "what users type is no control token"
    )


def test_a_long_run_of_one_character_is_tokenized_on_a_deep_stack(model: LlamaModel) -> None:
    """Pre-tokenizers that use std::regex recurse for every character of a match."""
    assert (
        longest_run("ab 123\n" * 1000 + "x" * 5000) == 5001
        and longest_run(" \n" * 9000) == 18_000
        and longest_run("x" * 100) == 0
    )
    assert len(model.vocab.tokenize("a" * 20_000)) > 100
    assert model.vocab.tokenize(" " * 600_000), "a run of blanks is cut"
    with pytest.raises(InvalidRequestError, match="without a break") as error:
        model.vocab.tokenize("a" * 600_000, param="input")
    assert error.value.param == "input"


def test_what_fails_on_a_deep_stack_names_its_field() -> None:
    def refuse() -> None:
        raise InvalidRequestError("no", "schema")

    assert on_a_deep_stack(1 << 20, "tools", lambda: 5) == 5
    for work, param in ((lambda: 1 // 0, "tools"), (refuse, "schema")):
        with pytest.raises(InvalidRequestError) as error:
            on_a_deep_stack(1 << 20, "tools", work)
        assert error.value.param == param


def test_stop_in_a_long_prefill_is_quick(
    model: LlamaModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = LocalEngine("smollm2", n_ctx=4096, n_slots=1)
    steps, closed, runner = itertools.count(), threading.Event(), engine._engine._runner
    execute = runner.execute  # whose third step waits until the stream is closed
    monkeypatch.setattr(
        runner, "execute", lambda b: (next(steps) < 2 or closed.wait(60), execute(b))[1]
    )
    stream = engine.submit(
        GenerationRequest(
            "p", SamplingParams(max_tokens=4000, ignore_eos=True), prompt="word and " * 1500
        )
    )
    wait_for(lambda: engine.stats().num_running == 1)
    stream.close()
    closed.set()
    assert stream.wait(30).finish_reason is FinishReason.ABORT  # type: ignore[union-attr]
    assert engine.stats().kv_cached_tokens < 2500, (
        "the step was interrupted, and the rest of the prompt was never begun"
    )
    assert generate(engine, PROMPTS[0], max_tokens=3).usage.completion_tokens == 3
    engine.close()


def test_unload_gives_the_memory_back_under_live_references() -> None:
    psutil = pytest.importorskip("psutil")
    process = psutil.Process()
    kept = []
    sizes = []
    for _ in range(6):
        engine = LocalEngine("smollm2", n_ctx=2048, n_slots=4)
        kept.append((engine, generate(engine, PROMPTS[0], max_tokens=2)))
        loaded = process.memory_info().rss
        engine.close()
        engine.close()
        gc.collect()
        sizes.append(process.memory_info().rss)
        assert loaded - sizes[-1] > 150 << 20, "KV alone is 180 MiB"
    # A leak would be of 180 MiB a time; what other tests left of the heap moves by some MiB.
    assert sizes[-1] - sizes[1] < 60 << 20, sizes
    with pytest.raises(ModelUnloadedError):
        generate(kept[0][0], "a")
    state = kept[0][0].state
    assert state.is_gone and "'smollm2' was unloaded" in str(state.reason)


def test_what_llama_cpp_put_on_a_gpu() -> None:
    """Its own words at a load with CUDA; buffers in main memory are not counted."""
    log = Log()
    for line in (
        "load_tensors:   CPU_Mapped model buffer size =    28.69 MiB\n",
        "load_tensors:        CUDA0 model buffer size =    92.00 MiB\n",
        "llama_kv_cache:      CUDA0 KV buffer size =    90.00 MiB\n",
        "llama_context:  CUDA_Host  output buffer size =     1.50 MiB\n",
        "sched_reserve:      CUDA0 compute buffer size =    98.25 MiB\n",
        "sched_reserve:      CUDA1 compute buffer",
        " size =    10.00 MiB\n",
        "sched_reserve:  CUDA_Host compute buffer size =     3.01 MiB\n",
    ):
        log.add(2, line)
    assert {kind: size / (1 << 20) for kind, size in log.device_bytes().items()} == {
        "weights": 92,
        "kv": 90,
        "compute": 108.25,
    }
    log.clear()
    assert log.device_bytes() == {}
