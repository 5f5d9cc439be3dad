"""The scheduler and the engine thread on the fake model: exact equality with its reference,
whatever runs beside."""

import gc
import itertools
import random
import threading
import time
from collections.abc import Callable

import pytest
from fake_runner import BAD_SEED, FakeRunner, piece
from fakes import FakeClient, ask, wait_for

from llmkit.engine.batch import Batch
from llmkit.engine.detokenize import Detokenizer
from llmkit.engine.request import Request
from llmkit.errors import EngineError, ModelUnloadedError, QueueFullError
from llmkit.protocol import FinishReason, SamplingParams
from llmkit.protocol.stream import Channel, Stream


def test_batched_equals_one_by_one(fake: FakeClient) -> None:
    rng = random.Random(3)
    prompts = ["".join(rng.choices("abc ", k=rng.randrange(1, 150))) for _ in range(40)]
    streams = [fake.submit(ask(p, max_tokens=12)) for p in prompts]
    for prompt, stream in zip(prompts, streams, strict=True):
        assert stream.result(30).text.encode() == fake.runner.reference(prompt.encode(), 12)


def test_cached_equals_cold_and_is_counted(fake: FakeClient) -> None:
    prompt = "x" * 100
    cold = fake.submit(ask(prompt)).result(30)
    warm = fake.submit(ask(prompt)).result(30)
    longer = fake.submit(ask(prompt + "yz")).result(30)
    assert cold.text == warm.text and cold.usage.cached_tokens == 0
    assert warm.usage.cached_tokens == 99 and longer.usage.cached_tokens >= 99
    assert longer.text.encode() == fake.runner.reference(b"x" * 100 + b"yz", 8)
    assert fake.stats().cached_tokens_total >= 198


def test_a_prefix_that_is_on_disk_is_not_saved_again(fake: FakeClient) -> None:
    for _ in range(2):
        made = Request(
            list(b"keep this. " * 9),
            SamplingParams(temperature=0, max_tokens=0),
            0,
            Detokenizer(piece),
            Channel("saved", fake.abort),
            keep_on_disk=True,
        )
        fake.engine.submit(made)
        assert Stream(made.channel).result(30).finish_reason is FinishReason.LENGTH
    assert len(fake.runner.saved_keys) == 1


def test_decodes_are_in_every_step_of_a_long_prefill() -> None:
    client = FakeClient(runner=FakeRunner(n_ctx=50_000, max_batch_tokens=64, step_s=0.001))
    first = client.submit(ask("a", max_tokens=40_000))
    wait_for(lambda: first.text)
    client.submit(ask("b" * 1500, max_tokens=1)).result(30)
    steps = [
        b
        for b in list(client.runner.batches)
        if any(len(c.tokens) > 1 + c.draft for c in b.chunks) and b.num_tokens > 10
    ]
    assert steps and all(
        any(c.slot == 0 and len(c.tokens) == 1 + c.draft for c in b.chunks) for b in steps
    )
    first.close()
    client.close()


def test_streamed_equals_whole_for_all_readers(fake: FakeClient) -> None:
    whole = fake.submit(ask("hello", max_tokens=20)).result(30).text
    assert "".join(fake.submit(ask("hello", max_tokens=20))) == whole


async def test_async_readers(fake: FakeClient) -> None:
    whole = fake.submit(ask("hello", max_tokens=20)).result(30).text
    assert "".join([piece async for piece in fake.submit(ask("hello", max_tokens=20))]) == whole
    assert (await fake.submit(ask("hello", max_tokens=20))).text == whole


@pytest.mark.parametrize("way", ["break", "close", "drop"])
def test_leaving_a_stream_frees_its_slot(way: str) -> None:
    client = FakeClient(runner=FakeRunner(n_ctx=100_000, step_s=0.001))
    stream = client.submit(ask("a", max_tokens=90_000))
    wait_for(lambda: client.stats().num_running == 1)
    if way == "break":
        for _ in stream:
            break
    elif way == "close":
        stream.close()
    else:
        del stream
        gc.collect()
    wait_for(lambda: client.stats().num_running == 0)
    assert client.submit(ask("b")).result(30).usage.completion_tokens == 8
    client.close()


async def test_leaving_an_async_loop_frees_the_slot() -> None:
    client = FakeClient(runner=FakeRunner(n_ctx=100_000, step_s=0.001))
    async for _ in client.submit(ask("a", max_tokens=90_000)):
        break
    gc.collect()
    wait_for(lambda: client.stats().num_running == 0)
    assert client.submit(ask("b")).result(30).usage.completion_tokens == 8
    client.close()


