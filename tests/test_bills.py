"""A small request must not make others pay: what it costs to read grows with its size, and what it
builds is bounded."""

from __future__ import annotations

import contextlib
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jinja2
import pandas as pd
import pytest
from fake_runner import FakeRunner
from fakes import FakeClient, ask, wait_for
from gateway_client import serve

from llmkit.backend.gbnf import to_lark
from llmkit.bridge.server import BridgeServer
from llmkit.chat.bounds import Budget
from llmkit.chat.telling import lost
from llmkit.chat.template import CHATML, ChatTemplate
from llmkit.errors import InvalidRequestError
from llmkit.gateway.bodies import check_counts, parse_json
from llmkit.gateway.directory import EngineDirectory
from llmkit.notebook.frames import map_rows
from llmkit.protocol import (
    Completion,
    Delta,
    FinishReason,
    GenerationRequest,
    Message,
    ToolCall,
    Usage,
)
from llmkit.protocol.client import EngineClient
from llmkit.protocol.schema import normalized
from llmkit.protocol.stream import Channel, Stream


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "integer", "multipleOf": 50_000_017},
        {"allOf": [{"multipleOf": 9973}, {"multipleOf": 9967}], "type": "integer"},
        {
            "type": "object",
            "properties": {f"p{i}": {"type": "integer", "multipleOf": 2001 + i} for i in range(50)},
        },
    ],
)
def test_numbers_that_need_a_state_for_each_remainder_are_refused(schema: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError, match="multipleOf at #"):
        normalized(schema)


def test_multiples_that_people_ask_for_are_kept() -> None:
    for value in (0.01, 0.25, 5, 60, 86_400, 10**9):
        assert normalized({"type": "number", "multipleOf": value})["multipleOf"] == value


def _zigzag(n: int) -> dict[str, Any]:
    names = [
        name
        for pair in zip(range(n // 2), range(n - 1, n // 2 - 1, -1), strict=False)
        for name in pair
    ]
    chain = {
        str(a): {"type": "object", "properties": {"x": {"$ref": f"#/$defs/{b}"}}, "required": ["x"]}
        for a, b in itertools.pairwise(names)
    }
    return {
        "$ref": "#/$defs/0",
        "$defs": {**dict(sorted(chain.items())), str(names[-1]): {"type": "null"}},
    }


@contextlib.contextmanager
def counted() -> Iterator[list[int]]:
    """How many calls this thread makes: what grows faster than the work shows, whatever the
    machine."""
    calls = [0]

    def trace(*_: object) -> None:
        calls[0] += 1

    sys.setprofile(trace)
    try:
        yield calls
    finally:
        sys.setprofile(None)


def count(deed: Callable[[], object]) -> int:
    with counted() as calls:
        deed()
    return calls[0]


def test_reading_a_schema_or_a_grammar_is_linear() -> None:
    """Twice as much makes about twice as many calls."""

    def hub(n: int) -> str:
        rules = [f'r{i} ::= "a" r{i - 1}' if i else 'r0 ::= "b"' for i in range(n)]
        return "\n".join(["root ::= hub", "hub ::= " + " ".join(f"r{i}" for i in range(n)), *rules])

    for small, large in (
        (lambda: normalized(_zigzag(200)), lambda: normalized(_zigzag(400))),
        (lambda: to_lark(hub(200)), lambda: to_lark(hub(400))),
        (
            lambda: check_counts(b"[" * 50_001 + b'\\"' * 2000),
            lambda: check_counts(b"[" * 50_001 + b'\\"' * 4000),
        ),
    ):
        sizes = []
        for deed in (small, large):
            with contextlib.suppress(InvalidRequestError):
                sizes.append(count(deed))
        assert len(sizes) < 2 or sizes[1] < 3 * sizes[0]


def test_long_names_are_not_repeated_for_each_case() -> None:
    import tracemalloc

    schema = {
        "type": "object",
        "properties": {"k" * 200_000: {"anyOf": [{"const": i} for i in range(2000)]}},
    }
    tracemalloc.start()
    normalized(schema)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20e6


async def test_references_to_stored_items_are_bounded_as_if_they_were_sent() -> None:
    model = FakeClient(runner=FakeRunner(n_ctx=1_000_000))
    bridge = BridgeServer(model)
    async for api in serve(None):
        ask = {"model": "fake", "max_output_tokens": 1, "input": "x" * 900_000}
        _, body = await api.post("/v1/responses", ask)
        found = await api.fetch("GET", f"/v1/responses/{body['id']}/input_items")
        (item,) = json.loads(found.body)["data"]
        reference = {"type": "item_reference", "id": item["id"]}
        status, said = await api.post("/v1/responses", {**ask, "input": [reference] * 20})
        assert status == 400 and "references too much" in said["error"]["message"]
    bridge.close()
    model.close()


@pytest.mark.parametrize(
    "source",
    [
        "{{ 5 | round(-4000000) }}",
        "{{ ('ab' * 1000000).strip('ab' * 1000000) }}",
        "{{ ('ab' * 1000000) | trim('ab' * 1000000) }}",
        "{{ (['x' * 1000000] * 100000) | sort | length }}",
        "{{ messages | tojson(separators=('a' * 1000000, 'b')) }}",
        (
            "{% for a in range(100000) if false %}{% endfor %}{% for a in range(100000) %}"
            "{% for b in range(100000) if false %}{% endfor %}{% endfor %}"
        ),
    ],
)
def test_one_call_of_a_template_is_charged_for_all_that_it_does(source: str) -> None:
    with pytest.raises(InvalidRequestError):
        ChatTemplate(source).render([Message("user", "x")])


def _compute(seconds: float) -> None:
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


def test_the_bill_of_trials_is_charged_for_trials_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmkit.chat.bounds.MAX_SECONDS", 1.0)
    long = "{% for i in range(6000) %}{% endfor %}" + CHATML  # longer than one look at the clock
    template = ChatTemplate(long)
    _compute(1.2)  # a cell, between the load and the first chat
    assert (
        template.manners == ChatTemplate(long).manners
        and template.manners.system
        and template.manners.repeats
    )
    budget = Budget(100_000)
    with budget.running():
        _compute(1.2)
    with budget.running(), pytest.raises(jinja2.TemplateError, match="too long"):
        budget.step(50_000)


def test_who_was_preempted_for_a_caller_does_not_take_the_slot_back() -> None:
    engine = FakeClient(runner=FakeRunner(n_slots=2, step_s=0.002))
    try:
        engine.submit(ask("warm", max_tokens=400, caller="bob")).result(30)
        first = [engine.submit(ask(f"a{i}", max_tokens=200, caller="ann")) for i in range(2)]
        wait_for(lambda: all(stream.text for stream in first))
        late = engine.submit(ask("b", max_tokens=20, caller="bob"))
        for stream in (*first, late):
            assert stream.result(30).finish_reason is FinishReason.LENGTH
        assert engine.stats().preemptions_total <= 4
    finally:
        engine.close()


def test_numbers_are_read_up_to_the_largest_double() -> None:
    whole = int(1.7976931348623157e308)
    assert parse_json(b'{"maximum": %d}' % whole)["maximum"] == whole
    with pytest.raises(InvalidRequestError, match="too large a number"):
        parse_json(b'{"maximum": ' + b"9" * 4000 + b"}")


class _OneByOne(Channel):
    """Gives one delta at a time, as an engine does whose reader keeps up."""

    def take(self) -> tuple[list[Delta], Completion | None]:
        if not self._deltas:
            return [], self.result
        delta = self._deltas.popleft()
        self.wake()
        return [delta], None if self._deltas else self.result


class _Fluent(FakeClient):
    """Answers with ``max_tokens`` pieces that are there at once."""

    def submit(self, request: GenerationRequest) -> Stream:
        channel = _OneByOne(request.request_id, lambda _: None)
        count = request.sampling.max_tokens or 0
        for i in range(count):
            channel.push(Delta(f"{i} ", 1))
        channel.finish(
            Completion("".join(channel.text_parts), FinishReason.LENGTH, Usage(1, count, 0))
        )
        return Stream(channel)


class _Directory(EngineDirectory):
    """One model of this process."""

    def __init__(self, model: EngineClient) -> None:
        super().__init__([])
        self._model = model

    def lookup(self, model: str, use: Any = None) -> EngineClient:
        return self._model


EVENT_ROUTES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 0},
    "/v1/completions": {"prompt": "hi", "max_tokens": 0},
    "/v1/responses": {"input": "hi", "max_output_tokens": 0},
    "/v1/messages": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 0},
    "/api/chat": {"messages": [{"role": "user", "content": "hi"}], "options": {"num_predict": 0}},
    "/api/generate": {"prompt": "hi", "options": {"num_predict": 0}},
}


