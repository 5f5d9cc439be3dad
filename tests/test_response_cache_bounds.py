"""The size and age of stored answers, whose they are, and computations that several share: on the
cache alone."""

from __future__ import annotations

import gc
import threading
import time
from concurrent.futures import Future
from typing import Any

import pytest
from fake_runner import FakeRunner
from fakes import FakeClient, ask, wait_for

from llmkit.gateway.response_cache import ResponseCache
from llmkit.protocol import (
    EmbeddingRequest,
    Embeddings,
    GenerationRequest,
    Message,
    SamplingParams,
)

MB = 1 << 20


def cache() -> ResponseCache:
    return ResponseCache(8 * MB, 600)


def answered(client: FakeClient, kept: ResponseCache, prompt: str, **more: Any) -> bool:
    """Whether the answer to a prompt was there; right in any case."""
    request = ask(prompt, max_tokens=more.pop("max_tokens", 20), **more)
    key = kept.key_of(client, request)
    assert key is not None
    (stream,), hit = kept.streams(key, client, request)
    assert stream.result(30).text.encode() == client.runner.reference(prompt.encode(), 20)
    return hit


def test_old_answers_are_computed_again(fake: FakeClient) -> None:
    now = [0.0]
    kept = ResponseCache(MB, 60, now=lambda: now[0])
    assert [answered(fake, kept, "a") for _ in range(2)] == [False, True]
    now[0] = 59.9
    assert answered(fake, kept, "a")
    now[0] = 60.0
    assert not answered(fake, kept, "a") and len(kept) == 1


def test_it_never_grows_beyond_its_size(fake: FakeClient) -> None:
    kept = ResponseCache(60_000, 600)
    for i in range(60):
        answered(fake, kept, f"number {i}")
        assert kept.num_bytes <= 60_000
    assert 3 < len(kept) < 30
    assert answered(fake, kept, "number 59") and not answered(fake, kept, "number 0")


def test_what_was_used_last_stays(fake: FakeClient) -> None:
    kept = ResponseCache(60_000, 600)
    answered(fake, kept, "favourite")
    for i in range(60):
        answered(fake, kept, f"number {i}")
        assert answered(fake, kept, "favourite")


def test_who_fills_it_loses_own_answers_only(fake: FakeClient) -> None:
    kept = ResponseCache(60_000, 600)
    answered(fake, kept, "mine", caller="ann")
    for i in range(100):
        answered(fake, kept, f"flood {i}", caller="eve")
    assert answered(fake, kept, "mine", caller="ann")


def test_an_answer_that_is_too_large_is_not_stored(fake: FakeClient) -> None:
    kept = ResponseCache(10_000, 600)
    assert not answered(fake, kept, "a")
    assert len(kept) == 0 and kept.num_bytes == 0


def test_a_model_that_is_loaded_again_starts_with_nothing() -> None:
    kept = ResponseCache(MB, 600)
    first = FakeClient()
    assert [answered(first, kept, "a") for _ in range(2)] == [False, True]
    second = FakeClient()
    assert not answered(second, kept, "a"), "even one of the same name and second"
    first.close()
    del first
    gc.collect()
    third = FakeClient()
    assert not answered(third, kept, "a")
    assert len(kept) == 2, "what belonged to the one that is gone is forgotten"
    kept.clear("another")
    assert len(kept) == 2
    kept.clear("fake")
    assert len(kept) == kept.num_bytes == 0
    second.close()
    third.close()


def test_a_day_later_a_chat_may_be_another(
    fake: FakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = cache()
    greedy = SamplingParams(temperature=0, max_tokens=5)
    chat = GenerationRequest("r", greedy, messages=(Message("user", "hi"),))
    text = GenerationRequest("r", greedy, prompt="hi")
    keys = kept.key_of(fake, chat), kept.key_of(fake, text)
    monkeypatch.setattr(time, "strftime", lambda _: "2031-01-01")
    later = kept.key_of(fake, chat), kept.key_of(fake, text)
    assert keys[0] != later[0] and keys[1] == later[1]


def test_what_cannot_be_written_down_is_not_stored(fake: FakeClient) -> None:
    assert cache().key_of(fake, ask("half of a pair: \ud800")) is None
    saves = GenerationRequest(
        "r", SamplingParams(temperature=0, max_tokens=0), prompt="a", keep_on_disk=True
    )
    assert cache().key_of(fake, saves) is None, "it is for what it does"


def test_an_abandoned_stream_is_no_leak(fake: FakeClient) -> None:
    kept = cache()
    request = ask("left behind", max_tokens=200)
    key = kept.key_of(fake, request)
    assert key is not None
    kept.streams(key, fake, request)  # nobody holds it
    gc.collect()
    wait_for(lambda: not fake.engine._scheduler.has_work and not kept._flights)


def test_many_threads() -> None:
    client, kept = FakeClient(runner=FakeRunner(n_slots=8)), ResponseCache(40_000, 600)
    wrong: list[str] = []

    def run(number: int) -> None:
        for i in range(60):
            prompt = f"p{(i * 7 + number) % 11}"
            request = ask(prompt, max_tokens=12)
            key = kept.key_of(client, request)
            assert key is not None
            (stream,), _ = kept.streams(key, client, request, fresh=i % 9 == 0)
            if i % 5 == 4:
                stream.close()
                continue
            text = stream.result(30).text.encode()
            wrong.extend([prompt] if text != client.runner.reference(prompt.encode(), 12) else [])

    threads = [threading.Thread(target=run, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong and not any(t.is_alive() for t in threads)
    assert kept.num_bytes <= 40_000
    wait_for(lambda: not client.engine._scheduler.has_work and not kept._flights)
    client.close()


class Vectors(FakeClient):
    """Answers when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[str, Future[Embeddings]]] = []
        self.aborted: list[str] = []

    def embed(self, request: EmbeddingRequest) -> Future[Embeddings]:
        self.asked.append((request.request_id, Future()))
        return self.asked[-1][1]

    def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)
        super().abort(request_id)


def test_vectors_are_computed_once_for_all_who_wait() -> None:
    client, kept = Vectors(), cache()
    requests = [EmbeddingRequest(f"e{i}", ("a", "b")) for i in range(3)]
    key = kept.key_of(client, requests[0])
    assert key is not None and all(kept.key_of(client, r) == key for r in requests)
    futures = [kept.embed(key, client, r)[0] for r in requests]
    assert len(client.asked) == 1 and kept.joined == 2
    assert futures[0].cancel() and not client.aborted, "others still wait"
    made = Embeddings(b"\0" * 16, 2, (1, 1))
    client.asked[0][1].set_result(made)
    assert futures[1].result(30) is made and futures[2].result(30) is made
    assert kept.embed(key, client, requests[0])[0].result(30) is made and kept.hits == 3
    other = EmbeddingRequest("e9", ("c",))
    other_key = kept.key_of(client, other)
    assert other_key is not None and other_key != key
    waiter = kept.embed(other_key, client, other)[0]
    assert waiter.cancel() and client.asked[1][1].cancelled()
    assert kept.embed(other_key, client, other)[1] is False, "asked for anew"
    client.asked[2][1].set_exception(ValueError("no"))
    assert len(kept) == 1 and not kept._flights
    client.close()


def test_a_running_computation_is_aborted_where_it_runs() -> None:
    client, kept = Vectors(), cache()
    request = EmbeddingRequest("e", ("a",))
    key = kept.key_of(client, request)
    assert key is not None
    waiter, _ = kept.embed(key, client, request)
    assert client.asked[0][1].set_running_or_notify_cancel()
    assert waiter.cancel() and client.aborted == ["e"]
    client.close()