def test_an_abort_interrupts_its_own_prompt() -> None:
    runner = FakeRunner(n_ctx=5000, max_batch_tokens=2000, step_s=600)
    client = FakeClient(runner=runner)
    long = client.submit(ask("b" * 4000, max_tokens=3))
    wait_for(lambda: runner.batches)
    long.close()
    assert long.wait(30).finish_reason is FinishReason.ABORT, "the step would take ten minutes"  # type: ignore[union-attr]
    assert len(runner.interrupted) == 1
    runner.step_s = 0.0
    assert client.submit(ask("b" * 4000, max_tokens=3)).result(
        30
    ).text.encode() == runner.reference(b"b" * 4000, 3)
    client.close()


def test_the_garbage_collector_may_abort_in_the_middle_of_anything() -> None:
    """A stream that nobody holds any more is aborted on whichever thread collects it: the engine's
    as well, while it has its locks."""
    runner = FakeRunner(n_ctx=5000, step_s=0.001)
    client = FakeClient(runner=runner)
    collected = threading.Event()

    def collecting(act: Callable[[], None]) -> Callable[[], None]:
        dropped = ["dropped", "a"]

        def run() -> None:
            act()
            while dropped:
                client.abort(dropped.pop())
            collected.set()

        return run

    runner.clear_interrupt = collecting(runner.clear_interrupt)  # type: ignore[method-assign]
    runner.interrupt = collecting(runner.interrupt)  # type: ignore[method-assign]
    first = client.submit(ask("a", max_tokens=4000))
    assert collected.wait(30)
    first.close()
    assert client.submit(ask("b")).result(30).text.encode() == runner.reference(b"b", 8)
    client.close()


def was_interrupted(runner: FakeRunner, steps: list[Batch]) -> bool:
    """Whether any of these was: others, of what is typed last say, may be."""
    return any(step is batch for step in steps for batch in runner.interrupted)


def test_an_abort_costs_a_decoding_stream_no_token() -> None:
    """An editor that cancels a long prompt at each key, beside a stream: one token a step, whatever
    is cancelled."""
    runner = FakeRunner(n_ctx=5000, max_batch_tokens=2000, step_s=0.02)
    client = FakeClient(runner=runner)
    other = client.submit(ask("other", max_tokens=60))
    wait_for(lambda: other.text)
    while not other.finished:
        typed = client.submit(ask("b" * 4000, max_tokens=3, seed=1))
        time.sleep(0.01)
        typed.close()
    assert other.result(30).text.encode() == runner.reference(b"other", 60)
    steps = runner.of_first(0)
    assert not was_interrupted(runner, steps)
    assert len(steps) <= 62, "a step, a token"
    client.close()


def test_a_prompt_that_is_computed_beside_an_aborted_one_loses_nothing() -> None:
    runner = FakeRunner(n_ctx=5000, max_batch_tokens=2000, step_s=0.3)
    client = FakeClient(runner=runner)
    other = client.submit(ask("o" * 900, max_tokens=3))
    long = client.submit(ask("b" * 4000, max_tokens=3))
    wait_for(lambda: any(len(b.chunks) == 2 for b in runner.batches))
    long.close()
    assert other.result(30).text.encode() == runner.reference(b"o" * 900, 3)
    assert not was_interrupted(runner, runner.of_first(0))
    client.close()


def test_aborted_while_waiting() -> None:
    client = FakeClient(runner=FakeRunner(n_slots=1, n_ctx=100_000, step_s=0.001))
    running, waiting = client.submit(ask("a", max_tokens=90_000)), client.submit(ask("b"))
    waiting.close()
    assert waiting.wait(30).finish_reason is FinishReason.ABORT  # type: ignore[union-attr]
    running.close()
    client.close()


def test_end_token_stop_string_length_and_context() -> None:
    client = FakeClient(runner=FakeRunner(n_ctx=40, end_after=20))
    ended = client.submit(ask("a" * 10, max_tokens=30)).result(30)
    assert ended.finish_reason is FinishReason.STOP and ended.usage.completion_tokens == 10
    full = client.submit(ask("a" * 10, max_tokens=None, ignore_eos=True)).result(30)
    assert full.finish_reason is FinishReason.LENGTH and full.usage.completion_tokens == 30
    text = client.submit(ask("b" * 5, max_tokens=10)).result(30).text
    stopped = client.submit(ask("b" * 5, max_tokens=10, stop=(text[3:5],))).result(30)
    assert (
        stopped.text == text[: text.index(text[3:5])] and stopped.finish_reason is FinishReason.STOP
    )
    client.close()


def test_a_failed_step_ends_its_requests_only(fake: FakeClient) -> None:
    fake.runner.fail_next = "llama_decode returned -3"
    with pytest.raises(EngineError, match="-3"):
        fake.submit(ask("a")).result(30)
    assert fake.submit(ask("a")).result(30).text.encode() == fake.runner.reference(b"a", 8)


