"""Many short requests with random aborts: memory stays flat, every slot comes free, and what was
not aborted equals a run alone."""

from __future__ import annotations

import itertools
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import tiny_models
from fakes import wait_for

from llmkit.engine.integrity import check as check_books
from llmkit.protocol import Completion, FinishReason, GenerationRequest, SamplingParams
from llmkit.protocol.stream import Stream
from llmkit.runtime.local import LocalEngine

pytestmark = pytest.mark.model
_ids = itertools.count()
PREFIXES = [
    "",
    "You are a helpful assistant who answers in one word, always and without exception, please. ",
    "Once upon a time ",
]


def submit(engine: LocalEngine, job: tuple[str, int, float, int], **request: Any) -> Stream:
    prompt, max_tokens, temperature, seed = job
    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=seed)
    return engine.submit(GenerationRequest(f"soak-{next(_ids)}", params, prompt=prompt, **request))


@pytest.mark.parametrize(
    ("family", "count", "kinds"),
    [("tiny", 1000, 40), ("smollm2", int(os.environ.get("SOAK", "60")), 12)],
)
def test_a_soak_ends_as_it_began(tmp_path: Path, family: str, count: int, kinds: int) -> None:
    model = tiny_models.write(tmp_path / "tiny.gguf", "llama") if family == "tiny" else "smollm2"
    engine = LocalEngine(model, n_ctx=256, n_slots=4, deterministic=True, host_cache_mb=16)
    rng = random.Random(5)
    jobs = [
        (
            rng.choice(PREFIXES) + f"word{i} " * rng.randrange(1, 9),
            rng.randrange(1, 12),
            rng.choice([0.0, 1.0]),
            i,
        )
        for i in range(kinds)
    ]
    alone: list[Completion] = [submit(engine, job).result(300) for job in jobs]
    before = None
    running: list[tuple[int, Stream]] = []
    for i in range(count):
        kind = rng.randrange(kinds)
        stream = submit(
            engine, jobs[kind], priority=rng.randrange(2), caller=f"c{rng.randrange(5)}"
        )
        if rng.random() < 0.15:
            stream.close()
        running.append((kind, stream))
        while len(running) > 24:
            check(alone, *running.pop(rng.randrange(len(running))))
        if i == count // 3:
            before = psutil.Process().memory_info().rss
    for entry in running:
        check(alone, *entry)
    assert before is not None and psutil.Process().memory_info().rss - before < 40 << 20
    wait_for(
        lambda: (
            engine.stats().num_running
            == engine.stats().num_waiting
            == engine.stats().kv_used_tokens
            == 0
        )
    )
    check_books(engine._engine._scheduler)
    assert len(engine._runner._samplers) <= engine.stats().num_slots, (
        "samplers end with their requests"
    )
    engine.close()


def check(alone: list[Completion], kind: int, stream: Stream) -> None:
    completion = stream.wait(60)
    assert completion is not None
    if completion.finish_reason is FinishReason.ABORT:
        assert alone[kind].tokens[: len(completion.tokens)] == completion.tokens
    else:
        assert (completion.tokens, completion.text) == (alone[kind].tokens, alone[kind].text)


def test_a_storm_of_interrupts() -> None:
    """Ctrl-C again and again, at any moment: each ends what runs, and the next call works."""
    code = """
import llmkit, sys
llm = llmkit.load("smollm2", n_ctx=512, n_slots=2, share=False)
print("ready", flush=True)
stops = 0
while stops < 8:
    try:
        llm.generate(["Once upon a time", "word " * 200], max_tokens=400, ignore_eos=True)
    except KeyboardInterrupt:
        stops += 1
        print("stopped", flush=True)
import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)
print(llm.generate("The", max_tokens=3).usage.completion_tokens, llm.stats.num_running)
llm.unload()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    rng = random.Random(2)
    import time

    for _ in range(400):
        if process.poll() is not None:
            break
        time.sleep(rng.uniform(0.05, 0.4))
        try:
            os.kill(process.pid, signal.SIGINT)
        except ProcessLookupError:
            break
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 0 and out.endswith("3 0\n") and out.count("stopped") == 8, (
        out,
        errors,
    )
