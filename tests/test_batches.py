"""Lists and tables of prompts are answered whole, however short the engine's queue is, and whoever
takes places in it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pandas as pd
import pytest
from fake_runner import FakeRunner
from fakes import FakeClient, ask, wait_for

from llmkit.bench import quality
from llmkit.errors import QueueFullError
from llmkit.llm import LLM
from llmkit.protocol import GenerationRequest
from llmkit.protocol.stream import Channel, Stream

PROMPTS = [f"prompt {i}" for i in range(20)]
SHORT = {"temperature": 0, "max_tokens": 4}


class Crowded(FakeClient):
    """An engine that takes requests and then refuses them, as one behind a bridge may: those of
    ``refused``, as often as it says."""

    def __init__(self, **options: Any) -> None:
        super().__init__(runner=FakeRunner(n_slots=2, step_s=0.001), **options)
        self.refused: dict[str, int] = {}
        self.ids: list[str] = []  # of those that it took

    def submit(self, request: GenerationRequest) -> Stream:
        prompt = request.prompt or (request.messages or ())[-1].text
        if self.refused.get(str(prompt), 0) <= 0:
            stream = super().submit(request)
            self.ids.append(request.request_id)
            return stream
        self.refused[str(prompt)] -= 1
        self.ids.append(request.request_id)
        channel = Channel(request.request_id, self.abort)
        threading.Timer(
            0.01, lambda: (channel.fail(QueueFullError("full")), channel.wake())
        ).start()
        return Stream(channel)


@pytest.fixture
def client() -> Crowded:
    return Crowded(max_waiting=2)


@pytest.fixture
def llm(client: Crowded) -> Iterator[LLM]:
    handle = LLM(client)
    yield handle
    handle.unload()


def expected(client: FakeClient, prompts: list[str]) -> list[str]:
    return [client.runner.reference(p.encode(), 4).decode() for p in prompts]


@pytest.mark.parametrize("refused", [{}, {PROMPTS[0]: 1, PROMPTS[7]: 1, PROMPTS[-1]: 1}])
def test_a_list_and_a_table_wait_for_room(
    llm: LLM, client: Crowded, refused: dict[str, int]
) -> None:
    client.refused = dict(refused)
    done = llm.generate(PROMPTS, **SHORT)
    assert [c.text for c in done] == expected(client, PROMPTS)
    assert llm.last_batch == done
    client.refused = dict(refused)
    table = llm.map(pd.DataFrame({"x": PROMPTS}), "{x}", chat=False, **SHORT)
    assert list(table["answer"]) == expected(client, PROMPTS) and table["answer_error"].isna().all()
    client.refused = dict(refused)
    scored = quality.scores(client, list(b"a text of some length. " * 30), 40, top=0)
    assert len(scored) == 23 * 30 - 1, "all but the first token"
    assert len(set(client.ids)) == len(client.ids), "an engine may still know an id"


def test_who_is_alone_is_told(llm: LLM, client: Crowded) -> None:
    client.refused = {"prompt 0": 1}
    with pytest.raises(QueueFullError):
        llm.generate("prompt 0")
    client.refused = {"prompt 0": 10**6, "prompt 1": 10**6}
    with pytest.raises(QueueFullError):
        llm.generate(PROMPTS[:2], **SHORT)
    table = llm.map(pd.DataFrame({"x": PROMPTS[:3]}), "{x}", chat=False, **SHORT)
    assert list(table["answer_error"].isna()) == [False, False, True]


def test_beside_another_caller_who_fills_the_queue(llm: LLM, client: Crowded) -> None:
    client.runner.step_s = 0.002
    others = []
    for i in range(4):
        others.append(client.submit(ask(f"other {i}", max_tokens=1000, caller="o")))
        wait_for(lambda: client.stats().num_running == min(len(others), 2))
    assert [c.text for c in llm.generate(PROMPTS, **SHORT)] == expected(client, PROMPTS)
    for stream in others:
        stream.close()