def test_without_room_the_youngest_waits_and_loses_nothing() -> None:
    client = FakeClient(runner=FakeRunner(n_ctx=10_000))
    runner, both = client.runner, threading.Event()
    lacked: list[Batch] = []

    def lack(batch: Batch) -> None:
        assert both.wait(30)
        decodes = [chunk for chunk in batch.chunks if chunk.start > 20]
        if len(decodes) == 2 and not lacked:
            lacked.append(batch)
            runner.no_room_next = True

    runner.before = lack
    old = client.submit(ask("old", max_tokens=100))
    young = client.submit(ask("young", max_tokens=200))
    both.set()
    assert old.result(30).text.encode() == client.runner.reference(b"old", 100)
    assert young.result(30).text.encode() == client.runner.reference(b"young", 200)
    assert client.stats().preemptions_total == 1
    client.close()


def test_a_request_that_never_fits_fails() -> None:
    client = FakeClient(runner=FakeRunner(capacity=20))
    with pytest.raises(EngineError, match="room"):
        client.submit(ask("a prompt of more than twenty tokens")).result(30)
    assert client.submit(ask("short", max_tokens=4)).result(30).usage.completion_tokens == 4
    client.close()


def test_a_broken_runner_leaves_nobody_waiting() -> None:
    client = FakeClient()
    client.runner.crash_next = True
    with pytest.raises(EngineError, match="engine stopped"):
        client.submit(ask("a")).result(30)
    with pytest.raises(ModelUnloadedError):
        client.submit(ask("a"))


def test_close_ends_running_requests() -> None:
    client = FakeClient(runner=FakeRunner(n_slots=1, n_ctx=100_000, step_s=0.001))
    running, waiting = client.submit(ask("a", max_tokens=90_000)), client.submit(ask("b"))
    wait_for(lambda: running.text)
    client.close()
    for stream in (running, waiting):
        with pytest.raises(ModelUnloadedError):
            stream.result(30)


def test_the_queue_is_bounded() -> None:
    client = FakeClient(runner=FakeRunner(n_slots=1, n_ctx=100_000, step_s=0.001), max_waiting=3)
    streams = [client.submit(ask("a", max_tokens=90_000))]
    wait_for(lambda: client.stats().num_running == 1)
    streams += [client.submit(ask("b")) for _ in range(3)]
    wait_for(lambda: client.stats().num_waiting == 3)
    with pytest.raises(QueueFullError):
        client.submit(ask("c"))
    client.close()


def test_many_threads_submit_and_abort() -> None:
    client = FakeClient(runner=FakeRunner(n_slots=3, n_ctx=300))
    failures: list[str] = []

    def work(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(30):
            prompt = "p" * rng.randrange(1, 200)
            stream = client.submit(ask(prompt, max_tokens=5))
            if rng.random() < 0.3:
                stream.close()
                if stream.wait(30) is None:
                    failures.append("lost")
            elif stream.result(30).text.encode() != client.runner.reference(prompt.encode(), 5):
                failures.append(prompt)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(60)
    assert not failures
    wait_for(lambda: client.stats().num_running == client.stats().num_waiting == 0)
    client.close()


def test_one_wake_finds_the_whole_step() -> None:
    """All streams of a step are stored before the first reader is woken: the bridge's one message a
    step depends on it."""
    client = FakeClient(runner=FakeRunner(n_slots=4, n_ctx=5000, step_s=0.02))
    streams = [client.submit(ask(c, max_tokens=4000)) for c in "abcd"]
    wait_for(lambda: all(s.text for s in streams))
    here, seen = threading.current_thread(), []

    def look() -> None:
        if (
            threading.current_thread() is not here
        ):  # listen() may call at once, in the middle of a step
            seen.append([len(s.text) for s in streams])

    streams[0].listen(look)
    wait_for(lambda: len(seen) > 9)
    for before, after in itertools.pairwise(
        seen[:10]
    ):  # the later ones may have begun a step after the first
        assert [b - a for a, b in zip(before, after, strict=True)] == [1] * 4
    client.close()


def test_one_request_that_cannot_be_set_up_fails_alone(fake: FakeClient) -> None:
    good, bad = fake.submit(ask("good", max_tokens=40)), fake.submit(ask("bad", seed=BAD_SEED))
    with pytest.raises(EngineError, match="no such sampler"):
        bad.result(30)
    assert good.result(30).text.encode() == fake.runner.reference(b"good", 40)
    assert fake.submit(ask("bad", max_tokens=3)).result(30).usage.completion_tokens == 3, (
        "its slot is usable again"
    )