@pytest.mark.parametrize("path", EVENT_ROUTES)
async def test_each_event_of_a_stream_costs_the_same(path: str) -> None:
    model = _Fluent(runner=FakeRunner(n_ctx=50_000))
    calls = []
    async for api in serve(None, directory=_Directory(model)):
        for n in (50, 1000, 2000):
            body = json.loads(json.dumps(EVENT_ROUTES[path]).replace(": 0", f": {n}"))
            with counted() as made:
                reply = await api.fetch("POST", path, {**body, "model": "fake", "stream": True})
            assert reply.code == 200 and reply.body.count(b"\n") >= n, reply.body[-300:]
            calls.append(made[0])
    model.close()
    assert calls[2] < 2.2 * calls[1], calls


def test_each_row_of_a_table_costs_the_same() -> None:
    frame = pd.DataFrame({"x": range(4000)})

    def answer(prompt: str) -> Stream:
        channel = Channel(prompt, lambda _: None)
        channel.push(Delta(prompt, 1))
        channel.finish(Completion(prompt, FinishReason.STOP, Usage(1, 1, 0)))
        return Stream(channel)

    def rows(n: int) -> None:
        streams: list[Stream] = []
        found = map_rows(frame[:n], "row {x}", answer, lambda c: c.text, "y", 64, [], streams)
        assert not streams and list(found["y"]) == [f"row {i}" for i in range(n)]

    rows(10)
    assert count(lambda: rows(4000)) < 2.2 * count(lambda: rows(2000))


def test_looking_for_what_a_template_left_out_costs_what_the_conversation_is_long() -> None:
    """Each search that fails reads the whole prompt: there must not be one for each message."""
    read = 0

    class Prompt(str):
        __slots__ = ()

        def find(self, *_: Any) -> int:  # type: ignore[override]
            nonlocal read
            read += len(self)
            return -1

        def count(self, *_: Any) -> int:  # type: ignore[override]
            nonlocal read
            read += len(self)
            return 1

    calls = tuple(ToolCall(str(i), f"f{i}", "{}") for i in range(3000))
    talk = [Message("user", f"number {i}") for i in range(20_000)]
    text = "x" * 100_000
    lost(Prompt(text), [*talk, Message("assistant", tool_calls=calls)], ())
    assert read <= 1200 * len(text)
    assert lost(text, talk, ()) == {"rest"} and lost("", talk[:1], ()) == {"rest"}
