"""The same deterministic request gets the same answer again, in its dialect, and only to whom it
belongs; those who ask at the same time share one computation."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from fake_runner import FakeRunner
from governed import Governed, dialects, governed, until

from llmkit.gateway.access.identity import Allowance
from llmkit.gateway.guards import Guards, Terms
from llmkit.gateway.response_cache import ResponseCache
from llmkit.protocol import GenerationRequest
from llmkit.protocol.stream import Stream

MB = 1 << 20
LONG = 600  # tokens: seconds of `slow`, until a test lets them pass


def cache(megabytes: float = 8, seconds: float = 600, **options: Any) -> ResponseCache:
    return ResponseCache(int(megabytes * MB), seconds, **options)


def without_ids(text: str) -> Any:
    """An answer without what differs each time."""
    fleeting = ("id", "created", "created_at", "usage", "item_id", "response_id", "sequence_number")
    times = tuple(f"{n}_duration" for n in ("total", "load", "prompt_eval", "eval"))

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items() if k not in (*fleeting, *times)}
        return [plain(v) for v in value] if isinstance(value, list) else value

    lines = [
        line.removeprefix("data: ")
        for line in text.splitlines()
        if line and not line.startswith(("event:", ":")) and "[DONE]" not in line
    ]
    return [plain(json.loads(line)) for line in lines]


def text_in(answers: Any) -> str:
    """All the text of an answer, streamed or not."""
    found = []

    def look(value: Any, key: str = "") -> None:
        if isinstance(value, dict):
            for name, each in value.items():
                look(each, name)
        elif isinstance(value, list):
            for each in value:
                look(each, key)
        elif isinstance(value, str) and key in ("content", "text", "delta", "response"):
            found.append(value)

    for answer in answers:  # a stream of responses says all of it again in the end
        kind = str(answer.get("type", ""))
        if kind == "response.output_text.delta" or not kind.startswith("response."):
            look(answer)
    return "".join(found)


@pytest.mark.parametrize("path", dialects(1))
@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_is_given_again_in_its_dialect(path: str, stream: bool) -> None:
    async with governed(cache=cache()) as gate:
        body = dialects(12, stream=stream)[path]
        first = await gate.post(path, body)
        steps = len(gate.model.runner.batches)
        again = await gate.post(path, body)
        assert (first.headers["x-llmkit-cache"], again.headers["x-llmkit-cache"]) == (
            "miss",
            "hit",
        )
        assert len(gate.model.runner.batches) == steps, "nothing was computed"
        before, after = without_ids(first.body.decode()), without_ids(again.body.decode())
        assert text_in(before) == text_in(after) and len(text_in(after)) == 12
        assert before[-1] == after[-1]
        assert first.headers["Content-Type"] == again.headers["Content-Type"]
        assert again.body.decode().count("[DONE]") == first.body.decode().count("[DONE]")
        assert [r.cache for r in gate.records] == ["miss", "hit"]
        assert gate.records[0].usage.completion_tokens == gate.records[1].usage.completion_tokens
        used = gate.records[1].usage
        assert used.cached_tokens == used.prompt_tokens, "all of its prompt was there"
        assert (gate.cache.hits, gate.cache.misses, len(gate.cache)) == (1, 1, 1)


async def test_streamed_or_not_is_the_same_answer() -> None:
    async with governed(cache=cache()) as gate:
        path = "/v1/chat/completions"
        whole = await gate.post(path, dialects(12)[path])
        streamed = await gate.post(path, dialects(12, stream=True)[path])
        assert streamed.headers["x-llmkit-cache"] == "hit"
        assert text_in(without_ids(streamed.body.decode())) == text_in(
            without_ids(whole.body.decode())
        )
        other = await gate.post("/v1/messages", dialects(12)["/v1/messages"])
        assert other.headers["x-llmkit-cache"] == "hit", "so is another dialect's"


BASE = {**dialects(6)["/v1/chat/completions"]}
SAMPLED = {**BASE, "temperature": 0.8}


@pytest.mark.parametrize(
    ("body", "stored"),
    [
        (BASE, True),
        ({**SAMPLED, "seed": 3}, True),
        ({**SAMPLED, "top_k": 1}, True),
        (SAMPLED, False),
        ({k: v for k, v in BASE.items() if k != "temperature"}, False),
        ({**BASE, "n": 2}, True),
        ({**BASE, "logprobs": True, "top_logprobs": 1}, True),
    ],
)
async def test_only_what_is_to_be_the_same_each_time_is_stored(
    body: dict[str, Any], stored: bool
) -> None:
    async with governed(cache=cache()) as gate:
        first = await gate.post("/v1/chat/completions", body)
        second = await gate.post("/v1/chat/completions", body)
        assert first.code == second.code == 200
        assert first.headers.get("x-llmkit-cache") == ("miss" if stored else None)
        assert second.headers.get("x-llmkit-cache") == ("hit" if stored else None)
        if stored:
            assert without_ids(first.body.decode()) == without_ids(second.body.decode())


CHANGES: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": "ho"}]},
    {"messages": [{"role": "system", "content": "hi"}]},
    {"max_tokens": 5},
    {"seed": 4},
    {"stop": ["z"]},
    {"n": 2},
    {"logprobs": True},
    {"top_k": 7},
    {"repeat_penalty": 1.1},
    {"logit_bias": {"97": 1}},
    {"cache_salt": "x"},
    {"chat_template_kwargs": {"a": 1}},
    {"ignore_eos": True},
    {"max_repetitions": 5},
    {"regex": "[a-z]+"},
    {
        "tools": [{"type": "function", "function": {"name": "f"}}],
    },
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda c: next(iter(c)))
async def test_whatever_matters_makes_another_request(change: dict[str, Any]) -> None:
    async with governed(cache=cache()) as gate:
        assert (await gate.post("/v1/chat/completions", BASE)).code == 200
        reply = await gate.post("/v1/chat/completions", {**BASE, **change})
        assert reply.headers["x-llmkit-cache"] == "miss"


@pytest.mark.parametrize(
    "change", [{"user": "me"}, {"metadata": {"a": "b"}}, {"stream": True}, {"priority": 3}]
)
async def test_what_does_not_matter_does_not(change: dict[str, Any]) -> None:
    async with governed(cache=cache()) as gate:
        assert (await gate.post("/v1/chat/completions", BASE)).code == 200
        reply = await gate.post("/v1/chat/completions", {**BASE, **change})
        assert reply.headers["x-llmkit-cache"] == "hit"


@pytest.mark.parametrize("shared", [False, True])
async def test_callers_have_their_own_unless_they_share(shared: bool) -> None:
    async with governed(cache=cache(shared=shared)) as gate:
        await gate.post("/v1/chat/completions", BASE, "ann")
        assert (await gate.post("/v1/chat/completions", BASE, "ann")).headers[
            "x-llmkit-cache"
        ] == "hit"
        reply = await gate.post("/v1/chat/completions", BASE, "bob")
        assert reply.headers["x-llmkit-cache"] == ("hit" if shared else "miss")
        salted = {**BASE, "cache_salt": "mine"}
        assert (await gate.post("/v1/chat/completions", salted, "bob")).headers[
            "x-llmkit-cache"
        ] == "miss", "a salt keeps apart in any case"


async def test_a_caller_may_ask_for_a_fresh_answer_or_for_none_to_be_kept() -> None:
    async with governed(cache=cache()) as gate:
        path = "/v1/chat/completions"
        unkept = await gate.post(path, BASE, Cache_Control="no-store")
        assert "x-llmkit-cache" not in unkept.headers and len(gate.cache) == 0
        await gate.post(path, BASE)
        fresh = await gate.post(path, BASE, Cache_Control="no-cache")
        assert fresh.headers["x-llmkit-cache"] == "miss" and len(gate.cache) == 1
        assert (await gate.post(path, BASE)).headers["x-llmkit-cache"] == "hit"


async def test_errors_are_not_stored() -> None:
    async with governed(cache=cache()) as gate:
        gate.model.runner.fail_next = "the decode failed"
        assert (await gate.post("/v1/chat/completions", BASE)).code == 500
        assert len(gate.cache) == 0
        reply = await gate.post("/v1/chat/completions", BASE)
        assert reply.code == 200 and reply.headers["x-llmkit-cache"] == "miss"
        long = {**BASE, "messages": [{"role": "user", "content": "x" * 6000}]}
        for _ in range(2):
            assert (await gate.post("/v1/chat/completions", long)).code == 400
        assert len(gate.cache) == 1


async def test_a_list_of_prompts_is_a_hit_when_all_of_it_is() -> None:
    async with governed(cache=cache()) as gate:
        body = {"prompt": ["a", "b"], "max_tokens": 4, "temperature": 0}
        for prompts, said in ((["a", "b"], "miss"), (["b", "a"], "hit"), (["b", "c"], "miss")):
            reply = await gate.post("/v1/completions", {**body, "prompt": prompts})
            assert reply.headers["x-llmkit-cache"] == said
            texts = [c["text"] for c in json.loads(reply.body)["choices"]]
            expected = [gate.model.runner.reference(p.encode(), 4).decode() for p in prompts]
            assert texts == expected, "each its own"
        twice = await gate.post("/v1/completions", {**body, "prompt": ["d", "d"]})
        texts = [c["text"] for c in json.loads(twice.body)["choices"]]
        assert texts[0] == texts[1] and twice.code == 200


async def test_defaults_of_the_server_count_as_asked_for() -> None:
    silent = {k: v for k, v in BASE.items() if k != "temperature"}
    async with governed(cache=cache(), guards=Guards(Terms(sampling={"temperature": 0}))) as gate:
        for said in ("miss", "hit"):
            reply = await gate.post("/v1/chat/completions", silent)
            assert reply.headers["x-llmkit-cache"] == said


VECTORS: dict[str, dict[str, Any]] = {
    "/v1/embeddings": {"model": "fake", "input": ["a", "bb"]},
    "/api/embed": {"model": "fake", "input": ["a", "bb"]},
    "/api/embeddings": {"model": "fake", "prompt": "a"},
    "/v1/rerank": {"model": "fake", "query": "a", "documents": ["b", "cc"]},
}


@pytest.mark.parametrize("path", VECTORS)
async def test_vectors_are_stored_too(path: str) -> None:
    async with governed(cache=cache()) as gate:
        object.__setattr__(gate.model.description, "embedding_size", 2)
        first, again = await gate.post(path, VECTORS[path]), await gate.post(path, VECTORS[path])
        assert [r.headers["x-llmkit-cache"] for r in (first, again)] == ["miss", "hit"]
        assert without_ids(first.body.decode()) == without_ids(again.body.decode())
        assert gate.records[0].num_embedded_tokens == gate.records[1].num_embedded_tokens > 0


async def test_a_hit_needs_no_place_in_a_full_queue() -> None:
    async with governed(
        FakeRunner(n_slots=1, n_ctx=5000, step_s=0.01), cache=cache(), max_queue=1
    ) as gate:
        path = "/v1/chat/completions"
        await gate.post(path, BASE, "eve")
        busy = [
            asyncio.create_task(gate.post(path, dialects(LONG, text=f"{i}")[path], "eve"))
            for i in range(2)
        ]
        await until(lambda: gate.under_way("eve") == 2)
        reply = await gate.post(path, BASE, "eve")
        assert reply.code == 200 and reply.headers["x-llmkit-cache"] == "hit"
        assert (await gate.post(path, dialects(5, text="new")[path], "eve")).code == 503
        for task in busy:
            task.cancel()


def slow() -> FakeRunner:
    return FakeRunner(n_slots=4, n_ctx=5000, step_s=0.01)


def hurry(gate: Governed) -> None:
    """What runs takes no time from now on."""
    gate.model.runner.step_s = 0.0


class TestTogether:
    """Equal requests at the same time are computed once."""

    async def test_ten_at_once_are_one(self) -> None:
        async with governed(slow(), cache=cache()) as gate:
            path = "/v1/chat/completions"
            tasks = [
                asyncio.create_task(gate.post(path, dialects(LONG, stream=i % 2 == 0)[path]))
                for i in range(10)
            ]
            await until(lambda: gate.cache.joined == 9)
            hurry(gate)
            replies = await asyncio.gather(*tasks)
            assert all(r.code == 200 for r in replies)
            expected = gate.model.runner.reference(b"[user]hi", LONG).decode()
            assert all(text_in(without_ids(r.body.decode())) == expected for r in replies)
            assert gate.model.stats().requests_total == 1
            assert (gate.cache.misses, gate.cache.hits, gate.cache.joined) == (1, 9, 9)
            said = [r.headers["x-llmkit-cache"] for r in replies]
            assert said.count("miss") == 1 and said.count("hit") == 9

    async def test_who_came_first_may_leave(self) -> None:
        async with governed(slow(), cache=cache()) as gate:
            path = "/v1/chat/completions"
            body = dialects(LONG, stream=True)[path]
            async with gate.connection(path, body) as reader:
                await reader.readuntil(b"content")
                second = asyncio.create_task(gate.post(path, body))
                await until(lambda: gate.cache.joined == 1)
            hurry(gate)
            reply = await second
            expected = gate.model.runner.reference(b"[user]hi", LONG).decode()
            assert text_in(without_ids(reply.body.decode())) == expected, "from its beginning"
            assert len(gate.cache) == 1

    async def test_when_all_have_left_nothing_goes_on(self) -> None:
        async with governed(slow(), cache=cache()) as gate:
            path = "/v1/chat/completions"
            body = dialects(4000, stream=True)[path]
            async with gate.connection(path, body) as one, gate.connection(path, body) as other:
                await one.readuntil(b"content")
                await other.readuntil(b"content")
                assert gate.model.stats().num_running == 1
            await until(lambda: gate.model.stats().num_running == 0)
            assert len(gate.cache) == 0 and not gate.cache._flights

    async def test_a_failure_is_everybodys_and_kept_by_nobody(self) -> None:
        async with governed(slow(), cache=cache()) as gate:
            path = "/v1/chat/completions"
            tasks = [asyncio.create_task(gate.post(path, dialects(LONG)[path])) for _ in range(4)]
            await until(lambda: gate.cache.joined == 3)
            gate.model.runner.fail_next = "the decode failed"
            assert [r.code for r in await asyncio.gather(*tasks)] == [500] * 4
            assert len(gate.cache) == 0 and not gate.cache._flights

    async def test_a_cancelled_response_is_its_own(self) -> None:
        async with governed(slow(), cache=cache()) as gate:
            path = "/v1/responses"
            body = dialects(LONG, stream=True)[path]
            async with gate.connection(path, body) as reader:
                head = await reader.readuntil(b"output_text.delta")
                response_id = head.split(b'"id": "resp_')[1].split(b'"')[0].decode()
                other = asyncio.create_task(gate.post(path, body))
                await until(lambda: gate.cache.joined == 1)
                reply = await gate.post(f"/v1/responses/resp_{response_id}/cancel", {})
                assert json.loads(reply.body)["status"] == "cancelled"
                await asyncio.wait_for(reader.readuntil(b"event: response.incomplete"), 30)
            hurry(gate)
            final = json.loads((await other).body.decode().strip().split("data: ")[-1])
            assert len(final["response"]["output"][0]["content"][0]["text"]) == LONG


async def weighted(gate: Governed) -> list[float]:
    seen: list[float] = []
    submit = gate.model.submit

    def watch(request: GenerationRequest) -> Stream:
        seen.append(request.weight)
        return submit(request)

    gate.model.submit = watch  # type: ignore[method-assign]
    await gate.post("/v1/chat/completions", BASE, "heavy")
    return seen


async def test_what_is_computed_for_the_cache_has_its_callers_weight() -> None:
    async with governed(cache=cache(), allowances={"heavy": Allowance(weight=2.5)}) as gate:
        assert await weighted(gate) == [2.5]
